"""Training in figures: a stage's step at full size, against a plain PyTorch loop over the diffusers model.

    python -m benchmarks.training [--preset omnivideo-1.3b] [--size 832x480x17] [--processes 1] [--checkpointing]
        [--compiled] [--passes 1]
    torchrun --nproc-per-node 1 -m benchmarks.training --what "stage 3" --compiled    # DeepSpeed with one process

One command on a GPU node: stage 2b and stage 3 with random weights and data, text-to-video, in bf16 with fp32 master
weights, by DeepSpeed ZeRO-1 where there are several processes, as `omnivideo train` does; step time, samples/s,
TFLOP/s, share of the peak (MFU) and memory of each, then the plain loop's (bf16 weights, autograd, torch's AdamW, one
process; the decoder alone, which is all it has).  FLOPs are those of `training/flops.py`: forward and backward as the
stage trains, attention included, recomputation not.

On a machine without a GPU it runs with --device cpu --preset tiny --size 64x64x9, to see that it works.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from omnivideo.models.omni import Bridge, OmniVideoModel, build_decoder
from omnivideo.presets import Preset, compute_latent_grid, count_decoder_tokens, get_preset
from omnivideo.training.data.batch import CachedTask, RaggedTensor
from omnivideo.training.engine.distributed.launcher import launch_processes
from omnivideo.training.engine.distributed.processes import ProcessContext, is_launched, open_process_context
from omnivideo.training.engine.monitor import measure_peak_memory
from omnivideo.training.engine.recipe import Recipe
from omnivideo.training.planning.flops import count_decoder_flops
from omnivideo.training.planning.gpus import find_peak_flops
from omnivideo.training.tiny.flow_stages import build_stage2b_recipe, build_stage3_recipe

STAGES = {"stage 2b": build_stage2b_recipe, "stage 3": build_stage3_recipe}
PLAIN = "plain loop"
HIDDEN, TEXT = 256, 128  # tokens of a request, and of its prompt
ROWS = 8


class RandomOmni(OmniVideoModel):
    """A bridge and a decoder; all that is frozen is in the data."""

    def texts(self, prompts: Any) -> list[Tensor]:
        return [torch.randn(TEXT // 4, self.preset.text_width, device=self.device) for _ in prompts]


def random_omni(chosen: Preset, device: torch.device) -> OmniVideoModel:
    absent: Any = nn.Identity()
    with device:
        bridge, decoder = Bridge(chosen), build_decoder(chosen)
    return RandomOmni(chosen, absent, absent, absent, bridge, decoder, absent, absent, absent)


def random_data(chosen: Preset, size: tuple[int, int, int]) -> CachedTask:
    """Clips, as both groups of tasks have them here: every step is alike."""
    assert chosen.vision_head is not None
    head = chosen.vision_head
    hidden, text = (
        RaggedTensor.from_rows([torch.randn(count, width) for _ in range(ROWS)])
        for count, width in ((HIDDEN, head.input_dim), (min(TEXT, chosen.max_text_tokens), chosen.text_width))
    )
    targets = torch.randn(ROWS, chosen.decoder["in_channels"], *compute_latent_grid(*size)).half()
    return CachedTask(targets, None, hidden, text, torch.randn(ROWS, head.num_queries, head.width))


@dataclass
class Measured:
    """Medians of the steps after the first ones."""

    seconds: float
    flops: float
    bytes: float
    samples: int

    def line(self, name: str, peak: float | None) -> str:
        share = f"MFU {self.flops / self.seconds / peak:.3f}" if peak else "MFU unknown"
        return (
            f"{name:12} {1000 * self.seconds:9.1f} ms/step {self.samples / self.seconds:7.2f} samples/s "
            f"{self.flops / self.seconds / 1e12:8.2f} TFLOP/s  {share}  {self.bytes / 1e9:6.2f} GB"
        )


def timed(step: Callable[[], Any], steps: int, device: torch.device) -> float:
    """The median time of a step in s; the first two warm up."""
    times = []
    for _ in range(steps + 2):
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def stage(world: ProcessContext, name: str, given: argparse.Namespace) -> Measured:
    chosen, device = get_preset(given.preset), torch.device(given.device)
    drawn = random_data(chosen, given.size)
    batch = given.batch * world.world_size // given.sequence
    data: Any = {task: drawn for task in ("text-to-image", "text-to-video")}
    omni = random_omni(chosen, device)
    if given.compiled:
        omni.decoder.compile_repeated_blocks()
    recipe: Recipe = STAGES[name](omni, data, steps=1000, batch_sizes=(batch, batch))
    precision = torch.bfloat16 if device.type == "cuda" else torch.float32
    many = replace(
        recipe, optimizer="adamw", lr_schedule="cosine", precision=precision, device=device,
        checkpointing=given.checkpointing, adam_lr=1e-5,
        micro_batch_losses=lambda step: [*recipe.micro_batch_losses(step)] * given.passes,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer = world.create_trainer(many, Path(folder))
        seconds = timed(trainer.train_step, given.steps, device)
    assert recipe.step_flops is not None
    flops = recipe.step_flops(trainer.step - 1) * given.passes
    return Measured(seconds, flops, measure_peak_memory(device), batch * given.passes)


def plain(given: argparse.Namespace) -> Measured:
    """What one would write by hand: the decoder, all of it trained, under random conditions."""
    chosen, device = get_preset(given.preset), torch.device(given.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        decoder = WanTransformer3DModel(**chosen.decoder).to(dtype)
    if given.compiled:
        decoder.compile_repeated_blocks()
    if given.checkpointing:
        decoder.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-5, fused=device.type == "cuda")
    latents = torch.randn(given.batch, chosen.decoder["in_channels"], *compute_latent_grid(*given.size)).to(
        device, dtype
    )
    condition = torch.randn(given.batch, chosen.min_condition_tokens, chosen.text_width).to(device, dtype)

    def step() -> None:
        at = torch.rand(given.batch, device=device)
        noise = torch.randn_like(latents)
        level = at.view(-1, 1, 1, 1, 1).to(dtype)
        found = decoder((1 - level) * latents + level * noise, at * 1000, condition, return_dict=False)[0]
        (found - (noise - latents)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    tokens = count_decoder_tokens(chosen, compute_latent_grid(*given.size))
    flops = count_decoder_flops(chosen.decoder, tokens, chosen.min_condition_tokens).with_backward.total * given.batch
    return Measured(timed(step, given.steps, device), flops, measure_peak_memory(device), given.batch)


def run(given: argparse.Namespace) -> None:
    """One line, in processes of its own: nothing is left over in memory from the one before."""
    sequence = 1 if given.what == PLAIN else given.sequence
    with open_process_context(1, sequence, given.device) as world:
        found = stage(world, given.what, given) if given.what in STAGES else plain(given)
        name = torch.cuda.get_device_name() if given.device == "cuda" else ""
        peak = find_peak_flops(name)
        if world.is_main_process:
            print(found.line(given.what, peak and peak * world.world_size), name, flush=True)


def main() -> None:
    reader = argparse.ArgumentParser()
    reader.add_argument("--preset", default="omnivideo-1.3b")
    reader.add_argument("--size", default="832x480x17", help="WIDTHxHEIGHTxFRAMES")
    reader.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    reader.add_argument("--batch", type=int, default=1, help="clips of each process, or group that shares tokens")
    reader.add_argument("--passes", type=int, default=1, help="of a stage's step, over the same clips")
    reader.add_argument("--steps", type=int, default=10)
    reader.add_argument("--processes", type=int, default=1)
    reader.add_argument("--sequence", type=int, default=1)
    reader.add_argument("--checkpointing", action="store_true")
    reader.add_argument("--compiled", action="store_true", help="torch.compile the decoder's blocks")
    reader.add_argument("--what", help="one line of these only")
    given = reader.parse_args()
    given.size = tuple(map(int, given.size.split("x")))
    if is_launched() or (given.what and given.processes == 1):
        run(given)
        return
    for what in [given.what] if given.what else (*STAGES, PLAIN):
        processes = 1 if what == PLAIN else given.processes
        command = [sys.executable, "-m", "benchmarks.training", *sys.argv[1:]]
        command += ["--what", what, "--processes", str(processes)]
        if code := launch_processes(processes, command) if processes > 1 else subprocess.call(command):
            sys.exit(code)


if __name__ == "__main__":
    main()
