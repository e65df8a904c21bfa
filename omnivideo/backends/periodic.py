"""A thread that does something again and again until it is stopped."""

import logging
import threading
from collections.abc import Callable
from typing import Self

from omnivideo.errors import OmniVideoError


class PeriodicThread:
    """Calls `function` every `seconds`, first after one interval. An error is logged and ends nothing."""

    def __init__(self, name: str, seconds: float, function: Callable[[], object], log: logging.Logger):
        self.seconds = seconds
        self.function = function
        self.log = log
        self.stop_event = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True, name=name)

    def start(self) -> Self:
        self.thread.start()
        return self

    def stop(self) -> None:
        self.stop_event.set()
        self.thread.join()

    def run(self) -> None:
        while not self.stop_event.wait(self.seconds):
            self.call(self.function)

    def call(self, function: Callable[[], object]) -> None:
        """Call a function that needs the database, or log why that is not possible now."""
        try:
            function()
        except OmniVideoError as error:
            self.log.warning("%s", error)
        except Exception:
            self.log.exception("%s", self.thread.name)
