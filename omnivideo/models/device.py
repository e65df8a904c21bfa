"""The device that a `--device` option or a setting names."""

import torch

from omnivideo.errors import InvalidInput


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
