"""The trainer: what it updates, logs and saves, and what it does when a loss is not finite."""

import io
import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from omnivideo.errors import CheckpointError, TrainingDiverged
from omnivideo.training.config import TrainingConfig
from omnivideo.training.engine.plots import plot_losses, read_curves
from omnivideo.training.engine.recipe import single_micro_batch
from omnivideo.training.engine.run import RunContext
from omnivideo.training.engine.trainer import Trainer, freeze_except
from tests.support.recipes import make_stage3_recipe, make_toy_recipe


def test_losses_in_bf16_are_close_to_those_in_fp32(request, tmp_path):
    losses = {}
    for precision in (torch.float32, torch.bfloat16):
        recipe = replace(make_stage3_recipe(request), precision=precision)
        losses[precision] = Trainer(recipe, tmp_path / str(precision)).train_step()["loss"]
        assert all(parameter.dtype == torch.float32 for parameter in recipe.model.parameters())
    assert losses[torch.bfloat16] != losses[torch.float32]
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.02)


def test_only_the_named_parameters_are_trained(tmp_path):
    recipe = make_toy_recipe(("1.",))
    before = {key: value.clone() for key, value in recipe.model.state_dict().items()}
    Trainer(recipe, tmp_path).run()
    after = recipe.model.state_dict()
    assert all(torch.equal(before[key], after[key]) == key.startswith("0.") for key in before)
    with pytest.raises(AssertionError, match="nothing"):
        freeze_except(recipe.model, ("nothing",))


def test_the_progress_of_what_is_prepared_is_printed(tmp_path):
    output = io.StringIO()
    run = RunContext(TrainingConfig(recipe="stage3", runs=tmp_path), console=Console(file=output, width=80))
    with run.show_preparation("features of text-to-image") as on_progress:
        for done in (32, 64, 32, 64):  # two passes over the same requests
            on_progress(done, 64)
    lines = output.getvalue().splitlines()
    assert len(lines) == 2 and all(line.startswith("features of text-to-image  64/64") for line in lines)


def test_the_loss_falls_and_is_plotted(tmp_path):
    Trainer(make_toy_recipe(), tmp_path).run()
    steps, values = read_curves(tmp_path / "log.jsonl")["loss"]
    assert len(steps) == 60 and values[-10:].mean() < 0.5 * values[:10].mean()
    plot_losses(tmp_path / "log.jsonl", tmp_path / "loss.png", "toy")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_a_checkpoint_with_other_parameters_is_refused(tmp_path):
    Trainer(make_toy_recipe(), tmp_path).run(stop_at_step=1)
    with pytest.raises(CheckpointError, match="different parameters"):
        Trainer(make_toy_recipe(("1.",)), tmp_path)


def test_a_truncated_log_is_repaired_on_resume(tmp_path):
    Trainer(make_toy_recipe(), tmp_path).run(stop_at_step=5)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 1.0}\n{"step": 7, "lo')
    Trainer(make_toy_recipe(), tmp_path).run(stop_at_step=8)
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == list(range(1, 9))


class InfiniteGradient(torch.autograd.Function):
    """Return the value unchanged, with an infinite gradient."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.inf


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [(lambda value: value * math.nan, "loss: nan"), (InfiniteGradient.apply, "gradient's norm: ")],
)
def test_a_loss_or_gradient_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(corrupt, message, tmp_path):
    Trainer(make_toy_recipe(), tmp_path).run(stop_at_step=2)
    recipe = make_toy_recipe()
    micro_batch_losses = single_micro_batch(lambda step: {"loss": corrupt(recipe.compute_losses(step)["loss"])})
    with pytest.raises(TrainingDiverged, match=f"{message}.* at step 3"):
        Trainer(replace(recipe, micro_batch_losses=micro_batch_losses), tmp_path).run(save_every_seconds=0)
    resumed = Trainer(make_toy_recipe(), tmp_path)
    assert resumed.step == 2 and all(weight.isfinite().all() for weight in resumed.weights.values())
