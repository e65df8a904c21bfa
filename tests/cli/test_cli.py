"""The command line with random weights: the files that it writes, and its messages for invalid input."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

from omnivideo import Studio, __version__
from omnivideo.cli.app import collect_overrides
from omnivideo.cli.main import main
from omnivideo.contracts import TASKS
from omnivideo.errors import CheckpointError, InvalidInput
from omnivideo.evaluation.report import TARGET_SCORES
from omnivideo.media.read import read_media
from omnivideo.media.write import write_media
from omnivideo.presets import PRESETS, TINY
from omnivideo.synthetic.rendering import render_scene
from omnivideo.synthetic.requests import CONTINUATION_TASKS
from omnivideo.synthetic.scenes import stream_scenes
from omnivideo.training.config import SHARD_RECIPES, TINY_RECIPES, TrainingConfig
from omnivideo.training.engine import progress_bar
from omnivideo.training.engine.monitor import skip_samples
from omnivideo.training.engine.run import RunContext
from omnivideo.training.recipes.over_shards import PREVIOUS_STAGE
from omnivideo.training.tiny.pipeline import TinyPipeline
from tests.support.continuations import declare_everywhere

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_cli(monkeypatch, capsys):
    """Return a function that runs a command line and returns its exit code, stdout and stderr."""

    def run(*args) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["omnivideo", *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            main()
        printed = capsys.readouterr()
        return caught.value.code or 0, printed.out, printed.err

    return run


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "source.mp4"
    write_media(path, render_scene(next(stream_scenes(3, True))), 8)
    return path


@pytest.fixture
def still(tmp_path):
    path = tmp_path / "source.png"
    write_media(path, render_scene(next(stream_scenes(3, False))), 8)
    return path


def test_generate_edit_and_understand_write_their_results(run_cli, weights, tmp_path):
    clip, changed, still = tmp_path / "clip.mp4", tmp_path / "changed.mp4", tmp_path / "still.png"
    assert run_cli("generate", "a red circle", "--video", "--steps", 2, "--weights", weights, "-o", clip)[0] == 0
    media = read_media(clip)
    assert media.frames.shape == (9, 64, 64, 3) and media.fps == 8
    manifest = json.loads((tmp_path / "clip.mp4.json").read_text())
    assert manifest["prompt"] == "a red circle" and manifest["task"] == "text-to-video"
    assert manifest["settings"]["steps"] == 2 and manifest["weights"] and manifest["versions"]["torch"]
    assert set(manifest["seconds"]) >= {"condition", "denoising", "decoding"}
    assert run_cli("edit", clip, "make it blue", "--steps", 2, "--weights", weights, "-o", changed)[0] == 0
    assert json.loads((tmp_path / "changed.mp4.json").read_text())["task"] == "video-editing"
    assert run_cli("generate", "a red circle", "--steps", 2, "--weights", weights, "-o", still)[0] == 0
    assert read_media(still).kind == "image"
    code, text, _ = run_cli("understand", still, "what is it?", "--weights", weights)
    assert code == 0 and text.strip()


def test_animate_and_extend_write_their_results(run_cli, weights, still, tmp_path):
    clip, longer, options = tmp_path / "clip.mp4", tmp_path / "longer.mp4", ("--steps", 1, "--weights", weights, "-o")
    with declare_everywhere():
        code, _, err = run_cli("animate", still, "it moves", "--last-image", still, *options, clip)
        assert code == 0, err
        assert json.loads((tmp_path / "clip.mp4.json").read_text())["task"] == "keyframes-to-video"
        code, _, err = run_cli("extend", clip, "it goes on", "--frames", 5, *options, longer)
        assert code == 0, err
    assert len(read_media(longer).frames) == 14


@pytest.mark.parametrize("command", ["animate", "extend"])
def test_what_the_weights_cannot_do_is_refused_before_they_are_loaded(run_cli, weights, still, clip, tmp_path, command):
    source = {"animate": still, "extend": clip}[command]
    code, _, err = run_cli(command, source, "a", "--weights", weights, "-o", tmp_path / "a.mp4")
    assert code == 2 and "preset: tiny cannot do" in err and "its tasks are text-to-video, video-editing" in err


def test_a_seed_determines_every_byte(run_cli, weights, tmp_path):
    for name, seed in (("a.mp4", 5), ("b.mp4", 5), ("c.mp4", 6)):
        code, _, err = run_cli(
            "generate", "a star", "--video", "--steps", 2, "--seed", seed, "--weights", weights, "-o", tmp_path / name
        )
        assert code == 0, err
    one, two, other = ((tmp_path / name).read_bytes() for name in ("a.mp4", "b.mp4", "c.mp4"))
    assert one == two != other


GENERATE = ("generate", "a red circle", "--video")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("generate", "   ", "-o", "x.mp4"), "prompt: it is empty"),
        (("generate", "x" * 5000, "-o", "x.mp4"), "prompt: it has 5000 characters"),
        ((*GENERATE, "-o", "missing/x.mp4"), "output:"),
        ((*GENERATE, "-o", "x.txt"), "output:"),
        ((*GENERATE, "-o", "x.png"), "output:"),
        ((*GENERATE, "--size", "65x64", "-o", "x.mp4"), "width: 65 is odd; a clip has even sides"),
        ((*GENERATE, "--size", "big", "-o", "x.mp4"), "size: 'big' is not of the form"),
        ((*GENERATE, "--size", "99999x64", "-o", "x.mp4"), "width: allowed: 16 to 4096"),
        (
            (*GENERATE, "--frames", "10", "-o", "x.mp4"),
            "frames: 10 is more than this model was trained",
        ),
        ((*GENERATE, "--frames", "-1", "-o", "x.mp4"), "frames: allowed: 2 to 9"),
        ((*GENERATE, "--frames", "500", "-o", "x.mp4"), "frames: allowed: 2 to 9"),
        ((*GENERATE, "--steps", "0", "-o", "x.mp4"), "steps: allowed: 1 to 200"),
        ((*GENERATE, "--guidance-scale", "nan", "-o", "x.mp4"), "guidance_scale:"),
        ((*GENERATE, "--seed", "-3", "-o", "x.mp4"), "seed: allowed: 0 to 9223372036854775807"),
        ((*GENERATE, "--preset", "giant", "-o", "x.mp4"), "preset: 'giant' is not one of tiny"),
        ((*GENERATE, "--weights", "nowhere", "-o", "x.mp4"), "model_index.json"),
        (("edit", "nowhere.mp4", "make it blue", "-o", "x.mp4"), "source:"),
        (("understand", "nowhere.mp4", "what is it?"), "source:"),
        (("train", "nothing"), "recipe: 'nothing' is not one of"),
        (("train", "stage1", "--sample-every", "9"), "sample-every: stage1 generates no samples"),
    ],
)
def test_invalid_input_is_refused_in_one_line_with_exit_code_2(run_cli, monkeypatch, tmp_path, args, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = run_cli(*args)
    assert code == 2
    assert message in err
    assert "Traceback" not in err and str(tmp_path) not in err and len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_training_options_reach_the_run(run_cli, monkeypatch, tmp_path):
    captured = []
    monkeypatch.setattr(TinyPipeline, "train", lambda tiny: captured.append(tiny.run))
    assert run_cli("train", "stage3", "--runs", str(tmp_path), "--save-every", "600", "--sample-every", "50")[0] == 0
    assert run_cli("train", "stage3", "--runs", str(tmp_path))[0] == 0
    assert [run.config.save_every for run in captured] == [600, 120]
    assert [run.config.sample_every for run in captured] == [50, None]
    assert captured[0].sample_hook is not captured[1].sample_hook is skip_samples
    assert (
        run_cli("train", "stage3", "--sample-every", "0")[0] == run_cli("train", "stage3", "--save-every", "-1")[0] == 2
    )


def test_sources_that_are_not_media_are_refused(run_cli, tmp_path, monkeypatch, clip):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    with (tmp_path / "huge.mp4").open("wb") as file:
        file.truncate(10 * 2**30)
    for name in ("text.mp4", "cut.mp4", "huge.mp4"):
        code, _, err = run_cli("edit", name, "make it blue", "-o", "x.mp4")
        assert code == 2 and err.startswith("error: source:") and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "x.mp4").exists()


def test_a_prompt_too_long_for_the_text_encoder_is_refused_before_any_step(weights):
    studio = Studio(weights=weights)
    steps = []
    with pytest.raises(InvalidInput, match="tokens"):
        studio.generate("a red circle and " * 40, image=True, on_step=steps.append)
    assert steps == []


def test_the_sdk_reports_every_step(weights, still):
    studio = Studio(weights=weights)
    captured = []
    result = studio.edit(still, "make it blue", steps=3, on_step=captured.append)
    assert [(step.step, step.steps) for step in captured] == [(1, 3), (2, 3), (3, 3)]
    assert result.frames.shape == (1, 64, 64, 3) and result.frames.dtype == np.uint8


def test_a_preset_without_weights_is_refused():
    with pytest.raises(CheckpointError, match="no weights are shipped"):
        Studio("omnivideo-1.3b")


def test_a_source_of_another_size_is_resized(weights, tmp_path):
    path = tmp_path / "wide.jpg"
    Image.fromarray(np.full((90, 160, 3), 200, dtype=np.uint8)).save(path)
    assert Studio(weights=weights).edit(path, "make it blue", steps=1).frames.shape == (1, 64, 64, 3)


def run_program(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, env=variables)


def test_the_version_and_short_help(run_cli):
    assert run_cli("--version")[:2] == (0, f"omnivideo {__version__}\n")
    for command in ((), ("generate",), ("mllm", "serve"), ("data", "pack")):
        code, text, _ = run_cli(*command, "-h")
        assert code == 0 and text.lstrip().startswith("Usage: ") and "--help" in text, command


def test_the_package_runs_as_a_module():
    completed = run_program("-m", "omnivideo", "--version")
    assert completed.returncode == 0 and completed.stdout == f"omnivideo {__version__}\n", completed.stderr


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("mllm serve --engine transformers", "fastapi"),
        ("mllm serve --engine transformers", "uvicorn"),
        ("serve", "sse_starlette"),
    ],
)
def test_a_server_on_a_base_installation_names_the_missing_extra(command, missing):
    """Before a model is loaded, and without a traceback."""
    words = ["omnivideo", *command.split()]
    code = (
        f"import sys; sys.modules[{missing!r}] = None; sys.argv = {words}\nimport omnivideo.cli.main as cli; cli.main()"
    )
    completed = run_program("-c", code)
    lines = completed.stderr.strip().splitlines()
    assert completed.returncode == 2 and "pip install 'omnivideo[serve" in lines[-1], completed.stderr
    assert "Traceback" not in completed.stderr


def test_recipes_are_listed(run_cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    listed = run_cli("train", "--help")[1]
    names = TinyPipeline(RunContext(TrainingConfig(recipe="tiny"))).recipe_factories
    assert tuple(names) == TINY_RECIPES and tuple(PREVIOUS_STAGE) == SHARD_RECIPES
    assert ", ".join(TINY_RECIPES) in " ".join(listed.split())


def test_progress_in_a_file_is_printed_as_lines(monkeypatch):
    """One every few seconds, and the last one, also where the run ends early."""
    output = io.StringIO()
    monkeypatch.setattr(progress_bar, "LINE_SECONDS", 0.0)
    columns = (TextColumn("stage1"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with progress_bar.LoggedProgress(*columns, console=Console(file=output, width=40)) as bar:
        row = bar.add_task("", total=3)
        bar.update(row, completed=1, description="loss 0.5")
        monkeypatch.setattr(progress_bar, "LINE_SECONDS", 100.0)
        bar.update(row, completed=2, description=f"loss 0.4 {'x' * 40}")
    assert output.getvalue().splitlines() == ["stage1  1/3  loss 0.5", f"stage1  2/3  loss 0.4 {'x' * 40}"]


def test_tracked_progress_in_a_file_is_printed_as_lines(monkeypatch):
    """A batch in a log shows each line as it ends, not only the first."""
    output = io.StringIO()
    monkeypatch.setattr(progress_bar, "LINE_SECONDS", 0.0)
    with progress_bar.LoggedProgress(MofNCompleteColumn(), console=Console(file=output, width=40)) as bar:
        for _ in bar.track(iter("abc"), total=3):
            pass
    assert output.getvalue().splitlines() == ["1/3", "2/3", "3/3"]


def test_a_batch_says_why_its_file_cannot_be_read(run_cli, tmp_path):
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xff")
    for name, problem in (("none.txt", "No such file or directory"), ("binary.txt", "as text")):
        code, _, err = run_cli("batch", str(tmp_path / name), "-o", str(tmp_path / "out"))
        assert code == 2 and err.startswith("error: prompts: ") and problem in err and name in err


def test_importing_loads_no_heavy_library():
    """Importing omnivideo and its command line loads no model or server library."""
    heavy_libraries = ("torch", "diffusers", "fastapi")
    code = (
        f"import sys, omnivideo, omnivideo.cli.main; print([name for name in {heavy_libraries} if name in sys.modules])"
    )
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert completed.stdout.strip() == "[]"


def test_evaluate_scores_every_category(run_cli, weights, tmp_path, monkeypatch):
    """With random weights, check that the whole suite runs and writes its scores, not their values."""
    steps = {task: params.model_copy(update={"steps": 1}) for task, params in TINY.sampling.items()}
    monkeypatch.setitem(PRESETS, "tiny", TINY.model_copy(update={"sampling": steps}))
    code, text, err = run_cli(
        "evaluate", "tiny", "--count", 2, "--weights", weights, "--report", tmp_path / "scores.json",
        "--sheets", tmp_path / "sheets",
    )  # fmt: skip
    assert code == 0, err
    drawn = {path.stem for path in (tmp_path / "sheets").iterdir()}
    assert drawn == {*TASKS, *CONTINUATION_TASKS, "long-clips"}
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert set(TARGET_SCORES) <= set(scores)
    assert scores["single"]["count"] == 2 and "colour attribution" in text


def test_only_the_options_that_are_given_reach_the_studio():
    assert collect_overrides(seed=0, steps=None) == {"seed": 0}
    assert collect_overrides("64x48", seed=1, fps=None) == {"width": 64, "height": 48, "seed": 1}
