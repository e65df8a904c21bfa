"""Show the events of a turn in a terminal, or in a file."""

from collections.abc import Callable
from pathlib import Path

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
        """Print a part of a line; the terminal wraps it, so that a copied line is as it was written."""
        self.console.print(Text(text, style), end="", soft_wrap=True)
        self.line_is_open = not text.endswith("\n") if text else self.line_is_open

    def print_line(self, line: Text) -> None:
        self.remove_bar()
        self.end_line()
        self.console.print(line, soft_wrap=True)

    def end_line(self) -> None:
        if self.line_is_open:
            self.console.print()
            self.line_is_open = False

    def close(self) -> None:
        """Remove the bar and end the line, at the end of the turn or where it failed."""
        self.remove_bar()
        self.end_line()
