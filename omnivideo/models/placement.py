"""Decide where each part of a model computes, from the parts' sizes and the free memory alone.

    plan_placement(parts, machine)  ->  Placement

In order of preference: every part stays on the GPU; parts take turns on it; the decoder's weights come to it in groups
of blocks; everything computes on the CPU. `offload` carries a placement out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from omnivideo.presets import DtypeName

Location = Literal["gpu", "gpu-in-turn", "gpu-in-blocks", "cpu"]
PlacementMode = Literal["all on the GPU", "parts in turn on the GPU", "decoder in blocks on the GPU", "CPU"]

GIB = 2**30
RESERVED_FRACTION = 0.05  # of the free memory: fragments of the allocator and what libraries keep
RESERVED_BYTES = GIB  # at least
BLOCKS_AT_ONCE = 2  # the block that computes, and the next one, which is copied meanwhile


@dataclass(frozen=True)
class PartSize:
    """The memory that a part needs: its weights, the largest of its blocks, and what its largest computation adds."""

    name: str
    dtype: DtypeName
    weights_bytes: int
    block_bytes: int
    working_bytes: int

    @property
    def is_decoder(self) -> bool:
        return self.name in ("decoder", "decoder_2")


@dataclass(frozen=True)
class Machine:
    """What a machine has free. Without a GPU, or with one that must not be used, `gpu_bytes` is None.

    `fast_dtypes` are the types in which its CPU computes at least as fast as in float32.
    """

    ram_bytes: int
    gpu_bytes: int | None = None
    fast_dtypes: tuple[DtypeName, ...] = ("float32",)


@dataclass(frozen=True)
class PartPlacement:
    """Where a part computes, and in which type. Weights that differ from it are cast one block at a time."""

    size: PartSize
    location: Location
    compute_dtype: DtypeName


@dataclass(frozen=True)
class Placement:
    """Where all parts compute. With `reads_from_disk`, the weights outside the GPU do not fit into memory together."""

    machine: Machine
    parts: tuple[PartPlacement, ...]
    reads_from_disk: bool

    def find_part(self, name: str) -> PartPlacement:
        return next(part for part in self.parts if part.size.name == name)

    @property
    def mode(self) -> PlacementMode:
        locations = {part.location for part in self.parts}
        if "gpu-in-blocks" in locations:
            return "decoder in blocks on the GPU"
        if locations == {"gpu"}:
            return "all on the GPU"
        return "parts in turn on the GPU" if locations & {"gpu", "gpu-in-turn"} else "CPU"

    def list_parts_that_need_room(self) -> set[str]:
        """Return the parts on the GPU that must not compute while one that takes turns is there.

        A visitor stays after it has computed, in which it needs as much as the small parts do.
        """
        visitors = [part.size.working_bytes for part in self.parts if part.location == "gpu-in-turn"]
        return {
            part.size.name
            for part in self.parts
            if visitors and part.location in ("gpu", "gpu-in-blocks") and part.size.working_bytes > min(visitors)
        }

    def choose_autocast(self, dtype: DtypeName | None) -> DtypeName | None:
        """Return the type that the decoder computes in beside that of its weights: none on a CPU that is slow in it."""
        return None if self.mode == "CPU" and dtype not in self.machine.fast_dtypes else dtype

    def describe(self) -> str:
        """Return the placement in one line, for a log."""
        parts = "; ".join(f"{part.size.name} {describe_part(part)}" for part in self.parts)
        gpu = self.machine.gpu_bytes
        free = f"{format_size(self.machine.ram_bytes)} of memory"
        free += f" and {format_size(gpu)} of the GPU's free" if gpu is not None else " free, no GPU"
        disk = "; weights are read from their files each time, because they do not fit into memory"
        return f"{self.mode} ({free}): {parts}{disk if self.reads_from_disk else ''}"


def describe_part(part: PartPlacement) -> str:
    """Return where a part computes and how large it is."""
    names = {"gpu": "GPU", "gpu-in-turn": "GPU in turn", "gpu-in-blocks": "GPU in blocks", "cpu": "CPU"}
    cast = "" if part.compute_dtype == part.size.dtype else f", each block cast to {part.compute_dtype}"
    return f"{names[part.location]} ({format_size(part.size.weights_bytes)} {part.size.dtype}{cast})"


def format_size(size_bytes: float) -> str:
    """Return a size in GB, or in MB below one of them."""
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.0f} MB"


def plan_placement(parts: Sequence[PartSize], machine: Machine) -> Placement:
    """Return where each part computes."""
    locations: dict[str, Location] = {part.name: "cpu" for part in parts}
    if machine.gpu_bytes is not None:
        usable = machine.gpu_bytes - max(RESERVED_BYTES, int(RESERVED_FRACTION * machine.gpu_bytes))
        locations = place_on_gpu(parts, usable) or locations
    placements = tuple(
        PartPlacement(part, locations[part.name], choose_compute_dtype(part, locations[part.name], machine))
        for part in parts
    )
    held_bytes = sum(part.size.weights_bytes for part in placements if part.location != "gpu")
    working_bytes = max((estimate_cpu_bytes(part) for part in placements if part.location == "cpu"), default=0)
    return Placement(machine, placements, held_bytes + working_bytes > machine.ram_bytes)


def place_on_gpu(parts: Sequence[PartSize], usable_bytes: int) -> dict[str, Location] | None:
    """Return the location of each part if the decoders can compute on a GPU with this much memory, otherwise None.

    A part that does not fit even alone computes on the CPU. Of those that fit, as many as possible stay, the smallest
    first; the others take turns.
    """
    locations: dict[str, Location] = {}
    for part in parts:
        if part.weights_bytes + part.working_bytes <= usable_bytes:
            locations[part.name] = "gpu-in-turn"
        elif part.is_decoder and BLOCKS_AT_ONCE * part.block_bytes + part.working_bytes <= usable_bytes:
            locations[part.name] = "gpu-in-blocks"
        elif part.is_decoder:
            return None
        else:
            locations[part.name] = "cpu"
    on_gpu = [part for part in parts if locations[part.name] != "cpu"]
    if not on_gpu:
        return None
    for part in sorted(on_gpu, key=lambda part: part.weights_bytes):
        staying: dict[str, Location] = locations | {part.name: "gpu"}
        if locations[part.name] == "gpu-in-turn" and count_peak_bytes(on_gpu, staying) <= usable_bytes:
            locations = staying
    return locations if count_peak_bytes(on_gpu, locations) <= usable_bytes else None


def count_peak_bytes(parts: Sequence[PartSize], locations: dict[str, Location]) -> int:
    """Return the most memory that the GPU's parts take at once: those that stay, and one that computes."""
    staying = sum(part.weights_bytes for part in parts if locations[part.name] == "gpu")
    return staying + max(count_visiting_bytes(part, locations[part.name]) + part.working_bytes for part in parts)


def count_visiting_bytes(part: PartSize, location: Location) -> int:
    """Return the weights that a part brings to the GPU when it computes."""
    match location:
        case "gpu-in-turn":
            return part.weights_bytes
        case "gpu-in-blocks":
            return BLOCKS_AT_ONCE * part.block_bytes
        case "gpu" | "cpu":
            return 0


def choose_compute_dtype(part: PartSize, location: Location, machine: Machine) -> DtypeName:
    """Return the type that a part computes in: that of its weights, or float32 on a CPU that is slow in it."""
    return part.dtype if location != "cpu" or part.dtype in machine.fast_dtypes else "float32"


def estimate_cpu_bytes(part: PartPlacement) -> int:
    """Return the memory beside its weights that a part on the CPU takes: a block in float32 if it is cast."""
    factor = 2 if part.compute_dtype != part.size.dtype else 0
    return part.size.working_bytes + factor * part.size.block_bytes
