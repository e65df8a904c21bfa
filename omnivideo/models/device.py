"""The device that a `--device` option or a setting names, and what the machine has free."""

import os
from pathlib import Path

import torch

from omnivideo.errors import InvalidInput
from omnivideo.models.placement import Machine
from omnivideo.presets import DtypeName

MEMORY_INFO = Path("/proc/meminfo")
CGROUP_LIMITS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
CGROUP_ROOT = Path("/sys/fs/cgroup")
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
    except (RuntimeError, AssertionError):
        raise InvalidInput("device", f"{name!r} is not available on this machine; use auto, cpu or cuda:N") from None
    return device


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
    limits = [free for names in CGROUP_LIMITS if (free := read_cgroup_free(*names)) is not None]
    return min([read_available_memory(), *limits])


def read_available_memory() -> int:
    """Return the memory that the system calls available, or a half of all where it does not say."""
    for line in MEMORY_INFO.read_text().splitlines() if MEMORY_INFO.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def read_cgroup_free(limit_file: str, usage_file: str) -> int | None:
    """Return a container's limit less what it uses, or None if there is no limit."""
    try:
        limit, usage = ((CGROUP_ROOT / name).read_text().strip() for name in (limit_file, usage_file))
        return max(0, int(limit) - int(usage))
    except (OSError, ValueError):
        return None
