"""The terminal of `omnivideo chat`."""

import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from omnivideo.agent.thread import Thread
from omnivideo.contracts import Artifact, StepProgress
from omnivideo.errors import InvalidInput, OmniVideoError
from omnivideo.turns import (
    ActionResult,
    ArtifactReady,
    PlanReady,
    PromptRewritten,
    QuestionAsked,
    TextDelta,
    ThinkingDelta,
    TurnCompleted,
    TurnEvent,
)

HELP_TEXT = """[dim]Say what you would like to see, change or know. Write @FILE in a line to attach a file.
/history   list the turns              /fork N   continue from turn N in a new thread
/undo      take back the last turn     /save F   save the last clip to a file
/open      show the last clip          /quit[/dim]"""


class TerminalChat:
    """A conversation in one thread at a time. `artifact_path` returns the file of an artifact."""

    def __init__(
        self, thread: Thread, artifact_path: Callable[[Artifact], Path], console: Console, **turn_options: Any
    ):
        self.artifact_path = artifact_path
        self.console = console
        self.turn_options = turn_options
        self.thread = thread
        self.commands: dict[str, Callable[[str], None]] = {
            "history": self.print_history,
            "fork": self.fork_thread,
            "undo": self.undo_turn,
            "save": self.save_latest,
            "open": self.open_latest,
            "help": lambda argument: self.console.print(HELP_TEXT),
        }

    def run(self, lines: Iterable[str]) -> None:
        """Process lines until they end or one is /quit. A user's error is printed, and the chat continues."""
        self.console.print(HELP_TEXT)
        for line in lines:
            name, _, argument = line.strip().removeprefix("/").partition(" ")
            if line.strip() in ("/quit", "/exit"):
                return
            try:
                if line.startswith("/"):
                    self.run_command(name, argument.strip())
                elif line.strip():
                    self.send_message(line)
            except OmniVideoError as error:
                self.console.print(f"{error}", style="red", markup=False, highlight=False)

    def run_command(self, name: str, argument: str) -> None:
        if name not in self.commands:
            raise InvalidInput("command", f"/{name} is not one of /{', /'.join(self.commands)}, /quit")
        self.commands[name](argument)

    def send_message(self, line: str) -> None:
        """Send a line as a turn, with its @FILEs as attachments, and print the turn's events."""
        words = line.split()
        files = [word[1:] for word in words if word.startswith("@") and len(word) > 1]
        text = " ".join(word for word in words if not (word.startswith("@") and len(word) > 1))
        columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        results: tuple[ActionResult, ...] = ()
        with Progress(*columns, console=self.console, transient=True) as bar:
            row = bar.add_task("", total=None, visible=False)
            for event in self.thread.send(text, files, **self.turn_options):
                if isinstance(event, TurnCompleted):
                    results = event.turn.results
                if isinstance(event, StepProgress):
                    bar.update(row, visible=event.step < event.steps, total=event.steps, completed=event.step)
                else:
                    self.print_event(event)
        self.console.print()
        for result in results:
            if result.command and result.command.name in ("save", "export") and result.artifact:
                self.save_result(result.artifact, str(result.command.arguments.get("file", "")))

    def save_result(self, artifact: Artifact, name: str) -> None:
        """Write the file that a message such as "save it as final.mp4" asks for, into the current folder."""
        self.copy_file(artifact, Path(Path(name).name or f"clip{Path(artifact.key).suffix}"))

    def print_event(self, event: TurnEvent) -> None:
        if isinstance(event, PlanReady) and len(event.plan.actions) > 1:
            texts = " > ".join(action.text for action in event.plan.actions)
            self.console.print(texts, style="dim", markup=False, highlight=False)
        elif isinstance(event, ThinkingDelta):
            self.console.print(event.delta, style="dim italic", end="", markup=False, highlight=False)
        elif isinstance(event, PromptRewritten):
            self.console.print(f"\n[dim]prompt: {event.trace.rewrite}[/dim]", highlight=False)
        elif isinstance(event, TextDelta):
            self.console.print(event.delta, end="", markup=False, highlight=False)
        elif isinstance(event, QuestionAsked):
            self.console.print(event.text, style="yellow", markup=False, highlight=False)
        elif isinstance(event, ArtifactReady) and event.final:
            self.console.print(
                f"[green]{event.artifact.medium}[/green] {self.artifact_path(event.artifact)}", highlight=False
            )

    # ------------------------------------------------------------ commands

    def print_history(self, argument: str) -> None:
        for turn in self.thread.get_turns():
            self.console.print(f"[bold]{turn.number}[/bold] {turn.text}", highlight=False)
            for result in turn.results:
                summary = result.answer if result.artifact is None else f"{result.goal}: {result.artifact.caption}"
                self.console.print(f"    {summary}", style="dim", markup=False, highlight=False)

    def fork_thread(self, argument: str) -> None:
        if not argument.isdigit():
            raise InvalidInput("fork", f"give the turn to continue from: /fork N, 0 to {len(self.thread.get_turns())}")
        self.thread = self.thread.fork(int(argument), uuid.uuid4().hex[:12])
        self.console.print(f"[dim]thread {self.thread.id}, after turn {argument}[/dim]", highlight=False)

    def undo_turn(self, argument: str) -> None:
        num_turns = len(self.thread.get_turns())
        if num_turns == 0:
            raise InvalidInput("undo", "there is no turn to take back")
        self.fork_thread(str(num_turns - 1))

    def require_latest_artifact(self) -> Artifact:
        artifacts = self.thread.get_artifacts()
        if not artifacts:
            raise InvalidInput("artifact", "this thread has no clip or image yet")
        return artifacts[-1]

    def save_latest(self, argument: str) -> None:
        artifact = self.require_latest_artifact()
        suffix = Path(artifact.key).suffix
        target = Path(argument or f"clip{suffix}")
        if target.suffix != suffix:
            raise InvalidInput("save", f"the file's name must end with {suffix}")
        self.copy_file(artifact, target)

    def copy_file(self, artifact: Artifact, target: Path) -> None:
        try:
            shutil.copyfile(self.artifact_path(artifact), target)
        except OSError as error:
            raise InvalidInput("save", f"{target.name} cannot be written: {error.strerror}") from None
        self.console.print(f"[green]saved[/green] {target}", highlight=False)

    def open_latest(self, argument: str) -> None:
        opener = {"darwin": "open", "win32": "explorer"}.get(sys.platform, "xdg-open")
        if shutil.which(opener) is None:
            raise InvalidInput("open", f"this machine has no {opener}; use /save")
        path = self.artifact_path(self.require_latest_artifact())
        subprocess.Popen([opener, path], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def read_keyboard_lines(console: Console) -> Iterable[str]:
    """Yield lines from the keyboard until the end of the input (Ctrl-D)."""
    while True:
        try:
            yield console.input("[bold cyan]> [/bold cyan]")
        except EOFError:
            return
