"""The benchmark of the start reads what the commands print, in a terminal with colours."""

import io
import re
import time

import pytest
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import startup
from omnivideo import Studio
from omnivideo.cli import app as cli_app
from omnivideo.cli.chat import TerminalChat
from omnivideo.cli.main import app
from omnivideo.cli.turn_display import TurnDisplay
from omnivideo.contracts import Artifact, StepProgress
from omnivideo.turns import ArtifactReady


@pytest.fixture(scope="module")
def studio(weights, tmp_path_factory):
    return Studio(weights=weights, home=tmp_path_factory.mktemp("home"))


@pytest.fixture
def terminal(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(cli_app, "console", console)
    monkeypatch.setattr(cli_app, "error_console", console)
    return console


def find(pattern: str, console: Console) -> bool:
    return re.search(pattern, startup.TERMINAL_CODES.sub("", console.file.getvalue())) is not None


def test_the_answer_and_the_first_step_of_generate_are_recognised(studio, terminal, tmp_path):
    with cli_app.show_step_progress("denoising") as show_step:
        assert not find(startup.FIRST_STEP, terminal)
        show_step(StepProgress(step=1, steps=40, eta_seconds=1))
        time.sleep(0.3)  # the bar is drawn ten times a second
        assert find(startup.FIRST_STEP, terminal) and not find(startup.ANSWER, terminal)
    cli_app.save_result(studio.generate("a red circle", image=False, steps=1), tmp_path / startup.OUTPUT)
    assert find(startup.ANSWER, terminal)


def test_the_beginning_and_the_clip_of_a_chat_are_recognised(studio, terminal, tmp_path):
    chat = TerminalChat(studio, studio.conversations.open_thread(), terminal)
    assert not find(startup.THREAD, terminal)
    chat.run([])
    assert find(startup.THREAD, terminal) and not find(startup.CHAT_CLIP, terminal)
    artifact = Artifact(
        key="k.mp4", medium="video", width=64, height=64, frames=9, fps=8, caption="a red circle", created_by="job"
    )
    TurnDisplay(terminal, lambda artifact: tmp_path / artifact.key).show(ArtifactReady(artifact=artifact))
    assert find(startup.CHAT_CLIP, terminal)


def test_the_help_is_recognised():
    assert re.search(startup.HELP, CliRunner().invoke(app, ["--help"]).output)
