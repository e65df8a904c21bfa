"""The stages of the paper: the parameters that each one trains, and its FLOPs."""

import pytest
import torch

from omnivideo.training.engine.trainer import Trainer
from tests.support.recipes import (
    STAGES,
    count_flops,
    make_stage1_recipe,
    make_stage2a_recipe,
    make_stage2b_generation_recipe,
    make_stage2b_recipe,
    make_stage3_recipe,
)


@pytest.mark.parametrize("make", STAGES, ids=lambda make: make.__name__)
def test_each_stage_trains_the_parts_that_the_paper_names(make, request, tmp_path):
    """Check which parameters are trainable, and that every named part and nothing else changes."""
    recipe = make(request)
    before = {key: value.clone() for key, value in recipe.model.state_dict().items()}
    trainer = Trainer(recipe, tmp_path)
    trainer.run()
    # The first sub-stage has no sources, so the visual context is trainable but does not change.
    trainable = STAGES[make] | ({"bridge.visual_context"} if make is make_stage2b_generation_recipe else set())
    expected = {key for key in before if any(key.startswith(f"{part}.") for part in trainable)}
    assert {name for name, _ in trainer.trainable_parameters} == expected
    changed = {key for key, value in recipe.model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed <= expected
    for part in STAGES[make]:
        assert any(key.startswith(f"{part}.") for key in changed), part


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("make", [make_stage1_recipe, make_stage2a_recipe, make_stage2b_recipe, make_stage3_recipe])
def test_the_flops_of_a_step_agree_with_torchs_counter(make, step, request, tmp_path):
    """The tolerance covers frozen first layers, whose backward pass is cheaper, and causal attention, half counted."""
    recipe = make(request)
    Trainer(recipe, tmp_path)
    tolerance = 0.005 if make is make_stage3_recipe else 0.03
    counted = count_flops(recipe, step)
    assert recipe.step_flops(step) == pytest.approx(counted, rel=tolerance)
