"""Measure media of unknown origin by decoding them in a confined process.

A process handles one source and then ends. Its memory, CPU time, files and environment are limited before the first
byte is read. Wall time is not limited, except far above: on a busy machine reading takes longer, which is no fault of
the source. Its report is one line of JSON, which is accepted only within the limits.
"""

import io
import json
import logging
import math
import os
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import BinaryIO, NoReturn

from omnivideo.errors import DecodingBusy, UnreadableMedia
from omnivideo.media.containers import can_read_heic, is_heic, sniff_format
from omnivideo.media.limits import MediaGuard, MediaLimits, printable_name
from omnivideo.media.read import MediaInfo, measure_media

# The codecs of browsers, phones and our own writer. FFmpeg has five hundred more, many of them old and rarely audited.
ALLOWED_CODECS = ("h264", "hevc", "mpeg4", "mjpeg", "prores", "vp8", "libvpx", "vp9", "libvpx-vp9", "av1", "libdav1d")
ALLOWED_FORMATS = "mp4, mov, webm, mkv, gif, png, jpeg, webp or avif"
MAX_REPORT_BYTES = 4096  # bytes of a report
POLL_SECONDS = 0.1  # between looks at a process
RETRY_SECONDS = 10.0  # what a client is told to wait when the machine is busy
MEDIA_PATH = Path("/proc/self/fd/0")
# The child gets the parent's import paths: in isolated mode it would find neither a checkout nor the user's site.
# It gives way to requests: sixty uploads that take long to read otherwise delay every route by seconds.
CHILD_PROGRAM = (
    "import os, sys; os.nice(10); sys.path[:] = sys.argv[2:];"
    " from omnivideo.media import sandbox; sandbox.run_in_child()"
)


class FairSlots:
    """A number of slots for the work of several owners, who get free ones in turn."""

    def __init__(self, num_slots: int):
        self.lock, self.num_free = threading.Lock(), num_slots
        self.waiting: dict[str, deque[threading.Event]] = {}  # the next owner is first

    def acquire(self, owner: str, timeout_seconds: float) -> bool:
        """Take a slot; return False if the owner gets none in time."""
        with self.lock:
            if self.num_free:
                self.num_free -= 1
                return True
            turn = threading.Event()
            self.waiting.setdefault(owner, deque()).append(turn)
        if turn.wait(timeout_seconds):
            return True
        with self.lock:
            if turn.is_set():  # meanwhile
                return True
            self.waiting[owner].remove(turn)
            if not self.waiting[owner]:
                del self.waiting[owner]
            return False

    def release(self) -> None:
        """Give a slot to the next owner, who then goes to the end of the line."""
        with self.lock:
            if not self.waiting:
                self.num_free += 1
                return
            owner = next(iter(self.waiting))
            turns = self.waiting.pop(owner)
            turns.popleft().set()
            if turns:
                self.waiting[owner] = turns


PROCESS_SLOTS = FairSlots(os.cpu_count() or 1)  # more processes would only slow each other down


@dataclass(frozen=True)
class ProcessLimits:
    """The limits of the process: CPU time in s, and memory above that at its start.

    A process that does nothing for `idle_seconds` is ended as stuck. After `wall_seconds` the machine is taken for
    overloaded, and after `slot_seconds` without a free process too.
    """

    cpu_seconds: float = 60.0
    max_memory_bytes: int = 2**30
    idle_seconds: float = 10.0
    wall_seconds: float = 900.0
    slot_seconds: float = 30.0


DEFAULT_MEDIA_LIMITS, DEFAULT_PROCESS_LIMITS = MediaLimits(), ProcessLimits()
log = logging.getLogger(__name__)


# ---------------------------------------------------------------- the parent


def detect_suffix(head: bytes) -> str | None:
    """Detect the suffix from the first 64 bytes: one of ALLOWED_FORMATS (jpg for jpeg); None for any other format."""
    kind = sniff_format(head[:16])
    if kind == "mov":
        return "mp4" if head[4:8] == b"ftyp" and head[8:12] != b"qt  " else "mov"
    if kind == "matroska":
        return "webm" if re.search(rb"\x42\x82.webm", head[:64], re.DOTALL) else "mkv"
    return {"jpeg": "jpg", "png": "png", "webp": "webp", "avif": "avif", "gif": "gif", "heif": "heic"}.get(kind or "")


def measure_in_sandbox(
    source: bytes | BinaryIO,
    limits: MediaLimits = DEFAULT_MEDIA_LIMITS,
    process_limits: ProcessLimits = DEFAULT_PROCESS_LIMITS,
    owner: str = "",
) -> MediaInfo:
    """Return the shape of the media after decoding them completely in a confined process; owners get one in turn.

    Raises UnreadableMedia, whose text is "source: " and the problem, and DecodingBusy if no process becomes available.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(64)
    if not size:
        refuse_media(f"is empty; allowed: 1 to {limits.max_bytes} bytes")
    if size > limits.max_bytes:
        refuse_media(f"has {size} bytes; allowed: 1 to {limits.max_bytes}")
    if is_heic(head[:16]) and not can_read_heic():
        refuse_media(f"is a HEIC picture, which cannot be read; allowed: {ALLOWED_FORMATS}")
    if detect_suffix(head) is None:
        refuse_media(f"is not an image or video; allowed: {ALLOWED_FORMATS}")
    request = json.dumps({"limits": asdict(replace(limits, codecs=ALLOWED_CODECS)), "bounds": asdict(process_limits)})
    with acquire_process_slot(process_limits.slot_seconds, owner), open_memory_file(file) as media_fd:
        report, status = run_child_process(request, media_fd, process_limits)
    return parse_report(report, status, limits, process_limits)


def refuse_media(problem: str) -> NoReturn:
    """Raise UnreadableMedia."""
    raise UnreadableMedia("source", problem)


@contextmanager
def acquire_process_slot(slot_seconds: float, owner: str = "") -> Iterator[None]:
    """Hold one of the slots that limit how many processes read at the same time."""
    if not PROCESS_SLOTS.acquire(owner, slot_seconds):
        raise DecodingBusy("media: too many are being read at once; try again in a moment", RETRY_SECONDS)
    try:
        yield
    finally:
        PROCESS_SLOTS.release()


@contextmanager
def open_memory_file(source: BinaryIO) -> Iterator[int]:
    """Yield a descriptor of an anonymous file with the bytes of the source.

    A source that is a file itself, such as an upload of several megabytes, is opened again, for reading only: a copy of
    it would be in memory.
    """
    if (path := find_descriptor_path(source)) is not None:
        media_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield media_fd
        finally:
            os.close(media_fd)
        return
    media_fd = os.memfd_create("media")
    try:
        source.seek(0)
        with open(media_fd, "wb", closefd=False) as file:
            shutil.copyfileobj(source, file, 2**20)
        yield media_fd
    finally:
        os.close(media_fd)


def find_descriptor_path(source: BinaryIO) -> str | None:
    """Return the path of a file's descriptor, with which it can be opened again; None for bytes in memory."""
    try:
        source.flush()
        return f"/proc/self/fd/{source.fileno()}"
    except (OSError, AttributeError):
        return None


def run_child_process(request: str, media_fd: int, process_limits: ProcessLimits) -> tuple[bytes, int | None]:
    """Return the process's output and exit status; the status is None if it was ended because it was stuck.

    Raises DecodingBusy if it cannot be started, or is not done after the limit of wall time.
    """
    paths = [path for path in sys.path if os.path.isabs(path)] + [str(Path(__file__).parents[2])]
    command = [sys.executable, "-I", "-S", "-B", "-c", CHILD_PROGRAM, request, *paths]
    try:
        process = subprocess.Popen(
            command,
            stdin=media_fd,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=build_child_environment(),
            cwd="/",
        )
    except OSError as error:
        raise DecodingBusy(
            "media: no process can be started to read them; try again in a moment", RETRY_SECONDS
        ) from error
    with process:  # waits for the process to end, so that no zombie remains
        try:
            watch = ProcessWatch(process.pid, process_limits)
            report = read_report(process, watch)
            while process.poll() is None:  # it has closed its output, and ends at once unless it is hostile
                watch.check_activity()
                time.sleep(POLL_SECONDS)
            return report, process.returncode
        except TimeoutError:
            return b"", None
        finally:
            process.kill()


class ProcessWatch:
    """Tells a process that works or waits for a CPU from one that is stuck."""

    def __init__(self, pid: int, process_limits: ProcessLimits):
        self.pid, self.process_limits = pid, process_limits
        self.started_at = self.active_at = time.monotonic()
        self.cpu_ticks = -1

    def check_activity(self) -> None:
        """Raise TimeoutError if the process is stuck, and DecodingBusy after the limit of wall time."""
        now = time.monotonic()
        cpu_ticks, is_runnable = self.read_threads()
        if is_runnable or cpu_ticks != self.cpu_ticks:
            self.cpu_ticks, self.active_at = cpu_ticks, now
        if now - self.active_at > self.process_limits.idle_seconds:
            raise TimeoutError
        if now - self.started_at > self.process_limits.wall_seconds:
            raise DecodingBusy("media: the machine is too busy to read them; try again later", RETRY_SECONDS)

    def read_threads(self) -> tuple[int, bool]:
        """Return the CPU time of all threads, and whether any has something to do (running, runnable, or on disk)."""
        cpu_ticks, is_runnable = 0, False
        for path in Path(f"/proc/{self.pid}/task").glob("*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:  # the thread has ended
                continue
            cpu_ticks += int(fields[11]) + int(fields[12])
            is_runnable |= fields[0] in ("R", "D")
        return cpu_ticks, is_runnable


def build_child_environment() -> dict[str, str]:
    """Return an environment without our keys and addresses. The default 64 malloc arenas would exhaust memory."""
    inherited_variables = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return inherited_variables | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}


def read_report(process: subprocess.Popen[bytes], watch: ProcessWatch) -> bytes:
    """Return the output, or nothing if it is longer than MAX_REPORT_BYTES; raise what the watch raises."""
    assert process.stdout is not None
    poller, report = select.poll(), b""  # not select(), which fails above descriptor 1023
    poller.register(process.stdout)
    while len(report) <= MAX_REPORT_BYTES:
        if not poller.poll(POLL_SECONDS * 1000):
            watch.check_activity()
            continue
        chunk = os.read(process.stdout.fileno(), MAX_REPORT_BYTES)
        if not chunk:
            return report
        report += chunk
    process.kill()
    return b""


def parse_report(report: bytes, status: int | None, limits: MediaLimits, process_limits: ProcessLimits) -> MediaInfo:
    """Return the report if it is within the limits; a decoder under an attacker's control may write anything."""
    if status == -signal.SIGALRM:
        raise DecodingBusy("media: the machine is too busy to read them; try again later", RETRY_SECONDS)
    if status == -signal.SIGXCPU:
        refuse_media(
            f"takes more than {process_limits.cpu_seconds:g} seconds of CPU time to read; "
            "allowed: a shorter or smaller source"
        )
    if status is None:
        refuse_media("cannot be read: its decoder is stuck; allowed: a complete file")
    try:
        fields = json.loads(report) if status == 0 else {}
        if isinstance(fields.get("refused"), str):
            refuse_media("".join(char if char.isprintable() else "?" for char in fields["refused"][:400]))
        info = MediaInfo(**fields)
        if is_plausible(info, limits):
            return info
    except (AttributeError, TypeError, ValueError, RecursionError):
        pass
    log.warning("the process that reads media ended with status %s and no report", status)
    refuse_media("is damaged, or needs more memory than is available; allowed: a shorter or smaller source")


def is_plausible(info: MediaInfo, limits: MediaLimits) -> bool:
    """Return whether read_media could give this shape; raise UnreadableMedia if it is above the limits."""
    sizes = (info.width, info.height, info.frames)
    if not all(type(size) is int and size > 0 for size in sizes):
        return False
    MediaGuard(printable_name(MEDIA_PATH), limits).check_dimensions(*sizes, 0)
    if info.kind == "image":
        return info.fps is None and info.frames == 1
    return info.kind == "video" and isinstance(info.fps, float) and 0 < info.fps <= limits.max_fps


# ---------------------------------------------------------------- the child


def run_in_child() -> None:
    """Run the child: the request is its first argument, the media are its input, and the report is its output."""
    request = json.loads(sys.argv[1])
    for plugin in ("WebP", "Avif"):  # Pillow would otherwise import all its formats to find these
        import_module(f"PIL.{plugin}ImagePlugin")
    confine_process(ProcessLimits(**request["bounds"]))
    limits = MediaLimits(**request["limits"] | {"codecs": tuple(request["limits"]["codecs"])})
    os.write(1, json.dumps(build_report(limits)).encode())


def confine_process(process_limits: ProcessLimits) -> None:
    """Give up everything that reading media does not need. The alarm ends a child whose parent has died."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    usage = resource.getrusage(resource.RUSAGE_SELF)  # of the imports
    cpu_seconds = math.ceil(usage.ru_utime + usage.ru_stime + process_limits.cpu_seconds)
    lower_resource_limit(resource.RLIMIT_AS, pages * resource.getpagesize() + process_limits.max_memory_bytes)
    lower_resource_limit(
        resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + 1
    )  # SIGXCPU, which shows the reason, then SIGKILL
    lower_resource_limit(resource.RLIMIT_FSIZE, 0)
    lower_resource_limit(resource.RLIMIT_NOFILE, 16)
    lower_resource_limit(resource.RLIMIT_CORE, 0)
    signal.setitimer(signal.ITIMER_REAL, process_limits.wall_seconds)


def lower_resource_limit(resource_id: int, soft: int, hard: int | None = None) -> None:
    """Lower a limit, unless it is already lower."""
    hard = soft if hard is None else hard
    current_hard = resource.getrlimit(resource_id)[1]
    hard = hard if current_hard == resource.RLIM_INFINITY else min(hard, current_hard)
    resource.setrlimit(resource_id, (min(soft, hard), hard))


def build_report(limits: MediaLimits) -> dict[str, object]:
    """Return the shape of the media, or the reason for refusing them."""
    try:
        return asdict(measure_media(MEDIA_PATH, limits))
    except UnreadableMedia as error:
        return {"refused": str(error).removeprefix(f"source: '{MEDIA_PATH.name}' ")}
