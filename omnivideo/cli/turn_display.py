"""Show the events of a turn in a terminal, or in a file."""

import re
from collections.abc import Callable
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from omnivideo.contracts import Artifact, StepProgress
from omnivideo.turns import (
    ArtifactReady,
    PlanReady,
    PromptRewritten,
    QuestionAsked,
    TextDelta,
    ThinkingDelta,
    TurnEvent,
)


def print_wrapped(console: Console, line: Text) -> None:
    """Print a line, in a terminal wrapped between words.

    A word longer than the terminal is wide, such as a path, is not broken, so that it can be copied; it stands after
    the words before it. In a file, a line stays one line.
    """
    if not console.is_terminal:
        console.print(line, soft_wrap=True)
        return
    for part in line.split("\n", allow_blank=True):
        breaks: list[int] = []
        column_start = 0
        for word in re.finditer(r"\S+", part.plain):
            line_end = cell_len(part.plain[column_start : word.end()])
            if word.start() > column_start and line_end > console.width >= cell_len(word.group()):
                column_start = word.start()
                breaks.append(column_start)
        for piece in part.divide(breaks):
            console.print(piece, soft_wrap=True)


class TurnDisplay:
    """Prints the events of one turn, with a progress bar that exists only while steps are denoised.

    A live bar redraws its line, which would erase the text that is printed beside it.
    """

    def __init__(self, console: Console, artifact_path: Callable[[Artifact], Path]):
        self.console = console
        self.artifact_path = artifact_path
        self.bar: Progress | None = None
        self.row = TaskID(0)
        self.line_is_open = False
        self.column = 0  # cells of the terminal's line that are written
        self.held_text = Text()  # the beginning of a word, whose rest has not come

    def show(self, event: TurnEvent) -> None:
        """Print an event, or move the progress bar."""
        if isinstance(event, StepProgress):
            self.show_step(event)
            return
        if isinstance(event, TextDelta | ThinkingDelta):
            self.remove_bar()
            self.write(event.delta, "dim italic" if isinstance(event, ThinkingDelta) else "")
            return
        line = self.describe_event(event)
        if line is not None:
            self.print_line(line)

    def describe_event(self, event: TurnEvent) -> Text | None:
        """Return an event as a line, or None if it is not shown."""
        if isinstance(event, PlanReady) and len(event.plan.actions) > 1:
            return Text(" > ".join(action.text for action in event.plan.actions), "dim")
        if isinstance(event, PromptRewritten):
            return Text(f"prompt: {event.trace.rewrite}", "dim")
        if isinstance(event, QuestionAsked):
            return Text(event.text, "yellow")
        if isinstance(event, ArtifactReady) and event.final:
            return Text.assemble((event.artifact.medium, "green"), f" {self.artifact_path(event.artifact)}")
        return None

    def show_step(self, event: StepProgress) -> None:
        if self.bar is None:
            self.end_line()
            columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=self.console, transient=True)
            self.row = self.bar.add_task("", total=event.steps)
            self.bar.start()
        self.bar.update(self.row, total=event.steps, completed=event.step)
        if event.step == event.steps:
            self.remove_bar()

    def remove_bar(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def write(self, text: str, style: str = "") -> None:
        """Print a part of an answer; in a terminal its lines are wrapped between words."""
        if self.held_text.plain and self.held_text.style != style:
            self.write_held_text()
        text = self.held_text.plain + text
        whole = text[: len(text) - len(re.split(r"\s", text)[-1])] if self.console.is_terminal else text
        self.held_text = Text(text[len(whole) :], style)
        self.write_words(whole, style)

    def write_held_text(self) -> None:
        held, self.held_text = self.held_text, Text()
        self.write_words(held.plain, str(held.style))

    def write_words(self, text: str, style: str) -> None:
        """Print whole words, in a terminal with a line break before a word that does not fit into the line."""
        width = self.console.width if self.console.is_terminal else None
        for part in re.findall(r"\n|[^\S\n]+|\S+", text):
            if width is not None and self.column > 0 and self.column + cell_len(part) > width >= cell_len(part):
                self.console.print()
                self.column = 0
                if part.isspace():
                    continue
            self.console.print(Text(part, style), end="", soft_wrap=True)
            self.column = 0 if part == "\n" else self.column + cell_len(part)
            self.line_is_open = part != "\n"

    def print_line(self, line: Text) -> None:
        self.remove_bar()
        self.end_line()
        print_wrapped(self.console, line)

    def end_line(self) -> None:
        self.write_held_text()
        if self.line_is_open:
            self.console.print()
            self.line_is_open, self.column = False, 0

    def close(self) -> None:
        """Remove the bar and end the line, at the end of the turn or where it failed."""
        self.remove_bar()
        self.end_line()
