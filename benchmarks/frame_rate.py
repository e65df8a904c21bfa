"""Stage 3 on clips sampled at 12 frames a second against 8, as stages 1 and 2 have them (section 4.3).

    python -m benchmarks.frame_rate --runs runs [--steps 800] [--out out/frame-rate]

Both arms begin after stage 2b, with the same requests, steps, rates and noise; text-to-image and text-to-video, since
an edit's source would have to be shown to the language model at another rate as well.  The world moves at one speed, so
at 12 frames a second a clip shows two thirds of the way.  Every `--every` steps held-out prompts are drawn, and read
by the scorer: is everything as asked (motion with it), on how many frames is every object what it is on the others,
and how evenly does what moves move (deviation of the way from frame to frame, in px).  A killed run goes on.
"""

import argparse
import json
import os
import platform
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from omnivideo.contracts import TASKS
from omnivideo.evaluation.prompts import sample_prompts
from omnivideo.evaluation.suite import CHUNK_SIZE, iterate_chunks, sample_clips
from omnivideo.models.mllm import MLLMMessage
from omnivideo.models.omni import OmniVideoModel
from omnivideo.models.vae import encode_pixels, pixels_from_bytes
from omnivideo.synthetic.requests import sample_requests
from omnivideo.synthetic.scenes import (
    BACKGROUNDS,
    CELL_SIZE,
    COLOURS,
    FPS,
    FRAME_SIZE,
    Scene,
    SceneObject,
    rasterize_shape,
)
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
MEASURES = ("right", "steady", "uneven")


# ---------------------------------------------------------------- the world at another rate


def open_tiny(given: argparse.Namespace) -> TinyPipeline:
    return TinyPipeline(RunContext(TrainingConfig(recipe="tiny", runs=given.runs, weights=given.weights)))


def covered(thing: SceneObject, at: float) -> np.ndarray:
    """Coverage [64, 64] of an object at a moment between two frames."""
    before, share = int(at), at % 1
    (x, y), after = thing.centre_at(before), thing.centre_at(before + 1)
    radius = thing.radius_at(before) + share * (thing.radius_at(before + 1) - thing.radius_at(before))
    canvas = np.zeros((FRAME_SIZE + 2 * CELL_SIZE, FRAME_SIZE + 2 * CELL_SIZE), dtype=np.float32)
    canvas[y : y + 2 * CELL_SIZE, x : x + 2 * CELL_SIZE] = rasterize_shape(thing.shape, radius)
    moved = ndimage.shift(canvas, (share * (after[1] - y), share * (after[0] - x)), order=1)
    return moved[CELL_SIZE:-CELL_SIZE, CELL_SIZE:-CELL_SIZE]


def render_at(scene: Scene, rate: int) -> np.ndarray:
    """As `world.render`, with frames 1 / `rate` s apart: uint8 [F, 64, 64, 3]."""
    clip = np.empty((scene.frame_count, FRAME_SIZE, FRAME_SIZE, 3), dtype=np.float32)
    clip[:] = BACKGROUNDS[scene.background]
    for frame in range(scene.frame_count):
        for thing in scene.objects:
            alpha = covered(thing, frame * FPS / rate)[..., None]
            clip[frame] += alpha * (np.asarray(COLOURS[thing.colour], dtype=np.float32) - clip[frame])
    return np.rint(clip).astype(np.uint8)


@torch.no_grad()
def at_rate(
    data: CachedTask, scenes: list[Scene], rate: int, tiny: TinyPipeline, queries: int, file: Path
) -> CachedTask:
    """The same requests with their targets' latents and embeddings at another rate, kept in a file."""
    if rate == FPS:
        return data
    vae, encoder = tiny.load_vae(), tiny.load_visual_encoder()

    def made() -> dict[str, torch.Tensor]:
        latents, embeddings = [], []
        for first in range(0, len(scenes), 64):
            pixels = pixels_from_bytes(np.stack([render_at(one, rate) for one in scenes[first : first + 64]]))
            latents.append(encode_pixels(vae, pixels).half())
            embeddings.append(embed_frames(encoder, pixels, queries).half())
            print(f"  clips at {rate} frames a second: {first + len(pixels)}/{len(scenes)}", end="\r", flush=True)
        return {"target": torch.cat(latents), "embeddings": torch.cat(embeddings)}

    saved = load_or_compute(file, made)
    return replace(data, target_latents=saved["target"], visual_embeddings=saved["embeddings"])


# ---------------------------------------------------------------- what comes out


def unevenness(clip: np.ndarray) -> float:
    """Deviation of the way from frame to frame, in px, over the objects that are there on every frame."""
    background = estimate_background(clip)
    tracks = track_blobs([detect_blobs(frame, background) for frame in clip])
    ways = [
        np.diff([(blob.x, blob.y) for blob in track if blob is not None], axis=0)
        for track in tracks
        if all(blob is not None for blob in track)
    ]
    return float(np.mean([way.std(axis=0).max() for way in ways])) if ways else float("nan")


def looked_at(omni: OmniVideoModel, count: int) -> dict[str, float]:
    """Held-out motion prompts by the preset's steps and guidance."""
    right, steady, uneven = [], [], []
    for first, chunk in iterate_chunks(sample_prompts(count, ["motion"])):
        texts = [one.text for one in chunk]
        for one, clip in zip(
            chunk,
            sample_clips(omni, texts, [MLLMMessage(text) for text in texts], "text-to-video", 1000 + first),
            strict=True,
        ):
            reading = detect_scene(clip)
            right.append(one.scene_spec.is_met_by(reading))
            steady.append(reading.steadiness)
            uneven.append(unevenness(clip))
    return {"right": float(np.mean(right)), "steady": float(np.mean(steady)), "uneven": float(np.nanmean(uneven))}


def arm(tiny: TinyPipeline, rate: int, given: argparse.Namespace) -> list[dict]:
    """Trains one arm; what it draws, on the way."""
    omni, encoder, cache = tiny.load_omni("stage2b"), tiny.load_visual_encoder(), given.runs / "cache"
    data = {}
    for task in TASKS[:2]:
        wanted = sample_requests(1, task, given.count)
        data[task] = load_cached_task(cache, omni, encoder, wanted, tiny.preparation)
        if task == "text-to-video":
            file, scenes = given.out / f"clips-{rate}-{given.count}.safetensors", [one.target for one in wanted]
            data[task] = at_rate(data[task], scenes, rate, tiny, omni.bridge.vision_head.num_queries, file)
    torch.manual_seed(14)
    recipe = build_flow_recipe(
        "stage3",
        omni,
        SyntheticSource("stage3", data, tuple(given.sizes)),
        given.steps,
        lr=7e-3,
        alignment_weight=0.1,
        high_noise_share=0.9,
    )
    trainer = Trainer(recipe, given.out / str(rate))
    log = given.out / str(rate) / "looks.jsonl"
    rows = [row for row in map(json.loads, read_complete_lines(log)) if row["step"] <= trainer.step]
    while True:
        if not rows or rows[-1]["step"] < trainer.step:
            rows.append({"step": trainer.step} | looked_at(omni, given.look))
            log.write_text("".join(json.dumps(row) + "\n" for row in rows))
            print(f"{rate} frames a second", *(f"{name} {value:.3f}" for name, value in rows[-1].items()), flush=True)
        if trainer.step >= given.steps:
            return rows
        trainer.run(stop_at_step=trainer.step + given.every)


def plot(found: dict[int, list[dict]], picture: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.2), layout="constrained")
    for at, name in enumerate(MEASURES, start=1):
        axes = figure.add_subplot(1, len(MEASURES), at)
        for rate, rows in found.items():
            axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=f"{rate} frames a second")
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=110)


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--runs", type=Path, default=Path("runs"))
    reader.add_argument("--out", type=Path, default=Path("out/frame-rate"))
    reader.add_argument("--steps", type=int, default=800)
    reader.add_argument("--every", type=int, default=200)
    reader.add_argument("--look", type=int, default=2 * CHUNK_SIZE, help="held-out prompts at each look")
    reader.add_argument("--sizes", type=int, nargs=2, default=(64, 24), metavar=("STILLS", "CLIPS"))
    reader.add_argument("--count", type=int, default=REQUESTS_PER_TASK, help="requests of each task")
    reader.add_argument("--weights", type=Path, default=None, help="stand in for recipes without a run")
    given = reader.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    given.out.mkdir(parents=True, exist_ok=True)
    found = {rate: arm(open_tiny(given), rate, given) for rate in RATES}
    plot(found, given.out / "frame-rate.png")
    for name in MEASURES:
        print(f"{name:8}", *(f"{rate} frames a second {rows[-1][name]:.3f}" for rate, rows in found.items()), sep="  ")


if __name__ == "__main__":
    main()
