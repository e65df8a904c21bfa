"""Read the lines of a chat from the keyboard, with editing, history and completion, and catch Ctrl-C."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory

CANCEL_MESSAGE = b"\ncancelling after this step; Ctrl-C again ends the chat\n"


def read_keyboard_lines(history_file: Path, commands: Iterable[str]) -> Iterator[str]:
    """Yield what is typed until the end of the input (Ctrl-D); text that is pasted with line breaks is one message.

    The history is a file that only its owner can read. Ctrl-C discards the line.
    """
    history_file.parent.mkdir(parents=True, exist_ok=True)
    history_file.touch(mode=0o600)
    session = PromptSession[str](
        FormattedText([("bold ansicyan", "> ")]),
        history=FileHistory(history_file),
        completer=WordCompleter([f"/{name}" for name in commands], sentence=True),
        complete_while_typing=False,
    )
    while True:
        try:
            yield session.prompt()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


@contextmanager
def catch_first_interrupt(cancel: Callable[[], None]) -> Iterator[None]:
    """Call `cancel` at the first Ctrl-C; the second one raises KeyboardInterrupt as usual."""

    def handle_interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, previous)
        os.write(2, CANCEL_MESSAGE)  # the handler may have interrupted a print
        cancel()

    previous = signal.signal(signal.SIGINT, handle_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
