"""Give the memory of weights that are mapped from files back to the system; it is read again when it is needed.

safetensors, and so transformers and diffusers, map a file into memory instead of reading it. Pages that were read count
as resident memory of the process until the system reclaims them.
"""

import ctypes
import mmap
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from torch import Tensor

MEMORY_MAP = Path("/proc/self/maps")  # of Linux; elsewhere nothing is given back
SUFFIX = ".safetensors"


class MappedPages:
    """The memory of this process that is mapped from weights, as it was when the object was made."""

    def __init__(self) -> None:
        lines = MEMORY_MAP.read_text().splitlines() if MEMORY_MAP.exists() else []
        fields = [line.split(maxsplit=5) for line in lines if line.endswith(SUFFIX)]
        self.ranges = [(int(start, 16), int(end, 16)) for start, _, end in (row[0].partition("-") for row in fields)]

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor's data are pages of a file."""
        return tensor.device.type == "cpu" and self.find_range(tensor) is not None

    def find_range(self, tensor: Tensor) -> tuple[int, int] | None:
        start = tensor.data_ptr()
        return next((limits for limits in self.ranges if limits[0] <= start < limits[1]), None)

    def release(self, tensors: Iterable[Tensor]) -> None:
        """Give back the pages that belong to these tensors alone.

        Tensors in ordinary memory are left alone: advice of this kind would erase them. Mapped weights are frozen, so
        that their pages always equal the file.
        """
        for tensor in tensors:
            if not self.holds(tensor):
                continue
            first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            last = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if last > first:
                load_libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


@cache
def load_libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
