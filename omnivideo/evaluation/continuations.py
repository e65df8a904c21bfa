"""Evaluate clips that begin with given frames, long clips, and how much the layout of open prompts varies."""

import random
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from omnivideo.evaluation.editing import restate_request
from omnivideo.evaluation.suite import (
    EvaluationProgress,
    JudgedCase,
    RecordCase,
    Score,
    build_message,
    ignore_case,
    iterate_chunks,
    sample_clips,
    score_values,
    score_verdicts,
)
from omnivideo.models.mllm import MLLMMessage
from omnivideo.models.omni import OmniVideoModel
from omnivideo.models.vae import encode_pixels, pixels_from_bytes
from omnivideo.presets import ContinuationTask
from omnivideo.synthetic.captions import sample_caption
from omnivideo.synthetic.facts import SceneDetection
from omnivideo.synthetic.rendering import render_scene
from omnivideo.synthetic.requests import (
    CONTINUATION_TASKS,
    SceneRequest,
    sample_continuation_request,
    sample_requests,
)
from omnivideo.synthetic.scenes import CELL_SIZE, CLIP_FRAMES, LONG_CLIP_FRAMES, Scene, sample_scene
from omnivideo.synthetic.scorer import detect_scene, find_matching_frames, measure_seam

MIN_MATCHING_SHARE = 0.85  # of the generated frames: a clip is right if these show every object in its place
SEEDS_PER_PROMPT = 8


@torch.no_grad()
def continue_clips(omni: OmniVideoModel, requests: Sequence[SceneRequest], seed: int) -> np.ndarray:
    """Return the clips that the model generates for requests of one task, uint8 [B, F, H, W, 3]."""

    def encode(scenes: Sequence[Scene | None]) -> torch.Tensor:
        pixels = np.stack([render_scene(scene) for scene in scenes if scene is not None])
        return encode_pixels(omni.vae, pixels_from_bytes(pixels).to(omni.device))

    source = encode([request.source for request in requests])
    given = source
    if requests[0].last_frame is not None:
        source = torch.cat([source, encode([request.last_frame for request in requests])], dim=2)
    messages = [build_message(request.text, request.source) for request in requests]
    if requests[0].task != "keyframes-to-video":
        messages = [MLLMMessage(restate_request(omni, message), message.media) for message in messages]
    texts = [message.text for message in messages]
    return sample_clips(
        omni, texts, messages, "text-to-video", seed, source=source, given=given, frames=requests[0].frame_count
    )


def evaluate_continuations(
    omni: OmniVideoModel,
    count: int,
    on_progress: EvaluationProgress,
    tasks: Sequence[ContinuationTask] = CONTINUATION_TASKS,
    record_case: RecordCase = ignore_case,
) -> dict[str, Score]:
    """Score `count` held-out requests of each task frame by frame, and the seams of extensions."""
    scores: dict[str, Score] = {}
    for task in tasks:
        rng, verdicts, seams = random.Random(f"evaluation/{task}"), list[bool](), list[float]()
        requests = [sample_continuation_request(rng, task, 0.0, "held_out") for _ in range(count)]
        for first, chunk in iterate_chunks(requests):
            for request, clip in zip(chunk, continue_clips(omni, chunk, 4000 + first), strict=True):
                generated = clip[CLIP_FRAMES - 1 :] if task == "video-extension" else clip
                share = float(np.mean(find_matching_frames(generated, request.target)))
                verdicts.append(share >= MIN_MATCHING_SHARE)
                record_case(JudgedCase(task, f"{share:.0%} of the frames", request.text, clip, verdicts[-1]))
                if task == "video-extension":
                    seams.append(measure_seam(clip, CLIP_FRAMES))
            on_progress(task, first + len(chunk), count)
        scores[task] = score_verdicts(verdicts)
        if seams:
            scores["video-extension: change at the seam"] = score_values(seams)
    return scores


def evaluate_long_clips(
    omni: OmniVideoModel, count: int, on_progress: EvaluationProgress, record_case: RecordCase = ignore_case
) -> dict[str, Score]:
    """Score clips of 17 frames: the content of the prompt, and frames with every object in its usual shape."""
    rng, verdicts, steadiness = random.Random("evaluation/long clips"), list[bool](), list[float]()
    captions = [
        sample_caption(rng, sample_scene(rng, True, "held_out", 1.0, LONG_CLIP_FRAMES), is_composed=True)
        for _ in range(count)
    ]
    for first, chunk in iterate_chunks(captions):
        texts = [caption.text for caption in chunk]
        messages = [MLLMMessage(text) for text in texts]
        clips = sample_clips(omni, texts, messages, "text-to-video", 5000 + first, frames=LONG_CLIP_FRAMES)
        for text, caption, clip in zip(texts, chunk, clips, strict=True):
            detection = detect_scene(clip)
            verdicts.append(caption.scene_spec.is_met_by(detection))
            steadiness.append(detection.steadiness)
            record_case(JudgedCase("long-clips", "17 frames", text, clip, verdicts[-1]))
        on_progress("clips of 17 frames", first + len(chunk), count)
    return {"clips of 17 frames": score_verdicts(verdicts), "steadiness of 17 frames": score_values(steadiness)}


def describe_layout(detection: SceneDetection) -> tuple[tuple[int, int], ...]:
    """Return the cells of the frame that hold the objects' centres, in any order."""
    return tuple(sorted((int(obj.x // CELL_SIZE), int(obj.y // CELL_SIZE)) for obj in detection.objects))


def evaluate_variety(omni: OmniVideoModel, count: int, on_progress: EvaluationProgress) -> dict[str, Score]:
    """Count the different layouts that eight seeds give a prompt that leaves the layout open."""
    layout_counts: dict[str, list[float]] = defaultdict(list)
    requests = [request for request in sample_requests(9, "text-to-image", 8 * count) if leaves_layout_open(request)]
    for index, request in enumerate(requests[:count]):
        texts = [request.text] * SEEDS_PER_PROMPT
        clips = sample_clips(omni, texts, [MLLMMessage(text) for text in texts], "text-to-image", 6000)
        layouts = {describe_layout(detect_scene(clip)) for clip in clips}
        layout_counts[f"layouts of {SEEDS_PER_PROMPT} seeds: {len(request.target.objects)} objects"].append(
            len(layouts)
        )
        on_progress("variety", index + 1, min(count, len(requests)))
    scores = {row: score_values(values) for row, values in sorted(layout_counts.items())}
    every = [value for values in layout_counts.values() for value in values]
    return scores | {f"layouts of {SEEDS_PER_PROMPT} seeds": score_values(every)}


def leaves_layout_open(request: SceneRequest) -> bool:
    """Return whether a request names neither a place nor a relation."""
    words = (" left", " right", " top", " bottom", "middle", "corner", "above", "below", "over", "under", "beneath")
    return not any(word in request.text for word in (*words, "higher than"))
