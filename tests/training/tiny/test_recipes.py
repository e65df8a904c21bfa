"""Every recipe of the tiny preset trains, saves a checkpoint, and resumes from it with the same losses."""

import pytest

from omnivideo.training.engine.trainer import Trainer
from tests.support.recipes import RECIPES, STEPS, logged


@pytest.mark.parametrize("make", RECIPES, ids=lambda make: make.__name__)
def test_resume_gives_the_same_losses(make, request, tmp_path):
    Trainer(make(request), tmp_path / "whole").run()
    Trainer(make(request), tmp_path / "cut").run(stop_at_step=2)
    resumed = Trainer(make(request), tmp_path / "cut")
    assert resumed.step == 2
    resumed.run()
    assert logged(tmp_path / "cut") == pytest.approx(logged(tmp_path / "whole"), abs=1e-6)
    assert len(logged(tmp_path / "whole")) == STEPS
