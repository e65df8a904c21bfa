"""Compute visual tokens from a prompt's hidden states once its last token has been computed.

In the scheduler, the connector determines which requests a step completes and which cache blocks hold their hidden
states. In the workers, it gathers the hidden states, runs the vision head and writes the visual tokens to the file
that the request names, before the step's output is sent. A request may have been computed in chunks, found its
beginning in the prefix cache, or been preempted and started again; in every case its blocks hold all of its hidden
states and belong to it until the step ends.

Shapes: B requests, N tokens of the longest, M width of the MLLM, Q visual tokens, E their width.
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

from omnivideo.backends.mllm.vllm_plugin import FIRST_POSITION_PARAM, VISUAL_TOKENS_PARAM
from omnivideo.backends.mllm.vllm_plugin.model import HiddenStateCache
from omnivideo.models.bridge import VisionHead
from omnivideo.models.features import HIDDEN_STATES, VISUAL_TOKENS

FILE_NAME_PATTERN = re.compile(r"[A-Za-z0-9_]{8,64}")
MAX_PADDED_TOKENS = 16_384  # in one batch of the vision head
log = logging.getLogger(__name__)


@dataclass
class PendingPrompt:
    """A prompt of `prompt_length` tokens whose visual tokens are written to `file_name`.

    `block_ids` are the cache blocks of its hidden states, in order. Without a vision head, the hidden states from
    `first_position` on are written.
    """

    file_name: str
    prompt_length: int
    block_ids: list[int]
    first_position: int = 0


@dataclass
class VisualTokensMetadata(KVConnectorMetadata):
    """The prompts whose visual tokens are due after a step's forward pass."""

    due_prompts: list[PendingPrompt] = field(default_factory=list)


def get_requested_file(params: Any) -> str | None:
    """Return the file for a request's visual tokens, or None if it requests none or the name is invalid."""
    extra = getattr(params, "extra_args", None) or {}
    name = (extra.get("kv_transfer_params") or {}).get(VISUAL_TOKENS_PARAM)
    return name if isinstance(name, str) and FILE_NAME_PATTERN.fullmatch(name) else None


def get_first_position(params: Any) -> int:
    """Return the first position whose hidden states a request wants; 0 if it does not say, or not a number."""
    value = ((getattr(params, "extra_args", None) or {}).get("kv_transfer_params") or {}).get(FIRST_POSITION_PARAM)
    return value if isinstance(value, int) and value >= 0 else 0


class VisualTokensConnector(KVConnectorBase_V1, SupportsHMA):
    """Writes visual tokens to files in a folder, the `outbox` of `kv_connector_extra_config`."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        groups = kv_cache_config.kv_cache_groups
        # The hidden states may share a group with the attention layers or have a separate one.
        ((self.group_index, self.layer_name),) = [
            (index, name)
            for index, group in enumerate(groups)
            for name in group.layer_names
            if name.startswith("rows.")
        ]
        self.outbox = Path(self._kv_transfer_config.get_from_extra_config("outbox", ""))
        self.pending_prompts: dict[str, PendingPrompt] = {}  # by request id, in the scheduler

    # ------------------------------------------------------------ scheduler

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        pass

    def build_connector_meta(self, scheduler_output: Any) -> VisualTokensMetadata:
        metadata = VisualTokensMetadata()
        for request_id, num_computed_tokens in self.track_scheduled(scheduler_output):
            prompt = self.pending_prompts[request_id]
            if num_computed_tokens + scheduler_output.num_scheduled_tokens[request_id] >= prompt.prompt_length:
                metadata.due_prompts.append(self.pending_prompts.pop(request_id))
        return metadata

    def track_scheduled(self, output: Any) -> Iterator[tuple[str, int]]:
        """Update the blocks of pending prompts and yield the scheduled ones with their number of computed tokens."""
        for new_request in output.scheduled_new_reqs:
            if file_name := get_requested_file(new_request.sampling_params):
                block_ids = list(new_request.block_ids[self.group_index])
                first_position = get_first_position(new_request.sampling_params)
                prompt = PendingPrompt(file_name, len(new_request.prompt_token_ids), block_ids, first_position)
                self.pending_prompts[new_request.req_id] = prompt
                yield new_request.req_id, new_request.num_computed_tokens
        running = output.scheduled_cached_reqs
        for request_id, new_block_ids, num_computed_tokens in zip(
            running.req_ids, running.new_block_ids, running.num_computed_tokens, strict=True
        ):
            if pending := self.pending_prompts.get(request_id):
                if request_id in running.resumed_req_ids:
                    pending.block_ids = []  # preempted: vLLM lists all of its blocks again
                pending.block_ids += new_block_ids[self.group_index] if new_block_ids is not None else []
                yield request_id, num_computed_tokens

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        self.pending_prompts.pop(request.request_id, None)  # it may have been aborted
        return False, None

    request_finished_all_groups = request_finished

    # ------------------------------------------------------------ workers

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        self.hidden_state_cache = kv_caches[self.layer_name]
        layers = get_layers_from_vllm_config(self._vllm_config, HiddenStateCache, [self.layer_name])
        self.vision_head: VisionHead | None = layers[self.layer_name].head
        self.is_writer = get_tensor_model_parallel_rank() == 0  # every rank has the same hidden states

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        """Write the visual tokens or hidden states that are due.

        vLLM calls this after a step's forward pass, before its output.
        """
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, VisualTokensMetadata)
        if not metadata.due_prompts or not self.is_writer:
            return
        if self.vision_head is None:
            for prompt in metadata.due_prompts:
                states_NM = self.gather_hidden_states(prompt)[prompt.first_position :].cpu()
                write_tensor(self.outbox / prompt.file_name, HIDDEN_STATES, states_NM)
        else:
            for batch in batch_by_length(metadata.due_prompts):
                for prompt, tokens in zip(batch, self.compute_visual_tokens(batch), strict=True):
                    write_tensor(self.outbox / prompt.file_name, VISUAL_TOKENS, tokens)

    def gather_hidden_states(self, prompt: PendingPrompt) -> Tensor:
        """Return the hidden states [N, M] of a prompt."""
        block_ids = torch.tensor(prompt.block_ids, device=self.hidden_state_cache.device)
        return self.hidden_state_cache[block_ids].flatten(0, 2)[: prompt.prompt_length].float()

    @torch.no_grad()
    def compute_visual_tokens(self, batch: list[PendingPrompt]) -> Tensor:
        """Return V_o [B, Q, E] of prompts of any lengths."""
        assert self.vision_head is not None
        states_NM = [self.gather_hidden_states(prompt) for prompt in batch]
        states_BNM = torch.nn.utils.rnn.pad_sequence(states_NM, batch_first=True)
        lengths_B = torch.tensor([prompt.prompt_length for prompt in batch], device=states_BNM.device)
        padding_BN = torch.arange(states_BNM.shape[1], device=states_BNM.device) >= lengths_B[:, None]
        visual_BQE: Tensor = self.vision_head(states_BNM, padding_BN)
        return visual_BQE.cpu()


def batch_by_length(prompts: list[PendingPrompt]) -> Iterator[list[PendingPrompt]]:
    """Yield batches of prompts of similar lengths.

    A batch has at most MAX_PADDED_TOKENS tokens, padding included, unless it is a single longer prompt.
    """
    batch: list[PendingPrompt] = []
    for prompt in sorted(prompts, key=lambda prompt: prompt.prompt_length):
        if batch and prompt.prompt_length * (len(batch) + 1) > MAX_PADDED_TOKENS:
            yield batch
            batch = []
        batch.append(prompt)
    yield batch


def write_tensor(path: Path, name: str, values: Tensor) -> None:
    """Write a tensor with a batch dimension of 1 to an existing file.

    The route creates the file, and removes it if the request is aborted. An error such as a full disk fails only this
    request, not the engine.
    """
    try:
        with path.open("r+b") as file:
            file.write(save({name: values[None].contiguous()}))
    except OSError as error:
        log.error("visual tokens could not be written: %s", error)
