"""Visual tokens out of a prompt's hidden states, once its last token has been computed.

The scheduler's half says which requests of a step are due and where their rows lie; the workers' half gathers the rows,
puts them through the head and writes the tokens into the file that the request names, before the step's answer leaves.
A request may have come in chunks, found its beginning in the prefix cache, or lost everything to another and begun
again: its rows stand in its blocks whatever happened, and the blocks are its own until the step is over.
Shapes: B requests, N tokens of the longest, M width of the MLLM, Q queries, E width of the tokens.
"""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

from omnivideo.backends.mllm.vllm_plugin import WANTED
from omnivideo.backends.mllm.vllm_plugin.model import Rows
from omnivideo.models.bridge import VisionHead

NAME = re.compile(r"[A-Za-z0-9_]{8,64}")
MOST = 16_384  # padded tokens that go through the head at a time
log = logging.getLogger(__name__)


@dataclass
class Job:
    """A prompt of `length` tokens whose rows lie in `blocks`, in order; its visual tokens go to the file `name`."""

    name: str
    length: int
    blocks: list[int]


@dataclass
class Jobs(KVConnectorMetadata):
    """What is due after a step's forward pass."""

    due: list[Job] = field(default_factory=list)


def wanted(params: Any) -> str | None:
    """The file that a request's visual tokens are to go to; None where it wants none (or names no file of ours)."""
    extra = getattr(params, "extra_args", None) or {}
    name = (extra.get("kv_transfer_params") or {}).get(WANTED)
    return name if isinstance(name, str) and NAME.fullmatch(name) else None


class VisualTokensConnector(KVConnectorBase_V1, SupportsHMA):
    """`kv_connector_extra_config` names the folder of the files: `outbox`."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        groups = kv_cache_config.kv_cache_groups
        # The rows may share a group with the attention layers or have one of their own.
        ((self.group, self.layer),) = [
            (at, name) for at, group in enumerate(groups) for name in group.layer_names if name.startswith("rows.")
        ]
        self.outbox = Path(self._kv_transfer_config.get_from_extra_config("outbox", ""))
        self.waiting: dict[str, Job] = {}  # by request, on the scheduler's side

    # ------------------------------------------------------------ scheduler

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        pass

    def build_connector_meta(self, scheduler_output: Any) -> Jobs:
        jobs = Jobs()
        for request, computed in self.scheduled(scheduler_output):
            job = self.waiting[request]
            if computed + scheduler_output.num_scheduled_tokens[request] >= job.length:
                jobs.due.append(self.waiting.pop(request))
        return jobs

    def scheduled(self, output: Any) -> Iterator[tuple[str, int]]:
        """The waiting requests of a step with the tokens that they have behind them, blocks brought up to date."""
        for new in output.scheduled_new_reqs:
            if name := wanted(new.sampling_params):
                self.waiting[new.req_id] = Job(name, len(new.prompt_token_ids), list(new.block_ids[self.group]))
                yield new.req_id, new.num_computed_tokens
        known = output.scheduled_cached_reqs
        for request, blocks, computed in zip(
            known.req_ids, known.new_block_ids, known.num_computed_tokens, strict=True
        ):
            if job := self.waiting.get(request):
                if request in known.resumed_req_ids:
                    job.blocks = []
                job.blocks += blocks[self.group] if blocks is not None else []
                yield request, computed

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        self.waiting.pop(request.request_id, None)  # one that was given up
        return False, None

    request_finished_all_groups = request_finished

    # ------------------------------------------------------------ workers

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        self.cache = kv_caches[self.layer]
        layers = get_layers_from_vllm_config(self._vllm_config, Rows, [self.layer])
        self.head: VisionHead = layers[self.layer].head
        self.writes = get_tensor_model_parallel_rank() == 0  # every rank has the same rows

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        """After the step's forward pass, before its answer."""
        jobs = self._get_connector_metadata()
        assert isinstance(jobs, Jobs)
        if jobs.due and self.writes:
            for batch in batches(jobs.due):
                for job, tokens in zip(batch, self.visual_tokens(batch), strict=True):
                    put(self.outbox / job.name, tokens)

    def rows(self, job: Job) -> Tensor:
        """Hidden states [N, M] of a prompt."""
        blocks = torch.tensor(job.blocks, device=self.cache.device)
        return self.cache[blocks].flatten(0, 2)[: job.length].float()

    @torch.no_grad()
    def visual_tokens(self, batch: list[Job]) -> Tensor:
        """[B, Q, E] of prompts of any lengths."""
        rows = [self.rows(job) for job in batch]
        states_BNM = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(one) for one in rows], device=states_BNM.device)
        padding_BN = torch.arange(states_BNM.shape[1], device=states_BNM.device) >= lengths[:, None]
        return self.head(states_BNM, padding_BN).cpu()


def batches(jobs: list[Job]) -> Iterator[list[Job]]:
    """Prompts of like lengths together, at most MOST padded tokens unless one alone has more."""
    batch: list[Job] = []
    for job in sorted(jobs, key=lambda one: one.length):
        if batch and job.length * (len(batch) + 1) > MOST:
            yield batch
            batch = []
        batch.append(job)
    yield batch


def put(path: Path, tokens_QE: Tensor) -> None:
    """Only into a file that is there: the route that asked has made it, and removes it when it gives up.

    A full disk is that request's failure, not the engine's end.
    """
    try:
        with path.open("r+b") as file:
            file.write(save({"visual_tokens": tokens_QE[None].contiguous()}))
    except OSError as error:
        log.error("no visual tokens were written: %s", error)
