"""Every recipe of the tiny preset trains, saves a checkpoint, and resumes from it with the same losses."""

import pytest
import torch

from omnivideo.models.omni import build_decoder
from omnivideo.presets import TINY
from omnivideo.training.engine.trainer import Trainer
from omnivideo.training.tiny import decoder
from tests.support.recipes import RECIPES, STEPS, make_decoder_recipe, read_losses


@pytest.mark.parametrize("make", RECIPES, ids=lambda make: make.__name__)
def test_a_resumed_run_has_the_same_losses(make, request, tmp_path):
    Trainer(make(request), tmp_path / "uninterrupted").run()
    Trainer(make(request), tmp_path / "resumed").run(stop_at_step=2)
    resumed = Trainer(make(request), tmp_path / "resumed")
    assert resumed.step == 2
    resumed.run()
    assert read_losses(tmp_path / "resumed") == pytest.approx(read_losses(tmp_path / "uninterrupted"), abs=1e-6)
    assert len(read_losses(tmp_path / "uninterrupted")) == STEPS


@pytest.mark.parametrize("is_known", [False, True])
def test_a_decoder_that_is_known_goes_on_with_the_layout(request, monkeypatch, is_known):
    torch.manual_seed(7)
    known = build_decoder(TINY) if is_known else None
    recipe, shares = make_decoder_recipe(request, known), []

    def record_share(model, latents, condition, high_noise_share):
        shares.append(high_noise_share)
        return latents.mean(dim=(1, 2, 3, 4))

    monkeypatch.setattr(decoder, "flow_matching_loss", record_share)
    recipe.compute_losses(0)
    assert shares == [0.5 if is_known else 0.0]
    if known is not None:
        trained = recipe.model.get_submodule("decoder").state_dict()
        assert all(torch.equal(value, trained[key]) for key, value in known.state_dict().items())
