"""Print how long reading odd media takes, and how much memory: `python -m benchmarks.odd_media`.

Each file is measured as an upload is: decoded completely in a confined process. The CPU time is that of this process,
with its start; the memory is its peak above that at its start. The figures in docs/service.md are from this command.
"""

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from av.video.reformatter import ColorTrc

from tests.support import odd_media

MEASURE = """
import re, sys, time
from pathlib import Path
from omnivideo.media.read import measure_media
def read_peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = read_peak()
info = measure_media(sys.argv[1])
print(f"{info.width}x{info.height}x{info.frames}", (read_peak() - before) / 1024)
"""


def write_hdr(path: Path, transfer: ColorTrc) -> Path:
    levels = np.full((720, 1280, 3), 203.0)
    return odd_media.write_hdr_clip(path, odd_media.encode_hdr_levels(levels, transfer), transfer, frames=25)


def write_large_still(path: Path, width: int, height: int) -> Path:
    return odd_media.write_still(path, odd_media.enlarge_gradient(width, height))


def write_moving_pictures(path: Path) -> Path:
    return odd_media.write_pictures(path, [odd_media.make_gradient(320, 240, index) for index in range(10)])


FILES: dict[str, Callable[[Path], Path]] = odd_media.CLIPS | {
    "pq-720p.mp4": lambda path: write_hdr(path, ColorTrc.SMPTE2084),
    "hlg-720p.mp4": lambda path: write_hdr(path, ColorTrc.ARIB_STD_B67),
    "12-megapixels.jpg": lambda path: write_large_still(path, 4000, 3000),
    "50-megapixels.jpg": lambda path: write_large_still(path, 8160, 6120),
    "50-megapixels.png": lambda path: write_large_still(path, 8160, 6120),
    "moving.webp": write_moving_pictures,
    "moving.avif": write_moving_pictures,
}


def measure_file(path: Path) -> tuple[str, float, float, float]:
    """Return the shape, the seconds of wall time and of CPU time, and the peak memory in MB."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    started_at = time.monotonic()
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    wall_seconds = time.monotonic() - started_at
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    shape, megabytes = done.stdout.split()
    cpu_seconds = after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime
    return shape, wall_seconds, cpu_seconds, float(megabytes)


def main() -> None:
    """Make every file, measure it and print a row of the table."""
    print("| file | read as | wall time (s) | CPU time (s) | memory (MB) |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, write in FILES.items():
            shape, wall_seconds, cpu_seconds, megabytes = measure_file(write(Path(folder) / name))
            print(f"| {name} | {shape} | {wall_seconds:.1f} | {cpu_seconds:.1f} | {megabytes:.0f} |", flush=True)


if __name__ == "__main__":
    main()
