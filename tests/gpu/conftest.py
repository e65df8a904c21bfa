"""Fixtures of the GPU tests: the device, or a skip with its reason, and the shipped model on it."""

import pytest
import torch

from omnivideo.models.omni import OmniVideoModel
from omnivideo.models.weights import checkpoint
from omnivideo.models.weights.shipped import find_shipped_weights


@pytest.fixture(scope="session")
def device() -> torch.device:
    if not torch.cuda.is_available():
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
        pytest.skip(f"no NVIDIA GPU: torch.cuda.is_available() is False (torch {torch.__version__}, built for {build})")
    return torch.device("cuda:0")


@pytest.fixture(scope="module")
def cpu_omni() -> OmniVideoModel:
    return checkpoint.load(find_shipped_weights("tiny"), torch.device("cpu"))


@pytest.fixture
def gpu_omni(device) -> OmniVideoModel:
    return checkpoint.load(find_shipped_weights("tiny"), device)
