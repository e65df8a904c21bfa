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
from omnivideo.contracts import Artifact, Event, Made, Planned, Question, Rewritten, Step, Text, Thinking
from omnivideo.errors import InvalidInput, OmniVideoError

HELP = """[dim]Say what you would like to see, change or know. To show a file: @FILE in the line.
/history   what was said and made      /fork N   a new thread from turn N on
/undo      back before the last turn   /save F   the last clip to a file
/open      show the last clip          /quit[/dim]"""


class Chat:
    """One terminal over one thread at a time; `path` gives the file of an artifact."""

    def __init__(self, thread: Thread, path: Callable[[Artifact], Path], out: Console, **options: Any):
        self.path = path
        self.out = out
        self.options = options
        self.thread = thread
        self.commands: dict[str, Callable[[str], None]] = {
            "history": self.history, "fork": self.fork, "undo": self.undo, "save": self.save, "open": self.show,
            "help": lambda rest: self.out.print(HELP),
        }  # fmt: skip

    def run(self, lines: Iterable[str]) -> None:
        """Takes lines until they end or say /quit; what a user can cause is told in one line, and it goes on."""
        self.out.print(HELP)
        for line in lines:
            word, _, rest = line.strip().removeprefix("/").partition(" ")
            if line.strip() in ("/quit", "/exit"):
                return
            try:
                if line.startswith("/"):
                    self.command(word, rest.strip())
                elif line.strip():
                    self.say(line)
            except OmniVideoError as error:
                self.out.print(f"{error}", style="red", markup=False, highlight=False)

    def command(self, word: str, rest: str) -> None:
        if word not in self.commands:
            raise InvalidInput("command", f"/{word} is none of /{', /'.join(self.commands)}, /quit")
        self.commands[word](rest)

    def say(self, line: str) -> None:
        words = line.split()
        files = [word[1:] for word in words if word.startswith("@") and len(word) > 1]
        text = " ".join(word for word in words if not (word.startswith("@") and len(word) > 1))
        columns = (TextColumn("drawing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.out, transient=True) as bar:
            row = bar.add_task("", total=None, visible=False)
            for event in self.thread.send(text, files, **self.options):
                if isinstance(event, Step):
                    bar.update(row, visible=event.step < event.steps, total=event.steps, completed=event.step)
                else:
                    self.tell(event)
        self.out.print()

    def tell(self, event: Event) -> None:
        if isinstance(event, Planned) and len(event.plan.acts) > 1:
            self.out.print("[dim]" + " > ".join(act.text for act in event.plan.acts) + "[/dim]", highlight=False)
        elif isinstance(event, Thinking):
            self.out.print(event.piece, style="dim italic", end="", markup=False, highlight=False)
        elif isinstance(event, Rewritten):
            self.out.print(f"\n[dim]so: {event.trace.rewrite}[/dim]", highlight=False)
        elif isinstance(event, Text):
            self.out.print(event.piece, end="", markup=False, highlight=False)
        elif isinstance(event, Question):
            self.out.print(event.text, style="yellow", markup=False, highlight=False)
        elif isinstance(event, Made) and event.final:
            self.out.print(f"[green]{event.artifact.medium}[/green] {self.path(event.artifact)}", highlight=False)

    # ------------------------------------------------------------ commands

    def history(self, rest: str) -> None:
        for turn in self.thread.history():
            self.out.print(f"[bold]{turn.number}[/bold] {turn.text}", highlight=False)
            for done in turn.done:
                said = done.answer if done.artifact is None else f"{done.goal}: {done.artifact.about}"
                self.out.print(f"    {said}", style="dim", markup=False, highlight=False)

    def fork(self, rest: str) -> None:
        if not rest.isdigit():
            raise InvalidInput("fork", f"give the turn to go on from: /fork N, 0 to {len(self.thread.history())}")
        self.thread = self.thread.fork(int(rest), uuid.uuid4().hex[:12])
        self.out.print(f"[dim]thread {self.thread.id}, after turn {rest}[/dim]", highlight=False)

    def undo(self, rest: str) -> None:
        turns = len(self.thread.history())
        if turns == 0:
            raise InvalidInput("undo", "there is no turn to take back")
        self.fork(str(turns - 1))

    def last(self) -> Artifact:
        made = self.thread.artifacts()
        if not made:
            raise InvalidInput("artifact", "nothing was made here yet")
        return made[-1]

    def save(self, rest: str) -> None:
        last = self.last()
        target = Path(rest or f"made{Path(last.key).suffix}")
        if target.suffix != Path(last.key).suffix:
            raise InvalidInput("save", f"it is kept as {Path(last.key).suffix}; name a file that ends so")
        try:
            shutil.copyfile(self.path(last), target)
        except OSError as error:
            raise InvalidInput("save", f"{target.name} cannot be written: {error.strerror}") from None
        self.out.print(f"[green]saved[/green] {target}", highlight=False)

    def show(self, rest: str) -> None:
        opener = {"darwin": "open", "win32": "explorer"}.get(sys.platform, "xdg-open")
        if shutil.which(opener) is None:
            raise InvalidInput("open", f"this machine has no {opener}; use /save")
        subprocess.Popen([opener, self.path(self.last())], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def typed(out: Console) -> Iterable[str]:
    """Lines from the keyboard until it is closed."""
    while True:
        try:
            yield out.input("[bold cyan]> [/bold cyan]")
        except EOFError:
            return
