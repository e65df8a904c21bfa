"""A stranger's media, measured by decoding them in a process that has little to lose.

The process is made for one source and ends with it: bytes of memory, seconds, files and environment are bounded
before the first byte is read.  What comes back is a line of JSON, which is believed only within the limits.
"""

import json
import logging
import math
import os
import re
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from omnivideo.backends.decoder.video import Gate, Limits, Measured, measure_media, sniff
from omnivideo.errors import Busy, UnreadableMedia

# What browsers, phones and our own writer make.  FFmpeg knows five hundred more, old and seldom looked at.
CODECS = ("h264", "hevc", "mpeg4", "mjpeg", "prores", "vp8", "libvpx", "vp9", "libvpx-vp9", "av1", "libdav1d")
ALLOWED = "mp4, mov, webm, mkv, gif, png, jpeg or webp"
MOST_SAID = 4096  # bytes of a report
MEDIA = Path("/proc/self/fd/0")
# The parent's own places to import from: a child in isolated mode would find neither a checkout nor a user's site.
PROGRAM = "import sys; sys.path[:] = sys.argv[2:]; from omnivideo.backends import decoding; decoding.child()"
SLOTS = threading.BoundedSemaphore(os.cpu_count() or 1)  # more at once would only make each other late


@dataclass(frozen=True)
class Bounds:
    """What the process may use: seconds on the clock and on the CPU each, bytes of memory above what it starts with."""

    seconds: float = 30.0
    memory: int = 2**30


LIMITS, BOUNDS = Limits(), Bounds()
log = logging.getLogger(__name__)


# ---------------------------------------------------------------- the parent


def suffix_of(head: bytes) -> str | None:
    """The file type by the first 64 bytes: png, jpg, webp, gif, mp4, mov, webm or mkv; None for anything else."""
    kind = sniff(head[:16])
    if kind == "mov":
        return "mp4" if head[4:8] == b"ftyp" and head[8:12] != b"qt  " else "mov"
    if kind == "matroska":
        return "webm" if re.search(rb"\x42\x82.webm", head[:64], re.DOTALL) else "mkv"
    return {"jpeg": "jpg", "png": "png", "webp": "webp", "gif": "gif"}.get(kind or "")


def measured(data: bytes, limits: Limits = LIMITS, bounds: Bounds = BOUNDS) -> Measured:
    """What the bytes come to as frames, decoded whole under the limits in a process of their own.

    Raises UnreadableMedia, whose text starts with "source: " and goes on with what is wrong; Busy where no process
    can be had within the time that one may take.
    """
    if not data:
        refuse(f"is empty; allowed: 1 to {limits.max_bytes} bytes")
    if len(data) > limits.max_bytes:
        refuse(f"has {len(data)} bytes; allowed: 1 to {limits.max_bytes}")
    if suffix_of(data[:64]) is None:
        refuse(f"is no image or video; allowed: {ALLOWED}")
    order = json.dumps({"limits": asdict(replace(limits, codecs=CODECS)), "bounds": asdict(bounds)})
    with slot(bounds.seconds), in_memory(data) as media:
        said, status = answer(order, media, bounds.seconds)
    return believed(said, status, limits, bounds)


def refuse(what: str) -> NoReturn:
    raise UnreadableMedia("source", what)


@contextmanager
def slot(seconds: float) -> Iterator[None]:
    """A place among the processes that read at the same time."""
    if not SLOTS.acquire(timeout=seconds):
        raise Busy("media: too many are being read at once; try again in a moment", seconds)
    try:
        yield
    finally:
        SLOTS.release()


@contextmanager
def in_memory(data: bytes) -> Iterator[int]:
    """A descriptor of a file without a name that holds the data."""
    media = os.memfd_create("media")
    try:
        with open(media, "wb", closefd=False) as file:
            file.write(data)
        yield media
    finally:
        os.close(media)


def answer(order: str, media: int, seconds: float) -> tuple[bytes, int | None]:
    """What the process wrote, and its exit status: None where it was stopped at the deadline."""
    paths = [path for path in sys.path if os.path.isabs(path)] + [str(Path(__file__).parents[2])]
    command = [sys.executable, "-I", "-S", "-B", "-c", PROGRAM, order, *paths]
    deadline = time.monotonic() + seconds
    try:
        process = subprocess.Popen(
            command, stdin=media, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment(), cwd="/"
        )
    except OSError as error:
        raise Busy("media: no process can be started to read them; try again in a moment", seconds) from error
    with process:  # which waits for its end, so that no zombie stays
        try:
            said = heard(process, deadline)
            return said, process.wait(max(0.0, deadline - time.monotonic()))
        except (TimeoutError, subprocess.TimeoutExpired):
            return b"", None
        finally:
            process.kill()


def environment() -> dict[str, str]:
    """Nothing of ours but where its libraries are: no key, no address.  One arena, as 64 would fill the memory."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return kept | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}


def heard(process: subprocess.Popen[bytes], deadline: float) -> bytes:
    """All that the process writes, at most MOST_SAID and a little; raises TimeoutError at the deadline."""
    assert process.stdout is not None
    ear, said = select.poll(), b""  # not select(), which ends at descriptor 1024
    ear.register(process.stdout)
    while len(said) <= MOST_SAID:
        if not ear.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError
        piece = os.read(process.stdout.fileno(), MOST_SAID)
        if not piece:
            return said
        said += piece
    process.kill()
    return b""


def believed(said: bytes, status: int | None, limits: Limits, bounds: Bounds) -> Measured:
    """The report as numbers within the limits: a decoder that hostile bytes took over may write anything."""
    if status is None or status in (-signal.SIGXCPU, -signal.SIGALRM):
        refuse(f"takes more than {bounds.seconds:g} seconds to read; allowed: a shorter or smaller source")
    try:
        told = json.loads(said) if status == 0 else {}
        if isinstance(told.get("refused"), str):
            refuse("".join(char if char.isprintable() else "?" for char in told["refused"][:400]))
        found = Measured(**told)
        if plausible(found, limits):
            return found
    except (AttributeError, TypeError, ValueError, RecursionError):
        pass
    log.warning("the process that reads media ended with status %s and no report", status)
    refuse("is damaged, or needs more memory than there is; allowed: a shorter or smaller source")


def plausible(found: Measured, limits: Limits) -> bool:
    """Whether read_media could have come to this; raises UnreadableMedia where it is above the limits."""
    sizes = (found.width, found.height, found.frames)
    if not all(type(size) is int and size > 0 for size in sizes):
        return False
    Gate(MEDIA, limits).check(*sizes, 0)
    if found.kind == "image":
        return found.fps is None and found.frames == 1
    return found.kind == "video" and isinstance(found.fps, float) and 0 < found.fps <= limits.max_fps


# ---------------------------------------------------------------- the child


def child() -> None:
    """The process: its order is the first argument, the media its input; one line of JSON is its output."""
    order = json.loads(sys.argv[1])
    import_module("PIL.WebPImagePlugin")  # to find this one by itself, Pillow would load all its formats
    confine(Bounds(**order["bounds"]))
    limits = Limits(**order["limits"] | {"codecs": tuple(order["limits"]["codecs"])})
    os.write(1, json.dumps(report(limits)).encode())


def confine(bounds: Bounds) -> None:
    """Gives up for good what reading media does not need.  The alarm is for a child whose parent is gone."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    cpu = math.ceil(bounds.seconds)
    bound(resource.RLIMIT_AS, pages * resource.getpagesize() + bounds.memory)
    bound(resource.RLIMIT_CPU, cpu, cpu + 1)  # the first is SIGXCPU, which says why; the second SIGKILL
    bound(resource.RLIMIT_FSIZE, 0)
    bound(resource.RLIMIT_NOFILE, 16)
    bound(resource.RLIMIT_CORE, 0)
    signal.setitimer(signal.ITIMER_REAL, bounds.seconds)


def bound(what: int, soft: int, hard: int | None = None) -> None:
    """Lowers a limit; one that is lower already stays."""
    hard = soft if hard is None else hard
    before = resource.getrlimit(what)[1]
    hard = hard if before == resource.RLIM_INFINITY else min(hard, before)
    resource.setrlimit(what, (min(soft, hard), hard))


def report(limits: Limits) -> dict[str, object]:
    try:
        return asdict(measure_media(MEDIA, limits))
    except UnreadableMedia as error:
        return {"refused": str(error).removeprefix(f"source: '{MEDIA.name}' ")}
