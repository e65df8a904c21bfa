"""A conversation in the terminal."""

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
from omnivideo.contracts import (
    Artifact,
    ArtifactReady,
    PlanReady,
    PromptRewritten,
    QuestionAsked,
    StepProgress,
    TextDelta,
    ThinkingDelta,
    TurnEvent,
)
from omnivideo.errors import InvalidInput, OmniVideoError

HELP_TEXT = """[dim]Say what you would like to see, change or know. To show a file: @FILE in the line.
/history   what was said and made      /fork N   a new thread from turn N on
/undo      back before the last turn   /save F   the last clip to a file
/open      show the last clip          /quit[/dim]"""


class TerminalChat:
    """One terminal over one thread at a time; `path` gives the file of an artifact."""

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
            "help": lambda rest: self.console.print(HELP_TEXT),
        }

    def run(self, lines: Iterable[str]) -> None:
        """Takes lines until they end or say /quit; what a user can cause is told in one line, and it goes on."""
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
            raise InvalidInput("command", f"/{name} is none of /{', /'.join(self.commands)}, /quit")
        self.commands[name](argument)

    def send_message(self, line: str) -> None:
        words = line.split()
        files = [word[1:] for word in words if word.startswith("@") and len(word) > 1]
        text = " ".join(word for word in words if not (word.startswith("@") and len(word) > 1))
        columns = (TextColumn("drawing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as bar:
            row = bar.add_task("", total=None, visible=False)
            for event in self.thread.send(text, files, **self.turn_options):
                if isinstance(event, StepProgress):
                    bar.update(row, visible=event.step < event.steps, total=event.steps, completed=event.step)
                else:
                    self.print_event(event)
        self.console.print()

    def print_event(self, event: TurnEvent) -> None:
        if isinstance(event, PlanReady) and len(event.plan.actions) > 1:
            self.console.print("[dim]" + " > ".join(act.text for act in event.plan.actions) + "[/dim]", highlight=False)
        elif isinstance(event, ThinkingDelta):
            self.console.print(event.delta, style="dim italic", end="", markup=False, highlight=False)
        elif isinstance(event, PromptRewritten):
            self.console.print(f"\n[dim]so: {event.trace.rewrite}[/dim]", highlight=False)
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
            for done in turn.results:
                said = done.answer if done.artifact is None else f"{done.goal}: {done.artifact.caption}"
                self.console.print(f"    {said}", style="dim", markup=False, highlight=False)

    def fork_thread(self, argument: str) -> None:
        if not argument.isdigit():
            raise InvalidInput("fork", f"give the turn to go on from: /fork N, 0 to {len(self.thread.get_turns())}")
        self.thread = self.thread.fork(int(argument), uuid.uuid4().hex[:12])
        self.console.print(f"[dim]thread {self.thread.id}, after turn {argument}[/dim]", highlight=False)

    def undo_turn(self, argument: str) -> None:
        turns = len(self.thread.get_turns())
        if turns == 0:
            raise InvalidInput("undo", "there is no turn to take back")
        self.fork_thread(str(turns - 1))

    def latest_artifact(self) -> Artifact:
        made = self.thread.get_artifacts()
        if not made:
            raise InvalidInput("artifact", "nothing was made here yet")
        return made[-1]

    def save_latest(self, argument: str) -> None:
        last = self.latest_artifact()
        target = Path(argument or f"made{Path(last.key).suffix}")
        if target.suffix != Path(last.key).suffix:
            raise InvalidInput("save", f"it is kept as {Path(last.key).suffix}; name a file that ends so")
        try:
            shutil.copyfile(self.artifact_path(last), target)
        except OSError as error:
            raise InvalidInput("save", f"{target.name} cannot be written: {error.strerror}") from None
        self.console.print(f"[green]saved[/green] {target}", highlight=False)

    def open_latest(self, argument: str) -> None:
        opener = {"darwin": "open", "win32": "explorer"}.get(sys.platform, "xdg-open")
        if shutil.which(opener) is None:
            raise InvalidInput("open", f"this machine has no {opener}; use /save")
        subprocess.Popen(
            [opener, self.artifact_path(self.latest_artifact())], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )


def read_keyboard_lines(console: Console) -> Iterable[str]:
    """Lines from the keyboard until it is closed."""
    while True:
        try:
            yield console.input("[bold cyan]> [/bold cyan]")
        except EOFError:
            return
