"""What this machine can do with a folder of weights, for `omnivideo doctor --weights`.

The seconds of a clip come from a model, not from a run: the operations of each part, divided by the matrix products
that this machine does in a second, measured here, and the bytes that are copied to a GPU, divided by its measured rate.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from omnivideo.contracts import compute_latent_grid, count_decoder_tokens, count_visual_tokens
from omnivideo.models.device import measure_machine
from omnivideo.models.placement import (
    PartPlacement,
    Placement,
    describe_part,
    format_size,
    plan_placement,
)
from omnivideo.models.weights.checkpoint import list_part_names
from omnivideo.models.weights.part_sizes import FOLDERS, count_elements, measure_parts
from omnivideo.models.weights.shipped import read_index
from omnivideo.presets import Preset, SamplingDefaults, Task, get_preset
from omnivideo.settings import load_settings
from omnivideo.training.planning.flops import count_decoder_flops, count_query_transformer_flops
from omnivideo.training.planning.models import count_vae_flops

REQUEST_TOKENS = 512  # of the language model and of the text encoder: a long prompt and one frame
PROBE_SHAPE, PROBE_SECONDS = (1024, 2048, 4096), 0.2
PROBE_BYTES = 64 << 20
VAE_SAMPLE_FRAMES = 5  # counted, and scaled to the frames of a clip
GUIDANCE_PASSES = 2


def describe_folder(folder: Path, device: torch.device) -> Iterator[tuple[str, str]]:
    """Yield the name and the value of each row. Raises CheckpointError if the folder is not one of ours.

    With an MLLM server in the settings, they are those of a worker beside it.
    """
    settings = load_settings()
    preset = get_preset(read_index(folder)["preset"])
    preset = preset.in_float32() if settings.precision == "float32" else preset
    names = list_part_names(preset, "without-mllm" if settings.mllm else "all")
    missing = [name for name in names if not (folder / FOLDERS.get(name, name)).is_dir()]
    names = tuple(name for name in names if name not in missing)
    placement = plan_placement(measure_parts(folder, preset, names), measure_machine(device))
    yield "weights", f"{preset.name}, {format_size(sum(part.size.weights_bytes for part in placement.parts))}"
    if preset.condition.optional_markers and "markers" in missing:
        missing.remove("markers")
    if missing:
        yield "missing", f"{', '.join(missing)}; what follows is without them"
    yield "placement", placement.describe().split(":")[0]
    for part in placement.parts:
        work = f"up to {format_size(part.size.working_bytes)} more while it computes"
        yield part.size.name, f"{describe_part(part)}, {work}"
    if placement.reads_from_disk:
        yield "note", "the weights outside the GPU do not fit into memory: they are read from their files each time"
    rates = measure_rates(preset, placement, device)
    operations = {name: count_once_flops(preset, folder, name) for name in names}
    for task in preset.sampling:
        yield task, describe_task(preset, placement, task, operations, rates)
    yield "model of the times", describe_model(rates)


# ---------------------------------------------------------------- operations


def count_once_flops(preset: Preset, folder: Path, name: str) -> float:
    """Return the operations of a part that computes once for a clip; 0 for the decoder and the VAE."""
    if name == "adapter" and preset.adapter is not None:
        return count_query_transformer_flops(preset.adapter, 1).total * count_visual_tokens(preset, 5)
    if name == "text_encoder":
        return 2.0 * REQUEST_TOKENS * sum(count for key, count in count_elements(folder / name) if "shared" not in key)
    if name == "mllm":
        return 2.0 * REQUEST_TOKENS * count_active_weights(folder / name)
    return 0.0


def count_active_weights(folder: Path) -> float:
    """Return the weights of a language model that a token is multiplied with: a few of its experts, and no table."""
    config = json.loads((folder / "config.json").read_text()).get("text_config", {})
    fraction = config.get("num_experts_per_tok", 1) / config.get("num_experts", 1)
    tables = ("embed_tokens", "lm_head")
    counts = ((key, count) for key, count in count_elements(folder) if not any(name in key for name in tables))
    return sum(count * (fraction if ".experts." in key else 1) for key, count in counts)


def count_step_flops(preset: Preset, defaults: SamplingDefaults) -> float:
    """Return the operations of one denoising step, with and without the condition."""
    tokens = count_decoder_tokens(preset, compute_latent_grid(defaults.width, defaults.height, defaults.frames))
    passes = 1 if defaults.guidance_scale == 1 else GUIDANCE_PASSES
    return passes * count_decoder_flops(preset.decoder, tokens, preset.condition.min_tokens).total


def count_pixel_flops(preset: Preset, task: Task, defaults: SamplingDefaults) -> float:
    """Return the operations of the VAE, whose decoder takes about as many as its encoder; an edit needs both."""
    frames = min(defaults.frames, VAE_SAMPLE_FRAMES)
    sample = count_vae_flops(preset.name, defaults.width, defaults.height, frames).total
    scale = (defaults.frames + 3) / (frames + 3)  # latent frames
    return sample * scale * (2 if task.endswith("editing") else 1)


# ---------------------------------------------------------------- the machine


def measure_matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations per second of matrix products of a block's size."""
    rows, inner, columns = PROBE_SHAPE
    left, right = (torch.ones(shape, dtype=dtype, device=device) for shape in ((rows, inner), (inner, columns)))
    left @ right
    synchronize(device)
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < PROBE_SECONDS:
        left @ right
        synchronize(device)
        count += 1
    return 2.0 * rows * inner * columns * count / elapsed


def measure_copy_rate(device: torch.device) -> float:
    """Return the bytes per second of copies from memory to a device."""
    source = torch.ones(PROBE_BYTES, dtype=torch.uint8)
    source.to(device)
    synchronize(device)
    started = time.perf_counter()
    source.clone().to(device)
    synchronize(device)
    return PROBE_BYTES / (time.perf_counter() - started)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_rates(preset: Preset, placement: Placement, device: torch.device) -> dict[str, float]:
    """Return the rate of each kind of work that the placement needs, such as "CPU bfloat16" or "copies"."""
    rates: dict[str, float] = {}
    for part in placement.parts:
        kind = name_rate(preset, placement, part)
        if kind not in rates:
            place = torch.device("cpu") if part.location == "cpu" else device
            rates[kind] = measure_matmul_rate(place, getattr(torch, kind.split()[1]))
    if placement.mode not in ("CPU", "all on the GPU"):
        rates["copies"] = measure_copy_rate(device)
    return rates


def name_rate(preset: Preset, placement: Placement, part: PartPlacement) -> str:
    """Return where and in which type a part multiplies."""
    on_cpu, dtype = part.location == "cpu", part.compute_dtype
    if (
        preset.autocast
        and part.size.is_decoder
        and not (on_cpu and preset.autocast not in placement.machine.fast_dtypes)
    ):
        dtype = preset.autocast
    return f"{'CPU' if on_cpu else 'GPU'} {dtype}"


# ---------------------------------------------------------------- seconds


def describe_task(
    preset: Preset, placement: Placement, task: Task, operations: dict[str, float], rates: dict[str, float]
) -> str:
    """Return the expected seconds of a task's default clip, and what they are spent on."""
    defaults = preset.sampling[task]
    seconds = {
        part.size.name: estimate_part_seconds(preset, placement, part, task, operations, rates)
        for part in placement.parts
    }
    total = sum(seconds.values())
    largest = sorted((name for name, value in seconds.items() if value > 0.01 * total), key=lambda name: -seconds[name])
    shares = ", ".join(f"{name} {seconds[name]:,.1f}" for name in largest)
    size = f"{defaults.width}x{defaults.height}x{defaults.frames}, {defaults.steps} steps"
    return f"at least {total:,.1f} s for {size} ({shares})"


def estimate_part_seconds(
    preset: Preset,
    placement: Placement,
    part: PartPlacement,
    task: Task,
    operations: dict[str, float],
    rates: dict[str, float],
) -> float:
    """Return the seconds that a part computes for one clip, or is copied if that takes longer."""
    defaults, name = preset.sampling[task], part.size.name
    rate = rates[name_rate(preset, placement, part)]
    copies = part.size.weights_bytes / rates["copies"] if part.location in ("gpu-in-turn", "gpu-in-blocks") else 0.0
    if name == "vae":
        return count_pixel_flops(preset, task, defaults) / rate + copies
    if not part.size.is_decoder:
        return operations[name] / rate + copies
    # Two experts share the steps; how many each does changes little, since they are of one size.
    steps = defaults.steps / preset.experts.num_decoders
    step_seconds = count_step_flops(preset, defaults) / rate
    if part.location == "gpu-in-blocks":
        return steps * max(step_seconds, GUIDANCE_PASSES * copies)
    return steps * step_seconds + copies


def describe_model(rates: dict[str, float]) -> str:
    """Return how the seconds were computed."""
    names = ", ".join(
        f"{rate / 1e9:,.1f} GB/s of copies to the GPU" if kind == "copies" else f"{rate / 1e9:,.0f} GFLOP/s on {kind}"
        for kind, rate in rates.items()
    )
    return (
        f"operations of the parts / matrix products measured now ({names}); no run. Reading files, and text that the "
        "language model writes, come on top"
    )
