"""Count the files of omnivideo/ whose functions run between two marks, in this process and in its children.

Usage:

    with record_calls(tmp_path) as recorder:
        ...  # start threads, servers and workers here: only what starts after this line is recorded
        with recorder.open_window() as window:
            ...  # the code under test
        assert len(window.list_files()) <= 6, window.describe()

Every process writes to a separate file when a function runs for the first time in a window, so nothing is lost if a
child is killed. A child of Python starts its recorder in `call_paths_site/sitecustomize.py`. The window
is one byte of a file that all processes map, which makes opening and closing it visible everywhere at once.

Importing a module and executing a class body do not count as running a function.

This module is also loaded by children that have no other module of ours yet: it uses the standard library only.
"""

import inspect
import mmap
import os
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

FOLDER_VARIABLE = "OMNIVIDEO_TEST_CALL_PATHS"
PACKAGE_FOLDER = str(Path(__file__).resolve().parents[2] / "omnivideo") + os.sep
SITE_FOLDER = Path(__file__).resolve().parent / "call_paths_site"


class Call(NamedTuple):
    """A function that ran in a window; `path` is relative to omnivideo/."""

    process_id: int
    thread: str
    path: str
    function: str


class Profiler:
    """Record the functions that this process runs while a window is open."""

    def __init__(self, folder: Path):
        self.folder = folder
        with open(folder / "window", "r+b") as file:
            self.window = mmap.mmap(file.fileno(), 1)
        self.recorded: set[tuple[int, str, CodeType]] = set()

    def start(self) -> None:
        threading.setprofile(self.profile_call)
        sys.setprofile(self.profile_call)
        os.register_at_fork(after_in_child=self.recorded.clear)

    def stop(self) -> None:
        threading.setprofile(None)
        sys.setprofile(None)

    def profile_call(self, frame: FrameType, event: str, argument: object) -> None:
        number = self.window[0]
        if not number or event != "call":
            return
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE_FOLDER) or not code.co_flags & inspect.CO_OPTIMIZED:
            return
        thread = threading.current_thread().name
        if (number, thread, code) not in self.recorded:
            self.recorded.add((number, thread, code))
            path = code.co_filename.removeprefix(PACKAGE_FOLDER)
            with open(self.folder / f"{number}-{os.getpid()}.calls", "a") as file:
                file.write(f"{thread}\t{path}\t{code.co_qualname}\n")


@dataclass(frozen=True)
class Window:
    """The calls between two marks. They can be read while the window is open and afterwards."""

    folder: Path
    number: int

    def list_calls(self, ignored_threads: Collection[str] = ()) -> list[Call]:
        """Return every function that ran, except in threads whose name begins with one of `ignored_threads`."""
        calls = []
        for file in sorted(self.folder.glob(f"{self.number}-*.calls")):
            process_id = int(file.stem.partition("-")[2])
            for line in file.read_text().splitlines():
                thread, path, function = line.split("\t")
                if not thread.startswith(tuple(ignored_threads)):
                    calls.append(Call(process_id, thread, path, function))
        return calls

    def list_files(self, ignored_threads: Collection[str] = ()) -> list[str]:
        """Return the distinct files of omnivideo/ whose functions ran, in any process."""
        return sorted({call.path for call in self.list_calls(ignored_threads)})

    def describe(self, ignored_threads: Collection[str] = ()) -> str:
        """Return the files and their functions as text, for the message of a failed assertion."""
        functions: dict[str, list[str]] = {}
        for call in self.list_calls(ignored_threads):
            functions.setdefault(call.path, []).append(f"{call.function} [{call.process_id} {call.thread}]")
        return "\n".join(f"{path}: {', '.join(functions[path])}" for path in sorted(functions))


class CallRecorder:
    """Open the windows in which calls are recorded; at most 255 of them."""

    def __init__(self, profiler: Profiler):
        self.profiler = profiler
        self.window_count = 0

    @contextmanager
    def open_window(self) -> Iterator[Window]:
        self.window_count += 1
        self.profiler.window[0] = self.window_count
        try:
            yield Window(self.profiler.folder, self.window_count)
        finally:
            self.profiler.window[0] = 0


@contextmanager
def record_calls(folder: Path) -> Iterator[CallRecorder]:
    """Record calls in this thread, and in threads and Python processes that start inside the block."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "window").write_bytes(b"\0")
    profiler = Profiler(folder)
    variables = {name: os.environ.get(name) for name in (FOLDER_VARIABLE, "PYTHONPATH")}
    os.environ[FOLDER_VARIABLE] = str(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SITE_FOLDER), variables["PYTHONPATH"]]))
    profiler.start()
    try:
        yield CallRecorder(profiler)
    finally:
        profiler.stop()
        profiler.window[0] = 0
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
