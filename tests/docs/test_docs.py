"""The README's examples run unchanged, with random weights in place of the shipped ones and with few steps."""

import io
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from omnivideo.cli.main import main
from omnivideo.models.weights import shipped as shipped_weights
from omnivideo.presets import PRESETS, TINY
from omnivideo.sdk.batch_items import BatchItem

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
LONG = ("evaluate", "train")  # other tests run them


@pytest.fixture(autouse=True)
def shipped(monkeypatch, weights, tmp_path):
    """Return a working folder, with the weights where the package ships them."""
    steps = {task: chosen.model_copy(update={"steps": 1}) for task, chosen in TINY.sampling.items()}
    monkeypatch.setitem(PRESETS, "tiny", TINY.model_copy(update={"sampling": steps}))
    monkeypatch.setattr(shipped_weights, "SHIPPED_WEIGHTS_FOLDER", weights.parent)
    monkeypatch.setenv("OMNIVIDEO_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def test_command_lines_run(monkeypatch, tmp_path):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.setattr(sys, "stdin", io.StringIO("a red ball\n/history\n"))
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("omnivideo ")]
    commands = [shlex.split(line, comments=True) for line in lines]
    assert {command[1] for command in commands} >= {
        "generate", "edit", "understand", "chat", "batch", "evaluate", "train", "doctor"
    }  # fmt: skip
    for command in commands:
        if command[1] not in LONG:
            monkeypatch.setattr(sys, "argv", command)
            with pytest.raises(SystemExit) as caught:
                main()
            assert not caught.value.code, command
    assert (tmp_path / "clip.mp4").exists() and (tmp_path / "blue.mp4.json").exists()
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 2


def test_the_command_lines_of_the_guide_run(monkeypatch, tmp_path):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    page = (ROOT / "docs" / "cli.md").read_text()
    lines = re.findall(r"^omnivideo .*$", "\n".join(re.findall(r"```bash\n(.*?)```", page, flags=re.S)), flags=re.M)
    assert len(lines) == 4
    for line in lines:
        monkeypatch.setattr(sys, "stdin", io.StringIO("a red ball\n/threads\n"))
        monkeypatch.setattr(sys, "argv", shlex.split(line, comments=True))
        with pytest.raises(SystemExit) as caught:
            main()
        assert not caught.value.code, line
    fields = {
        name for row in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", page, flags=re.M) for name in re.findall(r"\w+", row)
    }
    assert fields == set(BatchItem.model_fields)


def test_python_examples_run(tmp_path):
    (block,) = blocks("python")
    exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "clip.mp4").exists()


def test_the_demo_runs(tmp_path):
    """With untrained weights the results may be wrong; every request that is no question makes a clip."""
    from rich.console import Console

    from omnivideo.backends.mllm.local import LocalMLLM
    from omnivideo.cli.demo import DEMO_TURNS
    from omnivideo.cli.demo import run_demo as demo
    from omnivideo.contracts import Route
    from omnivideo.sdk.studio import Studio

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalMLLM, "route", lambda self, ask: Route(kind="video", probability=0.9))
        shown = io.StringIO()
        demo(tmp_path / "demo", Console(file=shown, width=200), Studio(home=tmp_path / "talk"))
    made = {path.name for path in (tmp_path / "demo").iterdir()}
    clips = {f"{number}.mp4" for number, turn in enumerate(DEMO_TURNS, start=1) if not turn.text.endswith("?")}
    assert len(clips) == 7 and made == clips | {"contact-sheet.png"}
    assert f"of {len(DEMO_TURNS)} turns right" in shown.getvalue()


def test_links_and_modules_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for name in re.findall(r"^\| `(omnivideo/[a-z/]*?)`", README, flags=re.M):
        assert (ROOT / name).exists(), name
