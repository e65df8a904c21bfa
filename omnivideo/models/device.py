"""The device that a `--device` option or a setting names, and what the machine has free."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from omnivideo.cpu_threads import CGROUP_MEMBERSHIP, CGROUP_ROOT, iterate_cgroups
from omnivideo.errors import InvalidInput
from omnivideo.models.placement import Machine
from omnivideo.presets import DtypeName

MEMORY_INFO = Path("/proc/meminfo")
# The files of a cgroup's limit and usage, and the fields of memory.stat with the pages of files, which the system takes
# back when memory is needed: version 2, and version 1 with all cgroups below.
CGROUP_FILES = (
    ("memory.max", "memory.current", ("inactive_file", "active_file")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
)
DEVICE_TYPES = ("cpu", "cuda")  # those that placements know; torch has others, such as "meta" and "mps"
FAST_BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16")  # instructions of x86 and of Arm


def pick_device(name: str) -> torch.device:
    """Return the named device; "auto" is the first GPU, or the CPU on a machine without a GPU.

    Raises InvalidInput if the machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type in DEVICE_TYPES:
            return device
    except (RuntimeError, AssertionError, ImportError):
        pass
    raise InvalidInput("device", f"{name!r} is not available on this machine; use auto, cpu or cuda:N")


def measure_machine(device: torch.device) -> Machine:
    """Return the free memory of this machine and of the device, if it is a GPU."""
    gpu_bytes = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    return Machine(measure_free_memory(), gpu_bytes, list_fast_dtypes())


def list_fast_dtypes() -> tuple[DtypeName, ...]:
    """Return the types in which this CPU computes at least as fast as in float32.

    The CPU's instructions decide, not a measurement, which would differ from one start to the next and with it the
    bytes of clips. float16 is none of them: torch multiplies its matrices no faster, and its range is small.
    """
    capabilities = torch.cpu.get_capabilities()
    has_bfloat16 = any(capabilities.get(name) for name in FAST_BFLOAT16)
    return ("float32", "bfloat16") if has_bfloat16 else ("float32",)


def measure_free_memory() -> int:
    """Return the bytes that this process can take without displacing others, within its container's limit."""
    return min([read_available_memory(), *read_cgroups_free(CGROUP_ROOT, CGROUP_MEMBERSHIP)])


def read_available_memory() -> int:
    """Return the memory that the system calls available, or a half of all where it does not say."""
    for line in MEMORY_INFO.read_text().splitlines() if MEMORY_INFO.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def read_cgroups_free(root: Path, membership: Path) -> Iterator[int]:
    """Yield what each limited cgroup of this process, and each limited one above it, leaves free."""
    for folder in iterate_cgroups(root, membership, "memory"):
        for limit_file, usage_file, cache_fields in CGROUP_FILES:
            try:
                limit, usage = (int((folder / name).read_text()) for name in (limit_file, usage_file))
            except (OSError, ValueError):  # no such cgroup, or "max"
                continue
            yield max(0, limit - max(0, usage - read_cached_bytes(folder, cache_fields)))


def read_cached_bytes(folder: Path, fields: tuple[str, ...]) -> int:
    """Return the bytes of a cgroup's usage that are pages of files; weights that were read once are most of them."""
    try:
        values = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return sum(int(values.get(field, 0)) for field in fields)
    except (OSError, ValueError):
        return 0
