"""A tokenized request as input for vLLM's engine: token ids, patches, and the position of each medium."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import BatchFeature
from vllm.inputs import mm_input, tokens_input
from vllm.model_executor.models.qwen2_vl import _create_qwen2vl_field_factory
from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange

from omnivideo.backends.mllm.vllm_plugin.processor import collate_patches
from omnivideo.models.mllm import TokenizedRequest

MODALITY_IDS = {"image": 1, "video": 2}  # in TokenizedRequest.token_types


def find_runs(token_types: Sequence[int], kind: int) -> Iterator[tuple[int, int]]:
    """Yield the beginning and end of every unbroken run of a token type."""
    begin = None
    for index, token_type in enumerate([*token_types, 0]):
        if token_type == kind and begin is None:
            begin = index
        elif token_type != kind and begin is not None:
            yield begin, index
            begin = None


def locate_placeholders(encoded: TokenizedRequest, kind: str) -> list[PlaceholderRange]:
    """Return the positions of the media of a kind. A clip has a run for each group of frames, with text between."""
    media_runs, placeholders = find_runs(encoded.token_types, MODALITY_IDS[kind]), []
    for frames, _, _ in encoded.grids[kind]:
        item_runs = [next(media_runs) for _ in range(frames)]
        # A clip begins at its first start token, by which the model computes the positions of its frames.
        begin, end = (item_runs[0][0] - 1, item_runs[-1][1]) if kind == "video" else item_runs[0]
        mask = torch.tensor(encoded.token_types[begin:end]) == MODALITY_IDS[kind]
        placeholders.append(PlaceholderRange(begin, end - begin, mask if kind == "video" else None))
    return placeholders


def build_engine_input(encoded: TokenizedRequest, digests: dict[str, list[str]], merge_size: int) -> Any:
    """Return the engine's input. Media with equal `digests` are encoded only once."""
    tensors = collate_patches(encoded.patches, encoded.grids)
    if not tensors:
        return tokens_input(encoded.token_ids)
    features = BatchFeature(tensors)
    return mm_input(
        prompt_token_ids=encoded.token_ids,
        mm_kwargs=MultiModalKwargsItems.from_hf_inputs(features, _create_qwen2vl_field_factory(merge_size)(features)),
        mm_hashes={kind: names for kind, names in digests.items() if names},
        mm_placeholders={kind: locate_placeholders(encoded, kind) for kind in MODALITY_IDS if encoded.grids[kind]},
    )
