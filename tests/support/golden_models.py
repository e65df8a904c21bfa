"""The authors' tiny checkpoints as models of ours: published folders, imported and loaded as a user's would be."""

import tempfile
from functools import cache
from pathlib import Path

import pytest
from torch import Tensor

from omnivideo.models.omni import OmniVideoModel
from omnivideo.models.weights import checkpoint
from omnivideo.models.weights.importer import import_weights
from omnivideo.presets import OMNIVIDEO2_1_3B, OMNIVIDEO2_A14B, OMNIVIDEO_1_3B, PRESETS, Precision, Preset
from tests.support.golden import load_golden
from tests.support.published_folders import CHECKPOINTS, narrow_to_golden, publish_golden
from tests.support.qwen_weights import build_instruct_model, save_instruct_model

KINDS = {"v1": OMNIVIDEO_1_3B, "single": OMNIVIDEO2_1_3B, "experts": OMNIVIDEO2_A14B}


def build_golden_preset(kind: str) -> Preset:
    """Return the published preset of a kind with the sizes and lengths of its golden checkpoint."""
    published = KINDS[kind]
    length = load_golden(next(iter(CHECKPOINTS[published.name].values())))[1]["dims"]["max_context_len"]
    return narrow_to_golden(
        published,
        text=published.text.model_copy(update={"max_tokens": load_golden("umt5")[1]["text_len"]}),
        condition=published.condition.model_copy(update={"min_tokens": length, "max_tokens": length}),
    )


@cache
def load_golden_model(kind: str, in_float32: bool = True) -> OmniVideoModel:
    """Return the model of a kind, "v1", "single" or "experts", without an MLLM. Tests must not change it.

    Its parts are in float32, or have the types that the published preset states.
    """
    preset = build_golden_preset(kind)
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, preset.name, preset)
        published = publish_golden(Path(root) / "published", preset.name)
        import_weights(published, Path(root) / "ours", preset.name, allow_missing=True)
        precision: Precision = "float32" if in_float32 else "preset"
        # Tensors that are mapped from the folder's files outlive their names.
        return checkpoint.load(Path(root) / "ours", precision=precision, contents="without-mllm")


def import_golden_weights(kind: str, folder: Path) -> Path:
    """Publish the golden checkpoint of a kind with an MLLM, import it, and return the imported folder.

    The preset must be registered with the golden sizes. Version 2's golden checkpoint has no MLLM of its width, so it
    gets one with random weights.
    """
    name = KINDS[kind].name
    publish_golden(folder / "published", name)
    if kind != "v1":
        width = load_golden(next(iter(CHECKPOINTS[name].values())))[1]["dims"]["mllm_width"]
        save_instruct_model(build_instruct_model(experts=False, width=width), folder / "published" / "Qwen3-VL")
    import_weights(folder / "published", folder / "ours", name)
    return folder / "ours"


def measure_error(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest absolute difference; the shapes must be equal."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float((ours.double() - theirs.double()).abs().max())
