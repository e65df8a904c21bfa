"""What benchmarks/gpu.sh runs.

Without weights, the decoder and the VAE of a preset get random ones. Each placement denoises the same noise; its
latents are compared with those of the whole model in float32. With weights, every task renders a fixed prompt and seed.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from omnivideo import Studio
from omnivideo.contracts import compute_latent_grid
from omnivideo.models.device import measure_machine, pick_device
from omnivideo.models.offload import iterate_blocks, place_parts
from omnivideo.models.omni import build_decoder
from omnivideo.models.placement import Location, Machine, PartPlacement, PartSize, Placement
from omnivideo.models.sampling import Expert, denoise, sample_initial_noise
from omnivideo.models.vae import decode_latents
from omnivideo.presets import DtypeName, Preset, SamplingDefaults, get_preset

PROMPTS = {
    "text-to-image": ("a red ball on wet sand, seen from above", 11, "one sharp picture of a red ball on sand"),
    "text-to-video": ("a red ball rolls over wet sand", 12, "a red ball that moves; sand and light stay as they are"),
    "image-editing": ("make the ball blue", 13, "the picture of text-to-image with a blue ball, all else as it was"),
    "video-editing": ("make the ball blue", 14, "the clip of text-to-video with a blue ball that moves as before"),
}
LARGEST_LATENTS_ERROR = 5e-2  # of bf16 against float32
SMALLEST_DEVIATION = 2.0  # of the bytes of a frame: less is a plain surface, as broken weights give it


@dataclass(frozen=True)
class Variant:
    """One way to run the same decoder: where its parts are, and in which type it computes."""

    name: str
    locations: dict[str, Location]
    dtype: DtypeName
    autocast: DtypeName | None


# ---------------------------------------------------------------- random weights


def list_variants(preset: Preset) -> list[Variant]:
    """Return the variants; the first is the reference."""
    dtype, autocast = preset.dtypes.get("decoder", "float32"), preset.autocast
    places: dict[str, dict[str, Location]] = {
        "all on the GPU": {"decoder": "gpu", "vae": "gpu"},
        "parts in turn": {"decoder": "gpu-in-turn", "vae": "gpu-in-turn"},
        "decoder in blocks": {"decoder": "gpu-in-blocks", "vae": "gpu"},
    }
    reference = Variant("all in float32", places["all on the GPU"], "float32", None)
    return [reference, *(Variant(name, locations, dtype, autocast) for name, locations in places.items())]


def create_states(preset: Preset) -> dict[str, dict[str, Tensor]]:
    """Return random weights of the decoder and the VAE, on the CPU."""
    torch.manual_seed(0)
    parts = {"decoder": build_decoder(preset), "vae": AutoencoderKLWan(**preset.vae)}
    return {name: part.state_dict() for name, part in parts.items()}


def build_parts(preset: Preset, states: dict[str, dict[str, Tensor]], variant: Variant) -> dict[str, Any]:
    """Return the parts in evaluation mode; weights in float32 are shared with `states`."""
    parts: dict[str, Any] = {"decoder": build_decoder(preset), "vae": AutoencoderKLWan(**preset.vae)}
    for name, part in parts.items():
        dtype = getattr(torch, variant.dtype) if name == "decoder" else torch.float32
        part.load_state_dict({key: value.to(dtype) for key, value in states[name].items()}, assign=True)
        part.eval().requires_grad_(False)
    return parts


def place_variant(parts: dict[str, Any], variant: Variant, machine: Machine, device: torch.device) -> Placement:
    """Place the parts as the variant says."""
    placements = []
    for name, part in parts.items():
        dtype: DtypeName = variant.dtype if name == "decoder" else "float32"
        blocks = max(sum(weight.nbytes for weight in weights) for _, weights in iterate_blocks(part))
        size = PartSize(name, dtype, sum(weight.nbytes for weight in part.parameters()), blocks, 0)
        placements.append(PartPlacement(size, variant.locations[name], dtype))
    placement = Placement(machine, tuple(placements), reads_from_disk=False)
    place_parts(parts, placement, device)
    return placement


@torch.no_grad()
def run_variant(
    preset: Preset, states: dict[str, dict[str, Tensor]], variant: Variant, size: SamplingDefaults, device: torch.device
) -> tuple[dict[str, Any], Tensor]:
    """Denoise and decode one clip; return the row of the report, and the latents."""
    parts = build_parts(preset, states, variant)
    placement = place_variant(parts, variant, measure_machine(device), device)
    reset_peak(device)
    generator = torch.Generator().manual_seed(1)
    conditions = [torch.randn(1, preset.condition.min_tokens, preset.text_width, generator=generator) for _ in range(2)]
    dtype = getattr(torch, variant.dtype)
    condition_BLD, null_BLD = (values.to(device, dtype) for values in conditions)
    autocast = getattr(torch, variant.autocast) if variant.autocast else None
    expert = Expert(parts["decoder"], condition_BLD, null_BLD, autocast=autocast)
    grid = compute_latent_grid(size.width, size.height, size.frames)
    noise = sample_initial_noise([1], (int(preset.decoder["in_channels"]), *grid), device)
    seconds, latents = [], noise
    started = time.perf_counter()
    for step in denoise([expert], noise.to(dtype), size.steps, size.guidance_scale, size.flow_shift):
        latents = step.state.latents
        synchronize(device)
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
    pixels = decode_latents(parts["vae"], latents.float())
    row = {
        "variant": variant.name,
        "placement": placement.mode,
        "decoder": f"{variant.dtype}, autocast {variant.autocast}",
        "seconds_per_step": round(sorted(seconds)[len(seconds) // 2], 4),
        "decoding_seconds": round(time.perf_counter() - started, 3),
        "peak_bytes": read_peak(device),
        "finite": bool(torch.isfinite(pixels).all()),
    }
    return row, latents.float().cpu()


def measure_random_weights(preset: Preset, size: SamplingDefaults, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield a row for each variant, with the distance of its latents from the reference's (relative L2)."""
    states, reference, whole = create_states(preset), None, None
    for variant in list_variants(preset):
        row, latents = run_variant(preset, states, variant, size, device)
        if reference is None:
            reference = latents
        elif whole is None:
            whole = latents
        error = float((latents - reference).norm() / reference.norm())
        yield row | {"latents_error": error, "faults": find_faults(row, error, latents, whole)}


def find_faults(row: dict[str, Any], error: float, latents: Tensor, whole: Tensor | None) -> list[str]:
    """Return what is wrong with a variant; `whole` are the latents with all parts on the GPU, in the same types."""
    faults = [] if row["finite"] else ["pixels are not finite"]
    if not error <= LARGEST_LATENTS_ERROR:
        faults.append(f"latents differ from those in float32 by more than {LARGEST_LATENTS_ERROR}")
    if whole is not None and not torch.equal(latents, whole):
        faults.append("latents depend on where the parts are")
    return faults


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def read_peak(device: torch.device) -> int | None:
    """Return the most memory that the GPU had in use, or None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------- given weights


def render_prompts(folder: Path, out: Path, device: str, steps: int | None) -> Iterator[dict[str, Any]]:
    """Render every task that the weights can do into `out`; yield the placement, then a row for each clip."""
    preset_name = json.loads((folder / "model_index.json").read_text())["preset"]
    studio = Studio(preset_name, folder, device, home=out / "home")
    assert studio.omni.placement is not None, "loaded weights are placed"
    yield {"placement": studio.omni.placement.describe()}
    files: dict[str, Path] = {}
    for task in PROMPTS:
        if task not in studio.omni.preset.sampling:
            continue
        prompt, seed, expected = PROMPTS[task]
        medium = "image" if "image" in task else "video"
        started = time.perf_counter()
        reset_peak(studio.omni.device)
        if task.startswith("text"):
            result = studio.generate(prompt, image=medium == "image", seed=seed, steps=steps)
        else:
            result = studio.edit(files[medium], prompt, seed=seed, steps=steps)
        path = result.save(out / f"{task}.{'png' if medium == 'image' else 'mp4'}")
        files.setdefault(medium, path)
        yield {
            "task": task, "prompt": prompt, "seed": seed, "file": path.name, "expect": expected,
            "seconds": round(time.perf_counter() - started, 2), "stages": result.seconds_by_stage,
            "peak_bytes": read_peak(studio.omni.device), "faults": find_visible_faults(result.frames),
        }  # fmt: skip


def find_visible_faults(frames: np.ndarray) -> list[str]:
    """Return what no good clip has; whether it shows what was asked for is for a person to see."""
    if frames.std(axis=(1, 2)).max() < SMALLEST_DEVIATION:
        return ["plain surfaces"]
    if len(frames) > 1 and not (frames[1:] != frames[:-1]).any():
        return ["no motion at all"]
    return []


# ---------------------------------------------------------------- command line


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu.sh", description=__doc__)
    parser.add_argument("--weights", type=Path, help="folder of weights in our format")
    parser.add_argument("--preset", default="omnivideo-1.3b", help="shapes of the random weights")
    parser.add_argument("--task", default="text-to-video", choices=PROMPTS, help="whose default size is denoised")
    parser.add_argument("--steps", type=int, help="denoising steps; by default 8, or the preset's with --weights")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dry-run", action="store_true", help="the tiny preset on the CPU, two steps")
    return parser.parse_args()


def list_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows of the report."""
    if options.weights:
        yield from render_prompts(options.weights, options.out, options.device, options.steps)
        return
    preset = get_preset(options.preset)
    if options.dry_run:
        preset = preset.model_copy(update={"autocast": "bfloat16"})  # so that there is something to compare
    size = preset.sampling[options.task].model_copy(update={"steps": options.steps or 8})
    yield from measure_random_weights(preset, size, pick_device(options.device))


def main() -> None:
    options = parse_arguments()
    if options.dry_run:
        options.preset, options.task, options.device, options.steps = "tiny", "text-to-image", "cpu", 2
    device = pick_device(options.device)
    if options.device == "auto" and device.type == "cpu":
        sys.exit("no GPU is visible to torch; --dry-run needs none, and --device cpu runs everything on the CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    rows: list[dict[str, Any]] = [{"device": name, "torch": torch.__version__}]
    print(json.dumps(rows[0]))
    for row in list_rows(options):
        rows.append(row)
        print(json.dumps(row), flush=True)
    (options.out / "report.json").write_text(json.dumps(rows, indent=2) + "\n")
    if any(row.get("faults") for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
