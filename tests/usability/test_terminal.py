"""`omnivideo chat` and completion in a real terminal, with the shipped weights, as a person sees and uses them."""

import os
import sys
from pathlib import Path

import pytest

from tests.support.servers import program
from tests.support.terminal import Terminal

pytestmark = pytest.mark.timeout(900)  # on a busy machine a model takes half a minute to load
ROOT = Path(__file__).parents[2]
CHAT = [sys.executable, "-m", "omnivideo", "chat", "--steps", "6"]


def open_chat(folder: Path, *options: str, width: int = 80) -> Terminal:
    home = folder / "a-home-with-a-name-that-is-longer-than-most-terminals-are-wide"
    return Terminal([*CHAT, *options], folder, width, PYTHONPATH=str(ROOT), OMNIVIDEO_HOME=str(home))


def list_lines(screen: str) -> list[str]:
    return [line.rstrip() for line in screen.splitlines() if line.strip()]


def test_answers_and_whole_paths_are_visible_at_any_width(tmp_path):
    """An answer stays on the screen after a progress bar, on a line of its own; a path is not broken."""
    with open_chat(tmp_path, width=40) as terminal:
        terminal.wait_for("\n> ")
        for number, width in enumerate((40, 80, 200), start=1):
            terminal.resize(width)
            terminal.enter("a small red circle moving right and tell me how many circles there are")
            terminal.wait_for("video /", number)
            terminal.wait_for("\none", number)
        lines = list_lines(terminal.read_all())
    assert lines.count("one") == 3
    paths = [Path(line.removeprefix("video ")) for line in lines if line.startswith("video ")]
    assert len(paths) == 3 and all(path.is_file() for path in paths)
    assert not any("generating" in line for line in lines), "\n".join(lines)


def test_ctrl_c_cancels_the_turn_and_stays_in_the_chat(tmp_path):
    """The next message is answered, and does not run the cancelled request; at the prompt Ctrl-C drops the line."""
    with open_chat(tmp_path, "--steps", "200") as terminal:
        terminal.wait_for("\n> ")
        terminal.enter("a small red circle moving right")
        terminal.wait_for("generating")
        terminal.press("C-c")
        terminal.wait_for("cancelled; the thread is as it was")
        terminal.type("never sent")
        terminal.press("C-c")
        terminal.enter("help")
        terminal.wait_for("undo")
        terminal.enter("/history")
        terminal.wait_for("1 help")
        terminal.press("C-d")
        text = terminal.wait_for("to continue: omnivideo chat --thread ")
    assert "video /" not in text and "2 " not in text.partition("1 help")[2]


def test_a_paste_is_one_turn_and_the_history_comes_back(tmp_path):
    with open_chat(tmp_path) as terminal:
        terminal.wait_for("\n> ")
        terminal.paste("what did you\njust do?")
        terminal.press("Enter")
        terminal.enter("/history")
        terminal.wait_for("1 what did you\njust do?")
        terminal.type("/thre")
        terminal.press("Tab")
        terminal.wait_for("> /threads")
        terminal.press("Enter")
        terminal.wait_for("1 turn ")
        terminal.press("C-d")
        terminal.wait_for("to continue: ")
    with open_chat(tmp_path) as terminal:
        terminal.wait_for("\n> ")
        terminal.press("Up", "Up", "Up")
        terminal.wait_for("> what did you\njust do?")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_commands_and_options_are_completed(shell, tmp_path):
    path = program(shell, shell, f"completion in {shell} was not tested")
    bin_folder = Path(sys.executable).parent
    start = [path, "--norc", "--noprofile"] if shell == "bash" else [path, "-f"]
    search_path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    with Terminal(start, tmp_path, 100, PYTHONPATH=str(ROOT), PATH=search_path) as terminal:
        terminal.enter("PS1='ready> '")
        terminal.wait_for("\nready> ")
        if shell == "zsh":
            terminal.enter("autoload -Uz compinit && compinit -u -d ./dump")
        terminal.enter('eval "$(omnivideo --show-completion)" && echo loaded-$?')
        terminal.wait_for("loaded-0")
        terminal.type("omnivideo gen")
        terminal.press("Tab")
        terminal.wait_for("omnivideo generate ")
        terminal.type("--guid")
        terminal.press("Tab")
        terminal.wait_for("omnivideo generate --guidance-scale")
