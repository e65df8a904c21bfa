"""GPUs with their published figures, and the fraction of their peak that a run reaches."""

from dataclasses import dataclass

from omnivideo.errors import InvalidInput


@dataclass(frozen=True)
class GPU:
    """A GPU as its datasheet describes it; the peak is that of dense bf16 matrix products.

    `link_gb_per_second` is the bandwidth, in one direction, to another GPU of the same node.
    """

    name: str
    peak_tflops: float
    memory_gb: float
    memory_gb_per_second: float
    link_gb_per_second: float
    datasheet: str


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("A100-40", 312, 40, 1555, 300, "NVIDIA A100 datasheet, SXM4 40 GB"),
        GPU("A100", 312, 80, 2039, 300, "NVIDIA A100 datasheet, SXM4 80 GB"),
        GPU("L40S", 362, 48, 864, 32, "NVIDIA L40S datasheet; PCIe 4.0 x16"),
        GPU("H100-PCIe", 756, 80, 2000, 64, "NVIDIA H100 datasheet, PCIe; half of the figure with sparsity"),
        GPU("H100", 989, 80, 3350, 450, "NVIDIA H100 datasheet, SXM5; half of the figure with sparsity"),
        GPU("H200", 989, 141, 4800, 450, "NVIDIA H200 datasheet, SXM; half of the figure with sparsity"),
        GPU("B200", 2250, 180, 7700, 900, "NVIDIA DGX B200 datasheet, an eighth; half of the figure with sparsity"),
    )
}


def parse_gpus(text: str) -> tuple[int, GPU]:
    """Parse a number of GPUs and their name, such as "8xH100"; raise InvalidInput if either is unknown."""
    count, separator, name = text.partition("x")
    if not (separator and count.isascii() and count.isdigit() and int(count) >= 1):
        raise InvalidInput("gpus", f"{text!r} is not of the form COUNTxNAME, e.g. 8xH100")
    if name not in GPUS:
        raise InvalidInput("gpus", f"{name!r} is not one of {', '.join(GPUS)}")
    return int(count), GPUS[name]


def find_peak_flops(device_name: str) -> float | None:
    """Return the bf16 peak of a device in FLOP/s, or None if the device is unknown.

    A GPU of GPUS matches if every part of its name occurs in the device's name; the longest match counts.
    """
    matches = [name for name in GPUS if all(word in device_name for word in name.split("-"))]
    return GPUS[max(matches, key=len)].peak_tflops * 1e12 if matches else None


def tflops_per_second(operations: float, seconds: float, gpus: int = 1) -> float:
    """Return the TFLOP/s of each GPU, given the operations of all GPUs together."""
    return operations / seconds / gpus / 1e12


def compute_mfu(operations: float, seconds: float, peak_tflops: float, gpus: int = 1) -> float:
    """Return the fraction of the peak that was reached (model FLOPs utilisation).

    `operations` are those of the model; operations that are repeated to save memory must not be included.
    """
    return tflops_per_second(operations, seconds, gpus) / peak_tflops
