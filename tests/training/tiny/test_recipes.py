"""Every recipe of the tiny preset trains, saves a checkpoint, and resumes from it with the same losses."""

import pytest

from omnivideo.training.engine.trainer import Trainer
from tests.support.recipes import RECIPES, STEPS, read_losses


@pytest.mark.parametrize("make", RECIPES, ids=lambda make: make.__name__)
def test_a_resumed_run_has_the_same_losses(make, request, tmp_path):
    Trainer(make(request), tmp_path / "uninterrupted").run()
    Trainer(make(request), tmp_path / "resumed").run(stop_at_step=2)
    resumed = Trainer(make(request), tmp_path / "resumed")
    assert resumed.step == 2
    resumed.run()
    assert read_losses(tmp_path / "resumed") == pytest.approx(read_losses(tmp_path / "uninterrupted"), abs=1e-6)
    assert len(read_losses(tmp_path / "uninterrupted")) == STEPS
