"""Measure a step of training at full size, and compare it with a plain PyTorch loop over the diffusers model.

    python -m benchmarks.training [--preset omnivideo-1.3b] [--size 832x480x17] [--processes 1] [--checkpointing]
        [--compiled] [--passes 1]
    torchrun --nproc-per-node 1 -m benchmarks.training --what "stage 3" --compiled    # DeepSpeed with one process

On a GPU it trains stage 2b and stage 3 with random weights and data, text-to-video, in bf16 with fp32 master weights,
as `omnivideo train` does: with DeepSpeed ZeRO-1 if there are several processes. It prints the step time, samples/s,
TFLOP/s, MFU and memory of each stage, and then of the plain loop (bf16 weights, autograd, torch's AdamW, one process,
the decoder only). The operations are those of `training/planning/flops.py`: forward and backward passes as the stage
trains, with attention and without recomputation.

On a machine without a GPU, `--device cpu --preset tiny --size 64x64x9` shows that it works.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from omnivideo.contracts import compute_latent_grid, count_decoder_tokens
from omnivideo.models.omni import Bridge, OmniVideoModel, build_decoder
from omnivideo.presets import Preset, get_preset
from omnivideo.training.data.batch import CachedTask, RaggedTensor
from omnivideo.training.engine.distributed.launcher import launch_processes
from omnivideo.training.engine.distributed.processes import ProcessContext, is_launched, open_process_context
from omnivideo.training.engine.monitor import measure_peak_memory
from omnivideo.training.engine.recipe import Recipe
from omnivideo.training.planning.flops import count_decoder_flops
from omnivideo.training.planning.gpus import find_peak_flops
from omnivideo.training.tiny.flow_stages import build_stage2b_recipe, build_stage3_recipe

STAGES = {"stage 2b": build_stage2b_recipe, "stage 3": build_stage3_recipe}
PLAIN_LOOP = "plain loop"
HIDDEN_TOKENS, TEXT_TOKENS = 256, 128  # of a request and of its prompt
SAMPLES = 8


class RandomOmni(OmniVideoModel):
    """A bridge and a decoder; the outputs of the frozen models are in the data."""

    def encode_prompts(self, prompts: Sequence[str], field: str = "prompt") -> list[Tensor]:
        return [torch.randn(TEXT_TOKENS // 4, self.preset.text_width, device=self.device) for _ in prompts]


def build_random_model(preset: Preset, device: torch.device) -> OmniVideoModel:
    absent: Any = nn.Identity()
    with device:
        bridge, decoder = Bridge(preset), build_decoder(preset)
    return RandomOmni(preset, absent, absent, bridge, decoder, absent, absent, absent)


def make_random_data(preset: Preset, size: tuple[int, int, int]) -> CachedTask:
    """Return clips for both groups of tasks, so that all steps are alike."""
    assert preset.vision_head is not None
    head = preset.vision_head
    hidden, text = (
        RaggedTensor.from_rows([torch.randn(count, width) for _ in range(SAMPLES)])
        for count, width in (
            (HIDDEN_TOKENS, head.input_dim),
            (min(TEXT_TOKENS, preset.text.max_tokens), preset.text_width),
        )
    )
    targets = torch.randn(SAMPLES, preset.decoder["in_channels"], *compute_latent_grid(*size)).half()
    return CachedTask(targets, None, hidden, text, torch.randn(SAMPLES, head.num_queries, head.width))


@dataclass
class Measurement:
    """The median time of a step, with its operations, peak memory and samples."""

    seconds: float
    flops: float
    peak_bytes: float
    samples: int

    def format_line(self, name: str, peak: float | None) -> str:
        mfu = f"MFU {self.flops / self.seconds / peak:.3f}" if peak else "MFU unknown"
        return (
            f"{name:12} {1000 * self.seconds:9.1f} ms/step {self.samples / self.seconds:7.2f} samples/s "
            f"{self.flops / self.seconds / 1e12:8.2f} TFLOP/s  {mfu}  {self.peak_bytes / 1e9:6.2f} GB"
        )


def time_step(step: Callable[[], Any], steps: int, device: torch.device) -> float:
    """Return the median time of a step in seconds; two further steps warm up."""
    times = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def measure_stage(context: ProcessContext, name: str, arguments: argparse.Namespace) -> Measurement:
    preset, device = get_preset(arguments.preset), torch.device(arguments.device)
    samples = make_random_data(preset, arguments.size)
    batch = arguments.batch * context.world_size // arguments.sequence
    data: Any = {task: samples for task in ("text-to-image", "text-to-video")}
    omni = build_random_model(preset, device)
    if arguments.compiled:
        omni.decoder.compile_repeated_blocks()
    recipe: Recipe = STAGES[name](omni, data, steps=1000, batch_sizes=(batch, batch))
    precision = torch.bfloat16 if device.type == "cuda" else torch.float32
    recipe_to_time = replace(
        recipe, optimizer="adamw", lr_schedule="cosine", precision=precision, device=device,
        checkpointing=arguments.checkpointing, adam_lr=1e-5,
        micro_batch_losses=lambda step: [*recipe.micro_batch_losses(step)] * arguments.passes,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer = context.create_trainer(recipe_to_time, Path(folder))
        seconds = time_step(trainer.train_step, arguments.steps, device)
    assert recipe.step_flops is not None
    flops = recipe.step_flops(trainer.step - 1) * arguments.passes
    return Measurement(seconds, flops, measure_peak_memory(device), batch * arguments.passes)


def measure_plain_loop(arguments: argparse.Namespace) -> Measurement:
    """Measure a hand-written loop that trains the full decoder under random conditions."""
    preset, device = get_preset(arguments.preset), torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        decoder = WanTransformer3DModel(**preset.decoder).to(dtype)
    if arguments.compiled:
        decoder.compile_repeated_blocks()
    if arguments.checkpointing:
        decoder.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-5, fused=device.type == "cuda")
    latents = torch.randn(arguments.batch, preset.decoder["in_channels"], *compute_latent_grid(*arguments.size)).to(
        device, dtype
    )
    condition = torch.randn(arguments.batch, preset.condition.min_tokens, preset.text_width).to(device, dtype)

    def step() -> None:
        times = torch.rand(arguments.batch, device=device)
        noise = torch.randn_like(latents)
        level = times.view(-1, 1, 1, 1, 1).to(dtype)
        velocity = decoder((1 - level) * latents + level * noise, times * 1000, condition, return_dict=False)[0]
        (velocity - (noise - latents)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    tokens = count_decoder_tokens(preset, compute_latent_grid(*arguments.size))
    flops = (
        count_decoder_flops(preset.decoder, tokens, preset.condition.min_tokens).with_backward.total * arguments.batch
    )
    return Measurement(time_step(step, arguments.steps, device), flops, measure_peak_memory(device), arguments.batch)


def print_measurement(arguments: argparse.Namespace) -> None:
    """Measure and print one line, in a new process so that no memory is in use by the previous one."""
    sequence = 1 if arguments.what == PLAIN_LOOP else arguments.sequence
    with open_process_context(1, sequence, arguments.device) as context:
        is_stage = arguments.what in STAGES
        measurement = measure_stage(context, arguments.what, arguments) if is_stage else measure_plain_loop(arguments)
        name = torch.cuda.get_device_name() if arguments.device == "cuda" else ""
        peak = find_peak_flops(name)
        if context.is_main_process:
            print(measurement.format_line(arguments.what, peak and peak * context.world_size), name, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="omnivideo-1.3b")
    parser.add_argument("--size", default="832x480x17", help="WIDTHxHEIGHTxFRAMES")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument(
        "--batch", type=int, default=1, help="clips of each process, or of each group that shares tokens"
    )
    parser.add_argument("--passes", type=int, default=1, help="micro-batches in a step, over the same clips")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--compiled", action="store_true", help="torch.compile the decoder's blocks")
    parser.add_argument("--what", help="measure only this: stage 2b, stage 3 or plain loop")
    arguments = parser.parse_args()
    arguments.size = tuple(map(int, arguments.size.split("x")))
    if is_launched() or (arguments.what and arguments.processes == 1):
        print_measurement(arguments)
        return
    for what in [arguments.what] if arguments.what else (*STAGES, PLAIN_LOOP):
        processes = 1 if what == PLAIN_LOOP else arguments.processes
        command = [sys.executable, "-m", "benchmarks.training", *sys.argv[1:]]
        command += ["--what", what, "--processes", str(processes)]
        if code := launch_processes(processes, command) if processes > 1 else subprocess.call(command):
            sys.exit(code)


if __name__ == "__main__":
    main()
