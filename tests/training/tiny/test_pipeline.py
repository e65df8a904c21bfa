"""The weights that the tiny pipeline starts from, and those that it exports."""

import pytest
import torch

from omnivideo.errors import CheckpointError
from omnivideo.models.weights import checkpoint
from omnivideo.training.config import TrainingConfig
from omnivideo.training.engine.run import RunContext
from omnivideo.training.tiny.pipeline import TinyPipeline


def run_in(folder, **options) -> RunContext:
    return RunContext(TrainingConfig(recipe="tiny", runs=folder, **options))


def test_the_shipped_weights_stand_in_for_runs_that_are_not_at_hand(omni, weights, tmp_path):
    tiny = TinyPipeline(run_in(tmp_path / "runs"), shipped_weights=weights)
    shipped = tiny.load_vae().state_dict()
    assert all(torch.allclose(value.half().float(), shipped[key]) for key, value in omni.vae.state_dict().items())
    foundation = tiny.load_foundation()
    x = torch.zeros(1, 16, 1, 8, 8)
    with torch.no_grad():
        out = [one(x, torch.tensor([500.0]), torch.zeros(1, 8, 192), return_dict=False)[0]
               for one in (foundation.decoder, omni.decoder)]  # fmt: skip
    assert torch.allclose(*out, atol=1e-2)
    with pytest.raises(CheckpointError, match="omnivideo train mllm"):
        tiny.load_omni("mllm")


def test_foundations_are_exported_in_the_shipped_layout(weights, tmp_path):
    first = TinyPipeline(run_in(tmp_path / "runs"), shipped_weights=weights)
    first.export_foundations(tmp_path / "out")
    again = TinyPipeline(run_in(tmp_path / "runs"), shipped_weights=tmp_path / "out")
    for one, two in ((first.load_vae(), again.load_vae()), (first.load_text_encoder(), again.load_text_encoder())):
        assert all(torch.equal(value, two.state_dict()[key]) for key, value in one.state_dict().items())


def test_training_goes_on_from_a_folder_of_weights(weights, tmp_path):
    there, tiny = checkpoint.load(weights), TinyPipeline(run_in(tmp_path, weights=weights))
    begun = tiny.load_omni("stage2b")
    for name in ("mllm", "bridge", "decoder", "text_encoder", "vae"):
        expected = getattr(there, name).state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in getattr(begun, name).state_dict().items()), name
    assert torch.equal(tiny.build_mllm_recipe().model.lm_head.weight, there.mllm.lm_head.weight)
    with pytest.raises(CheckpointError, match="mllm has not been trained"):
        TinyPipeline(run_in(tmp_path), shipped_weights=weights).load_omni("stage2b")
