"""Compare stage 3 on clips sampled at 12 frames a second with 8, the rate of stages 1 and 2 (section 4.3).

    python -m benchmarks.frame_rate --runs runs [--steps 800] [--out out/frame-rate]

Both arms start after stage 2b, with the same requests, steps, rates and noise. They train text-to-image and
text-to-video, because for an edit the MLLM would have to see the source at another rate as well. Objects move at one
speed, so a clip at 12 frames a second shows two thirds of the distance. Every `--every` steps clips are generated for
held-out prompts, and the scorer measures whether everything matches the prompt, motion included ("right"), the fraction
of frames on which every object is the same as on the others ("steady"), and the deviation of the distance moved from
frame to frame, in px ("uneven"). A killed run resumes.
"""

import argparse
import json
import os
import platform
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from omnivideo.contracts import TASKS
from omnivideo.evaluation.prompts import sample_prompts
from omnivideo.evaluation.suite import CHUNK_SIZE, iterate_chunks, sample_clips
from omnivideo.models.mllm import MLLMMessage
from omnivideo.models.omni import OmniVideoModel
from omnivideo.models.vae import encode_pixels, pixels_from_bytes
from omnivideo.synthetic.rendering import rasterize_shape
from omnivideo.synthetic.requests import sample_requests
from omnivideo.synthetic.scenes import BACKGROUNDS, CELL_SIZE, COLOURS, FPS, FRAME_SIZE, Scene, SceneObject
from omnivideo.synthetic.scorer import detect_blobs, detect_scene, estimate_background, track_blobs
from omnivideo.training.config import TrainingConfig
from omnivideo.training.data.batch import CachedTask
from omnivideo.training.engine.run import RunContext
from omnivideo.training.engine.trainer import Trainer, read_complete_lines
from omnivideo.training.recipes.flow import build_flow_recipe
from omnivideo.training.recipes.losses import embed_frames
from omnivideo.training.tiny.feature_cache import load_cached_task, load_or_compute
from omnivideo.training.tiny.flow_stages import SyntheticSource
from omnivideo.training.tiny.pipeline import REQUESTS_PER_TASK, TinyPipeline

RATES = (FPS, 12)
Row = dict[str, float]  # the step and the scores
MEASURES = ("right", "steady", "uneven")


def open_tiny(arguments: argparse.Namespace) -> TinyPipeline:
    return TinyPipeline(RunContext(TrainingConfig(recipe="tiny", runs=arguments.runs, weights=arguments.weights)))


# ---------------------------------------------------------------- clips at another rate


def compute_coverage(scene_object: SceneObject, time: float) -> NDArray[np.float32]:
    """Return the coverage [64, 64] of an object at a time, in frames, between two frames."""
    frame, fraction = int(time), time % 1
    (x, y), (next_x, next_y) = scene_object.centre_at(frame), scene_object.centre_at(frame + 1)
    radius, next_radius = scene_object.radius_at(frame), scene_object.radius_at(frame + 1)
    radius += fraction * (next_radius - radius)
    canvas = np.zeros((FRAME_SIZE + 2 * CELL_SIZE, FRAME_SIZE + 2 * CELL_SIZE), dtype=np.float32)
    canvas[y : y + 2 * CELL_SIZE, x : x + 2 * CELL_SIZE] = rasterize_shape(scene_object.shape, radius)
    moved: NDArray[np.float32] = ndimage.shift(canvas, (fraction * (next_y - y), fraction * (next_x - x)), order=1)
    return moved[CELL_SIZE:-CELL_SIZE, CELL_SIZE:-CELL_SIZE]


def render_at_rate(scene: Scene, rate: int) -> NDArray[np.uint8]:
    """Render a scene as `render_scene` does, but at `rate` frames a second; return uint8 [F, 64, 64, 3]."""
    clip = np.empty((scene.frame_count, FRAME_SIZE, FRAME_SIZE, 3), dtype=np.float32)
    clip[:] = BACKGROUNDS[scene.background]
    for frame in range(scene.frame_count):
        for scene_object in scene.objects:
            alpha = compute_coverage(scene_object, frame * FPS / rate)[..., None]
            clip[frame] += alpha * (np.asarray(COLOURS[scene_object.colour], dtype=np.float32) - clip[frame])
    return np.rint(clip).astype(np.uint8)


@torch.no_grad()
def resample_targets(
    data: CachedTask, scenes: list[Scene], rate: int, tiny: TinyPipeline, queries: int, file: Path
) -> CachedTask:
    """Return the requests with the latents and embeddings of their targets at another rate, cached in a file."""
    if rate == FPS:
        return data
    vae, encoder = tiny.load_vae(), tiny.load_visual_encoder()

    def compute() -> dict[str, torch.Tensor]:
        latents, embeddings = [], []
        for first in range(0, len(scenes), 64):
            pixels = pixels_from_bytes(np.stack([render_at_rate(scene, rate) for scene in scenes[first : first + 64]]))
            latents.append(encode_pixels(vae, pixels).half())
            embeddings.append(embed_frames(encoder, pixels, queries).half())
            print(f"  clips at {rate} frames a second: {first + len(pixels)}/{len(scenes)}", end="\r", flush=True)
        return {"target": torch.cat(latents), "embeddings": torch.cat(embeddings)}

    saved = load_or_compute(file, compute)
    return replace(data, target_latents=saved["target"], visual_embeddings=saved["embeddings"])


# ---------------------------------------------------------------- scores


def measure_unevenness(clip: NDArray[np.uint8]) -> float:
    """Return the deviation of the distance moved per frame, in px, of the objects that are visible on every frame."""
    background = estimate_background(clip)
    tracks = track_blobs([detect_blobs(frame, background) for frame in clip])
    steps = [
        np.diff([(blob.x, blob.y) for blob in track if blob is not None], axis=0)
        for track in tracks
        if all(blob is not None for blob in track)
    ]
    return float(np.mean([step.std(axis=0).max() for step in steps])) if steps else float("nan")


def score_motion(omni: OmniVideoModel, count: int) -> dict[str, float]:
    """Generate clips for held-out motion prompts with the preset's steps and guidance, and return the mean scores."""
    right, steady, uneven = [], [], []
    for first, chunk in iterate_chunks(sample_prompts(count, ["motion"])):
        texts = [prompt.text for prompt in chunk]
        messages = [MLLMMessage(text) for text in texts]
        clips = sample_clips(omni, texts, messages, "text-to-video", 1000 + first)
        for prompt, clip in zip(chunk, clips, strict=True):
            detected = detect_scene(clip)
            right.append(prompt.scene_spec.is_met_by(detected))
            steady.append(detected.steadiness)
            uneven.append(measure_unevenness(clip))
    return {"right": float(np.mean(right)), "steady": float(np.mean(steady)), "uneven": float(np.nanmean(uneven))}


def train_arm(tiny: TinyPipeline, rate: int, arguments: argparse.Namespace) -> list[Row]:
    """Train one arm and return the scores of its clips."""
    omni, encoder, cache = tiny.load_omni("stage2b"), tiny.load_visual_encoder(), arguments.runs / "cache"
    data: dict[str, CachedTask] = {}
    for task in TASKS[:2]:
        requests = sample_requests(1, task, arguments.count)
        data[task] = load_cached_task(cache, omni, encoder, requests, tiny.preparation)
        if task == "text-to-video":
            file = arguments.out / f"clips-{rate}-{arguments.count}.safetensors"
            scenes = [request.target for request in requests]
            data[task] = resample_targets(data[task], scenes, rate, tiny, omni.bridge.vision_head.num_queries, file)
    torch.manual_seed(14)
    recipe = build_flow_recipe(
        "stage3",
        omni,
        SyntheticSource("stage3", data, tuple(arguments.sizes)),
        arguments.steps,
        lr=7e-3,
        alignment_weight=0.1,
        high_noise_share=0.9,
    )
    trainer = Trainer(recipe, arguments.out / str(rate))
    log = arguments.out / str(rate) / "looks.jsonl"
    rows = [row for row in map(json.loads, read_complete_lines(log)) if row["step"] <= trainer.step]
    while True:
        if not rows or rows[-1]["step"] < trainer.step:
            rows.append({"step": trainer.step} | score_motion(omni, arguments.look))
            log.write_text("".join(json.dumps(row) + "\n" for row in rows))
            print(f"{rate} frames a second", *(f"{name} {value:.3f}" for name, value in rows[-1].items()), flush=True)
        if trainer.step >= arguments.steps:
            return rows
        trainer.run(stop_at_step=trainer.step + arguments.every)


def plot_scores(rows_by_rate: dict[int, list[Row]], picture: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.2), layout="constrained")
    for index, name in enumerate(MEASURES, start=1):
        axes = figure.add_subplot(1, len(MEASURES), index)
        for rate, rows in rows_by_rate.items():
            axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=f"{rate} frames a second")
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("out/frame-rate"))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--every", type=int, default=200)
    parser.add_argument("--look", type=int, default=2 * CHUNK_SIZE, help="number of held-out prompts")
    parser.add_argument("--sizes", type=int, nargs=2, default=(64, 24), metavar=("STILLS", "CLIPS"))
    parser.add_argument("--count", type=int, default=REQUESTS_PER_TASK, help="requests of each task")
    parser.add_argument("--weights", type=Path, default=None, help="folder of weights for recipes without a run")
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows_by_rate = {rate: train_arm(open_tiny(arguments), rate, arguments) for rate in RATES}
    plot_scores(rows_by_rate, arguments.out / "frame-rate.png")
    for name in MEASURES:
        print(
            f"{name:8}",
            *(f"{rate} frames a second {rows[-1][name]:.3f}" for rate, rows in rows_by_rate.items()),
            sep="  ",
        )


if __name__ == "__main__":
    main()
