"""The progress bar of a call, which is shown in a terminal and in a notebook unless the caller says otherwise."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from importlib import import_module

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from omnivideo.contracts import StepProgress
from omnivideo.sdk.options import StepCallback

LABEL_CHARS = 40


class SharedBars:
    """The bars of all calls that run at the same time in this process: a terminal shows one display at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.open_bars = 0
        self.display: Progress | None = None

    @contextmanager
    def open_bar(self, console: Console, label: str) -> Iterator[StepCallback]:
        with self.lock:
            if self.display is None:
                columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
                self.display = Progress(*columns, console=console, transient=True)
                self.display.start()
            display = self.display
            self.open_bars += 1
            bar = display.add_task(label, total=None)
        try:
            yield lambda step: display.update(bar, total=step.steps, completed=step.step)
        finally:
            with self.lock:
                self.open_bars -= 1
                display.remove_task(bar)
                if not self.open_bars:
                    display.stop()
                    self.display = None


SHARED_BARS = SharedBars()


@contextmanager
def follow_steps(text: str, progress: bool | None, on_step: StepCallback | None) -> Iterator[StepCallback]:
    """Yield the function that reports a step: to `on_step`, and to a bar if `progress` asks for one.

    With `progress` None, a bar is shown in a terminal or a notebook unless the caller follows the steps itself.
    """
    console = Console(stderr=True)
    if progress is None:
        progress = on_step is None and (console.is_terminal or console.is_jupyter)
    if not progress:
        yield on_step or ignore_step
        return
    label = text if len(text) <= LABEL_CHARS else f"{text[: LABEL_CHARS - 3]}..."
    bar = open_notebook_bar(label) if console.is_jupyter else SHARED_BARS.open_bar(console, label.replace("[", "\\["))
    with bar as update_bar:

        def report(step: StepProgress) -> None:
            update_bar(step)
            if on_step is not None:
                on_step(step)

        yield report


@contextmanager
def open_notebook_bar(label: str) -> Iterator[StepCallback]:
    """Show a bar below a notebook's cell until the end; a bar of rich would need ipywidgets."""
    display = import_module("IPython.display")
    shown = display.display(display.HTML(""), display_id=True)

    def update_bar(step: StepProgress) -> None:
        progress = f'<progress value="{step.step}" max="{step.steps}"></progress>'
        shown.update(
            display.HTML(f"{escape(label)} {progress} {step.step}/{step.steps}, {step.eta_seconds:.0f} s left")
        )

    try:
        yield update_bar
    finally:
        shown.update(display.HTML(""))


def ignore_step(step: StepProgress) -> None:
    """Do nothing."""
