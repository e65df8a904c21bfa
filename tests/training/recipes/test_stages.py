"""The stages of the paper: the parameters that each one trains, and its FLOPs."""

import pytest
import torch

from omnivideo.training.engine.trainer import Trainer
from tests.support.recipes import (
    STAGES,
    operations,
    stage1_recipe,
    stage2a_recipe,
    stage2b_generation_recipe,
    stage2b_recipe,
    stage3_recipe,
)


@pytest.mark.parametrize("make", STAGES, ids=lambda make: make.__name__)
def test_each_stage_trains_what_the_paper_says(make, request, tmp_path):
    """By name, and in fact: every named part moves and nothing else does."""
    recipe = make(request)
    before = {key: value.clone() for key, value in recipe.model.state_dict().items()}
    trainer = Trainer(recipe, tmp_path)
    trainer.run()
    # The first sub-stage has no sources, so the visual context, though trainable, stays as it is.
    trainable = STAGES[make] | ({"bridge.visual_context"} if make is stage2b_generation_recipe else set())
    expected = {key for key in before if any(key.startswith(f"{part}.") for part in trainable)}
    assert {name for name, _ in trainer.trainable_parameters} == expected
    moved = {key for key, value in recipe.model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved <= expected
    for part in STAGES[make]:
        assert any(key.startswith(f"{part}.") for key in moved), part


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("make", [stage1_recipe, stage2a_recipe, stage2b_recipe, stage3_recipe])
def test_a_steps_operations_are_those_that_torch_counts(make, step, request, tmp_path):
    """Backwards some frozen first layers have less to do, and of causal attention half is counted."""
    recipe = make(request)
    Trainer(recipe, tmp_path)
    near = 0.005 if make is stage3_recipe else 0.03
    counted = operations(recipe, step)
    assert recipe.step_flops(step) == pytest.approx(counted, rel=near)
