"""Samples generated during training: their weights and scores, and that training is not affected."""

import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from omnivideo.errors import InvalidInput
from omnivideo.evaluation import sample_sheet
from omnivideo.evaluation.editing import sample_held_out_edits
from omnivideo.synthetic.rendering import render_scene
from omnivideo.training.config import TrainingConfig
from omnivideo.training.engine.monitor import OVERALL_SCORE, all_parts_on_one_device, build_sample_hook
from omnivideo.training.engine.run import RunContext
from omnivideo.training.engine.trainer import Trainer
from omnivideo.training.tiny.pipeline import TinyPipeline
from tests.support.recipes import make_stage2a_recipe, make_stage3_recipe, make_toy_recipe, read_losses


def use_one_step(preset, **changes):
    """Return the preset with one denoising step."""
    sampling = {task: params.model_copy(update={"steps": 1}) for task, params in preset.sampling.items()}
    return preset.model_copy(update={"sampling": sampling} | changes)


@pytest.fixture
def fast_model(omni, monkeypatch):
    """Return the untrained model, with few samples and one denoising step."""
    monkeypatch.setattr(sample_sheet, "SAMPLES_PER_KIND", 2)
    monkeypatch.setattr(omni, "preset", use_one_step(omni.preset))
    return omni


@pytest.mark.parametrize("make", [make_stage2a_recipe, make_stage3_recipe], ids=lambda make: make.__name__)
def test_generating_samples_does_not_change_training(make, request, fast_model, tmp_path):
    plain, sampled = Trainer(make(request), tmp_path / "plain"), Trainer(make(request), tmp_path / "sampled")
    plain.run(stop_at_step=4)
    sampled.run(stop_at_step=4, sample_hook=build_sample_hook(2, sample_sheet.render_sample_sheet))
    assert read_losses(tmp_path / "sampled") == read_losses(tmp_path / "plain")
    for one, two in ((plain.recipe.model.state_dict(), sampled.recipe.model.state_dict()),
                     (plain.ema_weights, sampled.ema_weights)):  # fmt: skip
        assert one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())
    lines = [json.loads(line) for line in (tmp_path / "sampled" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "samples correct" in line] == [2, 4]
    kinds = ("stills", "clips", "stills edited", "clips edited")
    assert all(0 <= lines[1][f"{kind} correct"] <= 1 for kind in kinds)
    assert lines[1][OVERALL_SCORE] == pytest.approx(sum(lines[1][f"{kind} correct"] for kind in kinds) / 4, abs=1e-6)
    sheets = sorted((tmp_path / "sampled" / "samples").iterdir())
    assert [sheet.name for sheet in sheets] == ["00000002.png", "00000004.png"]
    with Image.open(sheets[0]) as first, Image.open(sheets[1]) as second:
        assert first.size == second.size and first.tobytes() != second.tobytes()


def test_samples_use_the_average_and_the_training_state_is_restored(request, tmp_path):
    recipe = make_stage3_recipe(request)
    trainer = Trainer(recipe, tmp_path)
    recipe.model.bridge.train()
    for _ in range(2):
        trainer.train_step()
    before = {name: weight.clone() for name, weight in trainer.weights.items()}
    modes = [part.training for part in recipe.model.modules()]
    random = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="out of memory"), trainer.evaluation_mode():
        assert all(torch.equal(weight, trainer.ema_weights[name]) for name, weight in trainer.weights.items())
        assert any(not torch.equal(weight, before[name]) for name, weight in trainer.weights.items())
        assert not torch.is_grad_enabled() and not any(part.training for part in recipe.model.modules())
        torch.rand(3)
        raise RuntimeError("out of memory")
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.weights.items())
    assert [part.training for part in recipe.model.modules()] == modes and torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), random)


def test_correct_samples_are_scored(fast_model, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sample_sheet,
        "apply_edits",
        lambda omni, instructions, sources, seed, think: np.stack(
            [render_scene(edit.target) for edit in sample_held_out_edits(len(sources), len(sources[0]) > 1)]
        ),
    )
    scores = sample_sheet.render_sample_sheet(fast_model, tmp_path / "new" / "sheet.png")
    assert scores["stills edited correct"] == scores["clips edited correct"] == 1
    assert scores["stills correct"] < 1 and scores["clips correct"] < 1  # because the model is untrained
    assert sample_sheet.render_sample_sheet(fast_model, None) == {}


def test_a_preset_without_a_scorer_has_samples_without_scores(omni, tmp_path, monkeypatch):
    monkeypatch.setattr(omni, "preset", use_one_step(omni.preset, name="another", has_scorer=False))
    assert sample_sheet.render_sample_sheet(omni, tmp_path / "sheet.png") == {}
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height < 300  # an image and a clip of 64 px


def test_parts_on_another_device_are_moved_and_moved_back(fast_model, monkeypatch):
    """Training over shards on a GPU leaves the VAE on the CPU; here, the VAE is on the meta device."""
    vae = torch.nn.Linear(2, 2, device="meta")
    moves = []
    monkeypatch.setattr(vae, "to", moves.append)
    monkeypatch.setattr(fast_model, "vae", vae)
    with pytest.raises(RuntimeError, match="out of memory"), all_parts_on_one_device(fast_model):
        assert moves == [torch.device("cpu")]
        raise RuntimeError("out of memory")
    assert moves == [torch.device("cpu"), torch.device("meta")]


def test_recipes_without_samples_are_refused(weights, tmp_path):
    for name in ("vae", "text", "mllm", "decoder", "stage1", "stage1_text"):
        with pytest.raises(InvalidInput, match=f"sample-every: {name} generates no samples; allowed with stage2a, "):
            config = TrainingConfig(recipe=name, runs=tmp_path / "runs", sample_every=1)
            TinyPipeline(RunContext(config), shipped_weights=weights).train()
    assert not (tmp_path / "runs").exists()
    assert (
        build_sample_hook(1, sample_sheet.render_sample_sheet)(Trainer(make_toy_recipe(), tmp_path / "toy")) == {}
    )  # as one of all recipes of the tiny preset


# ---------------------------------------------------------------- logging and checkpoints


def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path, monkeypatch):
    """A run that was killed after step 6 resumes from its checkpoint at step 3."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out, folder = Console(file=io.StringIO()), tmp_path / "toy"

    def train_until(step: int) -> None:
        config = TrainingConfig(recipe="toy", runs=tmp_path, log_to=["tensorboard"], stop_at_step=step)
        RunContext(config, console=out).train_recipe(make_toy_recipe())

    train_until(3)
    shutil.copy(folder / "state.pt", tmp_path / "kept")
    train_until(6)
    shutil.move(tmp_path / "kept", folder / "state.pt")
    monkeypatch.setattr(RunContext, "sample_hook", property(lambda run: lambda trainer: {"samples correct": 0.5}))
    train_until(8)
    found = events.EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [point.step for point in found.Scalars("loss")] == list(range(1, 9))
    assert [point.step for point in found.Scalars("samples correct")] == list(range(4, 9))
    assert "samples correct 0.5" in out.file.getvalue()


class FakeWandb:
    """Replace the wandb library and record the arguments of each run."""

    def __init__(self):
        self.opened = []

    def init(self, **arguments):
        self.opened.append(arguments)
        return self

    def log(self, figures, step): ...


def test_a_resumed_run_keeps_its_wandb_id(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for folder in ("one", "two", "one"):
        config = TrainingConfig(recipe="toy", runs=tmp_path / folder, log_to=["wandb"], stop_at_step=1)
        RunContext(config, console=Console(file=io.StringIO())).train_recipe(make_toy_recipe())
    ids = [arguments["id"] for arguments in wandb.opened]
    assert ids[0] == ids[2] != ids[1] and all(arguments["name"] == "toy" for arguments in wandb.opened)


def test_checkpoints_are_saved_at_the_configured_interval(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(Trainer, "save", lambda trainer: saved.append(trainer.step))
    for seconds in (0.0, 120.0):
        config = TrainingConfig(recipe="toy", runs=tmp_path / str(seconds), stop_at_step=3, save_every=seconds)
        RunContext(config, console=Console(file=io.StringIO())).train_recipe(make_toy_recipe())
    assert saved == [1, 2, 3, 3, 3]
