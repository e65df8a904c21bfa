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

from omnivideo.backends.mllm.vllm_plugin import VISUAL_TOKENS_PARAM
from omnivideo.backends.mllm.vllm_plugin.model import HiddenStateCache
from omnivideo.models.bridge import VisionHead

FILE_NAME_PATTERN = re.compile(r"[A-Za-z0-9_]{8,64}")
MAX_PADDED_TOKENS = 16_384  # padded tokens that go through the head at a time
log = logging.getLogger(__name__)


@dataclass
class PendingPrompt:
    """A prompt of `prompt_length` tokens whose rows lie in `block_ids`, in order; its visual tokens go to
    `file_name`."""

    file_name: str
    prompt_length: int
    block_ids: list[int]


@dataclass
class VisualTokensMetadata(KVConnectorMetadata):
    """What is due after a step's forward pass."""

    due_prompts: list[PendingPrompt] = field(default_factory=list)


def get_requested_file(params: Any) -> str | None:
    """The file that a request's visual tokens are to go to; None where it wants none (or names no file of ours)."""
    extra = getattr(params, "extra_args", None) or {}
    name = (extra.get("kv_transfer_params") or {}).get(VISUAL_TOKENS_PARAM)
    return name if isinstance(name, str) and FILE_NAME_PATTERN.fullmatch(name) else None


class VisualTokensConnector(KVConnectorBase_V1, SupportsHMA):
    """`kv_connector_extra_config` names the folder of the files: `outbox`."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        groups = kv_cache_config.kv_cache_groups
        # The rows may share a group with the attention layers or have one of their own.
        ((self.group_index, self.layer_name),) = [
            (index, name)
            for index, group in enumerate(groups)
            for name in group.layer_names
            if name.startswith("rows.")
        ]
        self.outbox = Path(self._kv_transfer_config.get_from_extra_config("outbox", ""))
        self.pending_prompts: dict[str, PendingPrompt] = {}  # by request, on the scheduler's side

    # ------------------------------------------------------------ scheduler

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        pass

    def build_connector_meta(self, scheduler_output: Any) -> VisualTokensMetadata:
        metadata = VisualTokensMetadata()
        for request, computed in self.track_scheduled(scheduler_output):
            prompt = self.pending_prompts[request]
            if computed + scheduler_output.num_scheduled_tokens[request] >= prompt.prompt_length:
                metadata.due_prompts.append(self.pending_prompts.pop(request))
        return metadata

    def track_scheduled(self, output: Any) -> Iterator[tuple[str, int]]:
        """The waiting requests of a step with the tokens that they have behind them, blocks brought up to date."""
        for new in output.scheduled_new_reqs:
            if name := get_requested_file(new.sampling_params):
                self.pending_prompts[new.req_id] = PendingPrompt(
                    name, len(new.prompt_token_ids), list(new.block_ids[self.group_index])
                )
                yield new.req_id, new.num_computed_tokens
        cached_requests = output.scheduled_cached_reqs
        for request, new_block_ids, computed in zip(
            cached_requests.req_ids, cached_requests.new_block_ids, cached_requests.num_computed_tokens, strict=True
        ):
            if prompt := self.pending_prompts.get(request):
                if request in cached_requests.resumed_req_ids:
                    prompt.block_ids = []
                prompt.block_ids += new_block_ids[self.group_index] if new_block_ids is not None else []
                yield request, computed

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        self.pending_prompts.pop(request.request_id, None)  # one that was given up
        return False, None

    request_finished_all_groups = request_finished

    # ------------------------------------------------------------ workers

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        self.hidden_state_cache = kv_caches[self.layer_name]
        layers = get_layers_from_vllm_config(self._vllm_config, HiddenStateCache, [self.layer_name])
        self.vision_head: VisionHead = layers[self.layer_name].head
        self.is_writer = get_tensor_model_parallel_rank() == 0  # every rank has the same rows

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        """After the step's forward pass, before its answer."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, VisualTokensMetadata)
        if metadata.due_prompts and self.is_writer:
            for batch in batch_by_length(metadata.due_prompts):
                for prompt, tokens in zip(batch, self.compute_visual_tokens(batch), strict=True):
                    write_visual_tokens(self.outbox / prompt.file_name, tokens)

    def gather_hidden_states(self, prompt: PendingPrompt) -> Tensor:
        """Hidden states [N, M] of a prompt."""
        blocks = torch.tensor(prompt.block_ids, device=self.hidden_state_cache.device)
        return self.hidden_state_cache[blocks].flatten(0, 2)[: prompt.prompt_length].float()

    @torch.no_grad()
    def compute_visual_tokens(self, batch: list[PendingPrompt]) -> Tensor:
        """[B, Q, E] of prompts of any lengths."""
        states = [self.gather_hidden_states(job) for job in batch]
        states_BNM = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
        lengths = torch.tensor([len(one) for one in states], device=states_BNM.device)
        padding_BN = torch.arange(states_BNM.shape[1], device=states_BNM.device) >= lengths[:, None]
        return self.vision_head(states_BNM, padding_BN).cpu()


def batch_by_length(prompts: list[PendingPrompt]) -> Iterator[list[PendingPrompt]]:
    """Prompts of like lengths together, at most MAX_PADDED_TOKENS padded tokens unless one alone has more."""
    batch: list[PendingPrompt] = []
    for prompt in sorted(prompts, key=lambda one: one.prompt_length):
        if batch and prompt.prompt_length * (len(batch) + 1) > MAX_PADDED_TOKENS:
            yield batch
            batch = []
        batch.append(prompt)
    yield batch


def write_visual_tokens(path: Path, tokens_QE: Tensor) -> None:
    """Only into a file that is there: the route that asked has made it, and removes it when it gives up.

    A full disk is that request's failure, not the engine's end.
    """
    try:
        with path.open("r+b") as file:
            file.write(save({"visual_tokens": tokens_QE[None].contiguous()}))
    except OSError as error:
        log.error("no visual tokens were written: %s", error)
