"""An encoded request as the engine takes it: token ids, patches, and where in the prompt each medium stands."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import BatchFeature
from vllm.inputs import mm_input, tokens_input
from vllm.model_executor.models.qwen2_vl import _create_qwen2vl_field_factory
from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange

from omnivideo.backends.mllm.vllm_plugin.processor import tensors_of
from omnivideo.models.mllm import Encoded

KINDS = {"image": 1, "video": 2}  # in Encoded.types


def runs(types: Sequence[int], kind: int) -> Iterator[tuple[int, int]]:
    """Beginning and end of every unbroken run of a type."""
    begin = None
    for at, one in enumerate([*types, 0]):
        if one == kind and begin is None:
            begin = at
        elif one != kind and begin is not None:
            yield begin, at
            begin = None


def places(encoded: Encoded, kind: str) -> list[PlaceholderRange]:
    """Where the media of a kind stand.  A clip has a run for each pair of frames, and text between them."""
    found, made = runs(encoded.types, KINDS[kind]), []
    for frames, _, _ in encoded.grids[kind]:
        mine = [next(found) for _ in range(frames)]
        # From a clip's first start token: the model looks for it to place the frames in time.
        begin, end = (mine[0][0] - 1, mine[-1][1]) if kind == "video" else mine[0]
        mask = torch.tensor(encoded.types[begin:end]) == KINDS[kind]
        made.append(PlaceholderRange(begin, end - begin, mask if kind == "video" else None))
    return made


def engine_input(encoded: Encoded, digests: dict[str, list[str]], merge: int) -> Any:
    """`digests` name the media of each kind: what is equal by them is put through the encoder once."""
    tensors = tensors_of(encoded.patches, encoded.grids)
    if not tensors:
        return tokens_input(encoded.ids)
    features = BatchFeature(tensors)
    return mm_input(
        prompt_token_ids=encoded.ids,
        mm_kwargs=MultiModalKwargsItems.from_hf_inputs(features, _create_qwen2vl_field_factory(merge)(features)),
        mm_hashes={kind: names for kind, names in digests.items() if names},
        mm_placeholders={kind: places(encoded, kind) for kind in KINDS if encoded.grids[kind]},
    )
