"""A progress bar that prints lines where the output is not a terminal."""

import time
from typing import Any

from rich.progress import BarColumn, Progress, ProgressColumn, TaskID
from rich.text import Text

LINE_SECONDS = 10.0  # between two lines of a task


class LoggedProgress(Progress):
    """A progress bar in a terminal or a notebook. In a file, each task is a line every 10 s and one at its end."""

    def __init__(self, *columns: str | ProgressColumn, **options: Any):
        super().__init__(*columns, **options)
        self.prints_lines = not (self.console.is_terminal or self.console.is_jupyter)
        self.disable = self.prints_lines
        self.printed_at: dict[TaskID, float] = {}
        self.unprinted: set[TaskID] = set()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self.print_task(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self.print_task(task_id)

    def stop(self) -> None:
        super().stop()
        for task_id in list(self.unprinted):
            self.print_task(task_id, is_last=True)

    def print_task(self, task_id: TaskID, is_last: bool = False) -> None:
        """Print a task's columns as one line, unless its last line is less than 10 s old and it goes on."""
        if not self.prints_lines:
            return
        now, task = time.monotonic(), next(task for task in self.tasks if task.id == task_id)
        self.unprinted.add(task_id)
        if not is_last and not task.finished and now - self.printed_at.setdefault(task_id, now) < LINE_SECONDS:
            return
        self.printed_at[task_id] = now
        self.unprinted.discard(task_id)
        cells = (column(task) for column in self.columns if not isinstance(column, str | BarColumn))
        line = "  ".join(cell.plain for cell in cells if isinstance(cell, Text) and cell.plain)
        self.console.print(line, soft_wrap=True, markup=False, highlight=False)
