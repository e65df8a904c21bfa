"""TODO docstring of omnivideo/models/device.py."""

from typing import TYPE_CHECKING

import torch

from omnivideo.errors import InvalidInput

if TYPE_CHECKING:
    pass


def pick_device(name: str) -> torch.device:
    """ "auto" is the first GPU, else the CPU; raises InvalidInput for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise InvalidInput("device", f"{name!r} is not here; use auto, cpu or cuda:N") from None
    return device
