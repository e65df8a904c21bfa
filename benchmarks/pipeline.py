"""Compare our denoising and decoding with diffusers' WanPipeline: same weights, steps, size and condition.

python -m benchmarks.pipeline [--weights FOLDER] [--steps 20] [--runs 7]
"""

import argparse
import platform
import statistics
import time
import warnings
from pathlib import Path

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline

from omnivideo.models.omni import OmniVideoModel
from omnivideo.models.sampling import Expert, denoise, sample_initial_noise
from omnivideo.models.vae import decode_latents, pixels_to_bytes
from omnivideo.models.weights.checkpoint import load
from omnivideo.models.weights.shipped import find_shipped_weights

GUIDANCE, SHIFT = 3.0, 5.0


def time_ours(omni: OmniVideoModel, condition: torch.Tensor, null: torch.Tensor, steps: int) -> float:
    start = time.perf_counter()
    latents = sample_initial_noise([0], (16, 3, 8, 8), omni.device)
    for state in denoise([Expert(omni.decoder, condition, null)], latents, steps, GUIDANCE, SHIFT):
        latents = state.state.latents
    with torch.no_grad():
        pixels_to_bytes(decode_latents(omni.vae, latents))
    return time.perf_counter() - start


def time_wan_pipeline(pipeline: WanPipeline, condition: torch.Tensor, null: torch.Tensor, steps: int) -> float:
    start = time.perf_counter()
    pipeline(
        prompt_embeds=condition, negative_prompt_embeds=null, height=64, width=64, num_frames=9,
        num_inference_steps=steps, guidance_scale=GUIDANCE, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=None)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    omni = load(arguments.weights or find_shipped_weights("tiny"))
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)
    pipeline = WanPipeline(
        tokenizer=omni.tokenizer, text_encoder=omni.text_encoder, transformer=omni.decoder, vae=omni.vae,
        scheduler=scheduler,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        condition = omni.build_condition(["a small red circle moving right"], [None])
        null = omni.build_null_condition(omni.preset.null.negative_prompt, 1)
    pairs = [
        (
            time_ours(omni, condition, null, arguments.steps),
            time_wan_pipeline(pipeline, condition, null, arguments.steps),
        )
        for _ in range(arguments.runs + 1)
    ][1:]
    our_seconds, wan_seconds = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(our / wan for our, wan in pairs)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    size = f"{arguments.steps} steps, {arguments.runs} runs"
    print(f"ours {our_seconds:.3f} s, WanPipeline {wan_seconds:.3f} s, ratio {ratio:.3f} ({size})")


if __name__ == "__main__":
    main()
