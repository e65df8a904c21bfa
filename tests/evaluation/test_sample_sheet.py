"""Samples drawn while a model trains: what is drawn with, what is scored, and that training does not notice."""

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
from omnivideo.evaluation import sample_sheet as looking
from omnivideo.synthetic.rendering import render_scene
from omnivideo.training.config import TrainingConfig
from omnivideo.training.engine.monitor import OVERALL_SCORE, all_parts_on_one_device, build_sample_hook
from omnivideo.training.engine.run import RunContext
from omnivideo.training.engine.trainer import Trainer
from omnivideo.training.tiny.pipeline import TinyPipeline
from tests.training.test_training import logged, stage2a_recipe, stage3_recipe, toy


def few(preset, **changes):
    """The preset with one step of denoising."""
    sampling = {task: chosen.model_copy(update={"steps": 1}) for task, chosen in preset.sampling.items()}
    return preset.model_copy(update={"sampling": sampling} | changes)


@pytest.fixture
def drawing(omni, monkeypatch):
    """The untrained model, which draws little and quickly."""
    monkeypatch.setattr(looking, "SAMPLES_PER_KIND", 2)
    monkeypatch.setattr(omni, "preset", few(omni.preset))
    return omni


@pytest.mark.parametrize("make", [stage2a_recipe, stage3_recipe], ids=lambda make: make.__name__)
def test_training_does_not_notice(make, request, drawing, tmp_path):
    plain, looked = Trainer(make(request), tmp_path / "plain"), Trainer(make(request), tmp_path / "looked")
    plain.run(stop_at_step=4)
    looked.run(stop_at_step=4, sample_hook=build_sample_hook(2, looking.render_sample_sheet))
    assert logged(tmp_path / "looked") == logged(tmp_path / "plain")
    for one, two in ((plain.recipe.model.state_dict(), looked.recipe.model.state_dict()),
                     (plain.ema_weights, looked.ema_weights)):  # fmt: skip
        assert one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())
    lines = [json.loads(line) for line in (tmp_path / "looked" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "samples correct" in line] == [2, 4]
    kinds = ("stills", "clips", "stills edited", "clips edited")
    assert all(0 <= lines[1][f"{kind} correct"] <= 1 for kind in kinds)
    assert lines[1][OVERALL_SCORE] == pytest.approx(sum(lines[1][f"{kind} correct"] for kind in kinds) / 4, abs=1e-6)
    sheets = sorted((tmp_path / "looked" / "samples").iterdir())
    assert [sheet.name for sheet in sheets] == ["00000002.png", "00000004.png"]
    with Image.open(sheets[0]) as first, Image.open(sheets[1]) as second:
        assert first.size == second.size and first.tobytes() != second.tobytes()


def test_what_is_drawn_with_is_the_average_and_all_is_put_back(request, tmp_path):
    recipe = stage3_recipe(request)
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


def test_what_is_right_is_scored(drawing, tmp_path, monkeypatch):
    monkeypatch.setattr(
        looking, "apply_edits", lambda omni, edits, video, seed: np.stack([render_scene(one.target) for one in edits])
    )
    scores = looking.render_sample_sheet(drawing, tmp_path / "new" / "sheet.png")
    assert scores["stills edited correct"] == scores["clips edited correct"] == 1
    assert scores["stills correct"] < 1 and scores["clips correct"] < 1  # of an untrained model
    assert looking.render_sample_sheet(drawing, None) == {}


def test_another_world_is_drawn_and_not_scored(omni, tmp_path, monkeypatch):
    monkeypatch.setattr(omni, "preset", few(omni.preset, name="another", has_scorer=False))
    assert looking.render_sample_sheet(omni, tmp_path / "sheet.png") == {}
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height < 300  # a still and a clip of 64 px


def test_parts_that_lie_elsewhere_come_and_go_back(drawing, monkeypatch):
    """As on a GPU the VAE does, which training over shards leaves on the CPU; here it lies on the meta device."""
    vae = torch.nn.Linear(2, 2, device="meta")
    moves = []
    monkeypatch.setattr(vae, "to", moves.append)
    monkeypatch.setattr(drawing, "vae", vae)
    with pytest.raises(RuntimeError, match="out of memory"), all_parts_on_one_device(drawing):
        assert moves == [torch.device("cpu")]
        raise RuntimeError("out of memory")
    assert moves == [torch.device("cpu"), torch.device("meta")]


def test_recipes_that_draw_nothing_are_refused(weights, tmp_path):
    for name in ("vae", "text", "mllm", "decoder", "stage1", "stage1_text"):
        with pytest.raises(InvalidInput, match=f"sample-every: {name} generates no samples; allowed with stage2a, "):
            config = TrainingConfig(recipe=name, runs=tmp_path / "runs", sample_every=1)
            TinyPipeline(RunContext(config), shipped_weights=weights).train()
    assert not (tmp_path / "runs").exists()
    assert (
        build_sample_hook(1, looking.render_sample_sheet)(Trainer(toy(), tmp_path / "toy")) == {}
    )  # one among all of tiny's


# ---------------------------------------------------------------- the run's own records


def test_points_after_the_checkpoint_are_not_shown_twice(tmp_path, monkeypatch):
    """A run that was killed after step 6 goes on from its checkpoint at step 3."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out, folder = Console(file=io.StringIO()), tmp_path / "toy"

    def train_until(step: int) -> None:
        config = TrainingConfig(recipe="toy", runs=tmp_path, log_to=["tensorboard"], stop_at_step=step)
        RunContext(config, console=out).train_recipe(toy())

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


class Service:
    """In the place of the library wandb: notes what each run is opened as."""

    def __init__(self):
        self.opened = []

    def init(self, **given):
        self.opened.append(given)
        return self

    def log(self, figures, step): ...


def test_a_run_goes_on_under_its_own_id(tmp_path, monkeypatch):
    service = Service()
    monkeypatch.setitem(sys.modules, "wandb", service)
    for folder in ("one", "two", "one"):
        config = TrainingConfig(recipe="toy", runs=tmp_path / folder, log_to=["wandb"], stop_at_step=1)
        RunContext(config, console=Console(file=io.StringIO())).train_recipe(toy())
    ids = [given["id"] for given in service.opened]
    assert ids[0] == ids[2] != ids[1] and all(given["name"] == "toy" for given in service.opened)


def test_checkpoints_come_as_often_as_is_said(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(Trainer, "save", lambda trainer: saved.append(trainer.step))
    for seconds in (0.0, 120.0):
        config = TrainingConfig(recipe="toy", runs=tmp_path / str(seconds), stop_at_step=3, save_every=seconds)
        RunContext(config, console=Console(file=io.StringIO())).train_recipe(toy())
    assert saved == [1, 2, 3, 3, 3]
