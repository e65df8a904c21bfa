"""The conversation of `omnivideo chat`: messages, and commands that begin with a slash."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from omnivideo.agent.commands import FILE_FORMATS
from omnivideo.agent.thread import Thread
from omnivideo.cli.turn_display import TurnDisplay, print_wrapped
from omnivideo.contracts import Artifact
from omnivideo.errors import InvalidInput, JobCancelled, OmniVideoError
from omnivideo.turns import ActionResult, TurnCompleted

if TYPE_CHECKING:
    from omnivideo.sdk.studio import Studio

HELP_TEXT = """Say what you would like to see, change or know.
@FILE      in a message: attach a file
/history   list the turns
/undo      take back the last turn
/fork N    go on from turn N in a new thread
/save F    save the result (.mp4 .gif .png)
/open      show the result
/threads   list the threads
/help      show this text
/quit      end the chat, as Ctrl-D does"""
ATTACHMENT = re.compile(r'(?:^|(?<=\s))@(?:"([^"\n]+)"|(\S+))')  # @FILE, or @"FILE with spaces"
MAX_LISTED_THREADS = 20


def choose_free_name(suffix: str) -> Path:
    """Return clip.mp4 (or another suffix) in the current folder, or clip-2.mp4 and so on where a file has that name."""
    target, number = Path(f"clip{suffix}"), 1
    while target.exists():
        number += 1
        target = Path(f"clip-{number}{suffix}")
    return target


class TerminalChat:
    """A conversation in one thread at a time.

    `is_interactive` says that a person types: then Ctrl-C cancels a turn, and the chat tells how to continue it.
    """

    def __init__(
        self,
        studio: "Studio",
        thread: Thread,
        console: Console,
        is_interactive: bool = False,
        **turn_options: Any,
    ):
        self.studio = studio
        self.thread = thread
        self.console = console
        self.is_interactive = is_interactive
        self.turn_options = turn_options
        self.commands: dict[str, Callable[[str], None]] = {
            "history": self.print_history,
            "fork": self.fork_thread,
            "undo": self.undo_turn,
            "save": self.save_current,
            "open": self.open_current,
            "threads": self.print_threads,
            "help": lambda argument: self.print_line(HELP_TEXT, "dim"),
        }

    def print_line(self, text: str | Text, style: str = "") -> None:
        """Print a line; in a terminal it is wrapped between words, and a path is never broken."""
        print_wrapped(self.console, Text(text, style) if isinstance(text, str) else text)

    def run(self, lines: Iterable[str]) -> None:
        """Process lines until they end or one is /quit. A user's error is printed, and the chat continues."""
        self.print_line(HELP_TEXT, "dim")
        self.print_line(f"thread {self.thread.id}", "dim")
        try:
            for line in lines:
                if line.strip() in ("/quit", "/exit"):
                    break
                self.process_line(line)
        finally:
            if self.is_interactive and self.thread.get_progress().num_turns:
                self.print_line(f"to continue: omnivideo chat --thread {self.thread.id}", "dim")

    def process_line(self, line: str) -> None:
        name, _, argument = line.strip().removeprefix("/").partition(" ")
        try:
            if line.lstrip().startswith("/"):
                self.run_command(name, argument.strip())
            elif line.strip():
                self.send_message(line)
        except JobCancelled:
            self.print_line("cancelled; the thread is as it was before this message", "yellow")
        except OmniVideoError as error:
            self.print_line(str(error), "red")

    def run_command(self, name: str, argument: str) -> None:
        if name not in self.commands:
            raise InvalidInput("command", f"/{name} is not one of /{', /'.join(self.commands)}, /quit")
        self.commands[name](argument)

    def send_message(self, message: str) -> None:
        """Send a message as a turn, with its @FILEs as attachments, and print the turn's events."""
        files = [quoted or plain for quoted, plain in ATTACHMENT.findall(message)]
        text = ATTACHMENT.sub("", message).strip()
        display = TurnDisplay(self.console, self.studio.artifact_path)
        results: tuple[ActionResult, ...] = ()
        try:
            with self.catch_interrupt():
                for event in self.thread.send(text, files, **self.turn_options):
                    if isinstance(event, TurnCompleted):
                        results = event.turn.results
                    display.show(event)
        finally:
            display.close()
        for result in results:
            if result.command and result.command.name in ("save", "export") and result.artifact:
                self.save_result(result.artifact, str(result.command.arguments.get("file", "")))

    def catch_interrupt(self) -> Any:
        """Let the first Ctrl-C cancel the turn, where a person types."""
        if not self.is_interactive:
            return nullcontext()
        from omnivideo.cli.keyboard import catch_first_interrupt

        return catch_first_interrupt(self.thread.cancel)

    def save_result(self, artifact: Artifact, name: str) -> None:
        """Write the file that a message such as "save it as final.mp4" asks for, into the current folder."""
        suffix = Path(artifact.key).suffix
        self.copy_file(artifact, Path(Path(name).name) if Path(name).name else choose_free_name(suffix))

    # ------------------------------------------------------------ commands

    def print_history(self, argument: str) -> None:
        for turn in self.thread.get_turns():
            self.print_line(Text.assemble((f"{turn.number} ", "bold"), turn.text))
            for result in turn.results:
                summary = result.answer if result.artifact is None else f"{result.goal}: {result.artifact.caption}"
                self.print_line(f"    {summary}", "dim")

    def print_threads(self, argument: str) -> None:
        """List the newest threads with turns, the newest last: time, id, number of turns and first message."""
        conversations = self.studio.conversations
        threads = [conversations.open_thread(thread_id) for thread_id in conversations.list_thread_ids()]
        begun = sorted(
            (thread.get_changed_at(), thread.id, turns) for thread in threads if (turns := thread.get_turns())
        )
        for changed_at, thread_id, turns in begun[-MAX_LISTED_THREADS:]:
            mark = "*" if thread_id == self.thread.id else " "
            time = changed_at[:16].replace("T", " ")
            noun = "turn " if len(turns) == 1 else "turns"
            self.print_line(f"{mark} {time}  {thread_id}  {len(turns):3} {noun}  {turns[0].text}")
        self.print_line("to continue one: omnivideo chat --thread ID", "dim")

    def fork_thread(self, argument: str) -> None:
        if not (argument.isascii() and argument.isdigit()):
            raise InvalidInput(
                "fork", f"give the turn to continue from: /fork N, 0 to {self.thread.get_progress().num_turns}"
            )
        self.thread = self.thread.fork(int(argument))
        self.print_line(f"thread {self.thread.id}, after turn {argument}", "dim")

    def undo_turn(self, argument: str) -> None:
        num_turns = self.thread.get_progress().num_turns
        if num_turns == 0:
            raise InvalidInput("undo", "there is no turn to take back")
        self.fork_thread(str(num_turns - 1))

    def require_current_artifact(self) -> Artifact:
        """Return what "it" refers to: the last result, or the one that an undo has gone back to."""
        key = self.thread.get_current_key()
        artifact = next((artifact for artifact in reversed(self.thread.get_artifacts()) if artifact.key == key), None)
        if artifact is None:
            raise InvalidInput("artifact", "this thread has no clip or image yet")
        return artifact

    def save_current(self, argument: str) -> None:
        """Write the current result to a file, in the format of its suffix."""
        artifact = self.require_current_artifact()
        own_suffix = Path(artifact.key).suffix
        target = Path(argument).expanduser() if argument else choose_free_name(own_suffix)
        suffix = target.suffix.lower()
        formats = [f".{name}" for name in FILE_FORMATS[artifact.medium]]
        if suffix != own_suffix:
            if artifact.manifest is None:
                raise InvalidInput("save", f"an attached file is saved as it is: the name must end with {own_suffix}")
            if suffix not in formats:
                raise InvalidInput("save", f"the file's name must end with {' or '.join(formats)}")
            media_tools = self.studio.conversations.local_media_tools
            artifact = media_tools.convert_artifact(artifact, suffix.removeprefix("."))
        self.copy_file(artifact, target)

    def copy_file(self, artifact: Artifact, target: Path) -> None:
        try:
            shutil.copyfile(self.studio.artifact_path(artifact), target)
        except OSError as error:
            reason = error.strerror if target.parent.is_dir() else f"there is no folder '{target.parent}'"
            raise InvalidInput("save", f"'{target}' cannot be written: {reason}") from None
        self.print_line(Text.assemble(("saved", "green"), f" {target}"))

    def open_current(self, argument: str) -> None:
        opener = {"darwin": "open", "win32": "explorer"}.get(sys.platform, "xdg-open")
        if shutil.which(opener) is None:
            raise InvalidInput("open", f"this machine has no {opener}; use /save")
        path = self.studio.artifact_path(self.require_current_artifact())
        self.print_line(f"opening {path}", "dim")
        subprocess.Popen([opener, path], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
