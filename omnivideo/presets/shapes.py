"""Choose the size and the length at which a model generates what a request asks for.

A model draws what it was trained on (`TrainedShapes`); at another size or length it computes noise. So a clip is always
generated at a trained size and length, and delivered as requested: frames are scaled and cropped, and a shorter clip
is the beginning of a trained one. A longer one is refused, unless the frame rate is free, which then fills the time.
An extension adds to a clip what the model generates in one pass, or in several, each of which continues the one before.
"""

import math
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from omnivideo.errors import InvalidInput
from omnivideo.presets.fields import Preset, PresetModel, SamplingDefaults, Task, TrainedShapes

MIN_FPS, MAX_FPS = 0.5, 60  # frames per second of a clip
MAX_CLIP_PIXELS = 1280 * 720 * 121  # width x height x frames; no preset supports more
MAX_SIDE = 4096  # px of what is delivered
MAX_NEW_FRAMES = 241  # of one extension


class RequestedShape(PresetModel):
    """The size in px and the length that a request asks for, each within what any preset can deliver."""

    width: int | None = Field(default=None, ge=16, le=MAX_SIDE)
    height: int | None = Field(default=None, ge=16, le=MAX_SIDE)
    frames: int | None = Field(default=None, ge=1, le=241)
    fps: float | None = Field(default=None, ge=MIN_FPS, le=MAX_FPS, allow_inf_nan=False)
    seconds: float | None = Field(default=None, gt=0, le=3600, allow_inf_nan=False)


class Delivery(PresetModel):
    """The size in px and the number of frames of a file. Frames are scaled to cover the size and cropped centrally."""

    width: int
    height: int
    frames: int


@dataclass(frozen=True)
class ClipLength:
    """The frames that are generated, those of them that are delivered from the first on, and their rate."""

    generated_frames: int
    frames: int
    fps: float


@dataclass(frozen=True)
class SourceLength:
    """The length of the clip that is edited or extended: its frames, and their rate per second."""

    frames: int
    fps: float


def get_trained_shapes(preset: Preset, task: Task, defaults: SamplingDefaults) -> TrainedShapes:
    """Return what a task was trained on, which always contains its defaults."""
    size = (defaults.width, defaults.height)
    stated = preset.trained.get(task, TrainedShapes(sizes=(size,), frames=(defaults.frames,)))
    sizes, frames = tuple({*stated.sizes, size}), tuple({*stated.frames, defaults.frames})
    return stated.model_copy(update={"sizes": sizes, "frames": frames})


def get_file_length(preset: Preset, frames: int, fps: float | None) -> SourceLength | None:
    """Return the length that an edit of a user's file has by default, or None for the task's default length.

    It is None for a still, and for a preset that takes every n-th frame of a clip.
    """
    return None if fps is None or preset.source.frames == "stride" else SourceLength(frames, fps)


def check_flow_shift(preset: Preset, task: Task, defaults: SamplingDefaults, flow_shift: float) -> None:
    """Raise InvalidInput for a shift at which the model does not generate what it was trained on."""
    lowest, highest = get_trained_shapes(preset, task, defaults).flow_shift
    if not lowest <= flow_shift <= highest:
        raise InvalidInput("flow_shift", f"this model generates clips from {lowest:g} to {highest:g}")


def choose_trained_size(shapes: TrainedShapes, width: int, height: int) -> tuple[int, int]:
    """Return the trained width and height with the nearest aspect ratio; of several such, the nearest area."""

    def measure_distance(size: tuple[int, int]) -> tuple[float, float]:
        aspect, area = width / height / (size[0] / size[1]), width * height / (size[0] * size[1])
        return abs(math.log(aspect)), abs(math.log(area))

    return min(shapes.sizes, key=measure_distance)


def resolve_length(
    shapes: TrainedShapes,
    defaults: SamplingDefaults,
    seconds: float | None = None,
    frames: int | None = None,
    fps: float | None = None,
    source: SourceLength | None = None,
) -> ClipLength:
    """Return the length of a clip from any two of seconds, frames and frames per second, or from one, or from none.

    `seconds` alone chooses the frame rate so that trained frames fill the time. Where nothing is given, an edit has the
    length of its `source`. Raises an InvalidInput that says what is possible.
    """
    if seconds is None and source is not None:
        frames, fps, seconds = inherit_source_length(shapes, source, frames, fps)
    if seconds is not None:
        if frames is None and fps is None:
            frames = choose_frames_for_time(shapes, defaults, seconds)
        if frames is None:
            assert fps is not None
            frames = count_frames(shapes, seconds, fps)
        elif fps is None:
            fps = divide_frames(frames, seconds)
        elif round(seconds * fps) != frames:
            text = f"{seconds:g} s at {fps:g} frames per second are {round(seconds * fps)} frames, not {frames}"
            raise InvalidInput("seconds", f"{text}; give two of the three")
    frames, fps = frames or defaults.frames, fps or defaults.fps
    fps = int(fps) if float(fps).is_integer() else round(fps, 6)
    return ClipLength(choose_trained_frames(shapes, frames), frames, fps)


def inherit_source_length(
    shapes: TrainedShapes, source: SourceLength, frames: int | None, fps: float | None
) -> tuple[int | None, float | None, float | None]:
    """Return the frames, the rate and the seconds of an edit that gives no seconds.

    A source with more frames than a model generates keeps its length in time if neither frames nor rate are given.
    """
    is_short = source.frames <= max(shapes.frames) and MIN_FPS <= source.fps <= MAX_FPS
    if is_short:
        return frames or source.frames, fps or source.fps, None
    if frames is not None or fps is not None:
        return frames, fps, None
    seconds, longest = source.frames / source.fps, max(shapes.frames) / MIN_FPS
    if seconds > longest:
        text = f"it lasts {seconds:.3g} s; this model edits at most {longest:g} s"
        raise InvalidInput("source", f"{text}, so cut it, or give the length of the edit")
    return None, None, max(seconds, min(shapes.frames) / MAX_FPS)


def count_new_frames(defaults: SamplingDefaults, requested: RequestedShape, source: SourceLength) -> int:
    """Return how many frames an extension adds to a clip, at the clip's rate; by default those of one pass.

    Raises InvalidInput for a clip that is shorter than what is given to the model, and for a time without a frame.
    """
    if source.frames < defaults.given_frames:
        text = f"it has {source.frames} frames; this model continues clips of {defaults.given_frames} or more"
        raise InvalidInput("source", text)
    if not MIN_FPS <= source.fps <= MAX_FPS:
        raise InvalidInput("source", f"it has {source.fps:g} frames per second; allowed: {MIN_FPS:g} to {MAX_FPS}")
    if requested.fps not in (None, source.fps):
        raise InvalidInput("fps", f"an extended clip keeps its {source.fps:g} frames per second; leave it out")
    if requested.seconds is None:
        return requested.frames or defaults.frames - defaults.given_frames
    frames = round(requested.seconds * source.fps)
    if requested.frames not in (None, frames):
        text = f"{requested.seconds:g} s at {source.fps:g} frames per second are {frames} frames"
        raise InvalidInput("seconds", f"{text}, not {requested.frames}; give one of the two")
    if not 1 <= frames <= MAX_NEW_FRAMES:
        text = f"{1 / source.fps:.2g} to {MAX_NEW_FRAMES / source.fps:.4g}"
        raise InvalidInput("seconds", f"{frames} frames would be added; allowed: {text} at {source.fps:g} per second")
    return frames


def resolve_extension(
    defaults: SamplingDefaults, shapes: TrainedShapes, requested: RequestedShape, source: SourceLength
) -> dict[str, Any]:
    """Return the fields of SamplingParams for a clip that is extended. The requested size is the clip's, made even."""
    new_frames = count_new_frames(defaults, requested, source)
    width, height = requested.width or defaults.width, requested.height or defaults.height
    width, height = width - width % 2, height - height % 2
    frames = source.frames + new_frames
    if width * height * frames > MAX_CLIP_PIXELS:
        longest = MAX_CLIP_PIXELS // (width * height)
        raise InvalidInput("source", f"it would have {frames} frames of {width}x{height}; allowed: {longest}")
    size = choose_trained_size(shapes, width, height)
    return {
        "width": size[0], "height": size[1], "frames": defaults.frames, "fps": source.fps, "new_frames": new_frames,
        "delivery": Delivery(width=width, height=height, frames=frames),
    }  # fmt: skip


def choose_frames_for_time(shapes: TrainedShapes, defaults: SamplingDefaults, seconds: float) -> int:
    """Return the trained length that fills the time at a rate near the default one. Raises InvalidInput."""
    possible = [frames for frames in shapes.frames if MIN_FPS <= frames / seconds <= MAX_FPS]
    if not possible:
        shortest, longest = min(shapes.frames) / MAX_FPS, max(shapes.frames) / MIN_FPS
        text = f"{list_numbers(shapes.frames)} frames at {MIN_FPS:g} to {MAX_FPS} per second"
        raise InvalidInput("seconds", f"this model generates {text}; allowed: {shortest:.2g} to {longest:g}")
    return min(possible, key=lambda frames: abs(math.log(frames / seconds / defaults.fps)))


def count_frames(shapes: TrainedShapes, seconds: float, fps: float) -> int:
    """Return the number of frames of a time at a rate. Raises InvalidInput if a model cannot generate that many."""
    frames, most = round(seconds * fps), max(shapes.frames)
    if not 2 <= frames <= most:
        text = f"{seconds:g} s at {fps:g} frames per second are {frames} frames; this model generates 2 to {most}"
        raise InvalidInput("seconds", f"{text}; leave out fps, or give at most {most / seconds:.3g}")
    return frames


def divide_frames(frames: int, seconds: float) -> float:
    """Return the rate at which frames fill the time. Raises InvalidInput if it is out of bounds."""
    fps = frames / seconds
    if not MIN_FPS <= fps <= MAX_FPS:
        text = f"{frames} frames in {seconds:g} s are {fps:.3g} per second, of {MIN_FPS:g} to {MAX_FPS}"
        raise InvalidInput("seconds", f"{text}; allowed: {frames / MAX_FPS:.2g} to {frames / MIN_FPS:g}")
    return fps


def choose_trained_frames(shapes: TrainedShapes, frames: int) -> int:
    """Return the shortest trained length of at least `frames`. Raises InvalidInput if there is none."""
    possible = [length for length in shapes.frames if length >= frames]
    if possible:
        return min(possible)
    raise InvalidInput(
        "frames", f"{frames} is more than this model was trained for; allowed: 2 to {max(shapes.frames)}"
    )


def describe_frames(preset: Preset, task: Task, defaults: SamplingDefaults) -> str:
    """Return the numbers of frames that a task of a preset delivers, such as "2 to 9"."""
    most = max(get_trained_shapes(preset, task, defaults).frames)
    return "1" if most == 1 else f"2 to {most}"


def list_numbers(numbers: tuple[int, ...]) -> str:
    return " or ".join(map(str, sorted(numbers)))


def resolve_shape(
    preset: Preset,
    task: Task,
    defaults: SamplingDefaults,
    requested: RequestedShape,
    source: SourceLength | None,
    is_video: bool,
) -> dict[str, Any]:
    """Return the fields of SamplingParams for a requested size and length."""
    shapes = get_trained_shapes(preset, task, defaults)
    if task == "video-extension":
        assert source is not None, "an extension has a source"
        return resolve_extension(defaults, shapes, requested, source)
    if requested.frames is not None and (requested.frames == 1) == is_video:
        allowed = f"a video has 2 to {max(shapes.frames)}" if is_video else "an image has 1"
        raise InvalidInput("frames", f"{requested.frames} does not fit {task}: {allowed}")
    length = ClipLength(1, 1, defaults.fps)
    for field in ("seconds", "fps"):
        if not is_video and getattr(requested, field) is not None:
            raise InvalidInput(field, "an image has no length; leave it out")
    if is_video:
        length = resolve_length(shapes, defaults, requested.seconds, requested.frames, requested.fps, source)
    width, height = requested.width or defaults.width, requested.height or defaults.height
    for field, side in (("width", width), ("height", height)):
        if is_video and side % 2:
            raise InvalidInput(field, f"{side} is odd; a clip has even sides")
    if width * height * length.generated_frames > MAX_CLIP_PIXELS:
        raise InvalidInput("size", f"width x height x frames is above {MAX_CLIP_PIXELS}")
    delivery = Delivery(width=width, height=height, frames=length.frames)
    size = choose_trained_size(shapes, width, height)
    generated = Delivery(width=size[0], height=size[1], frames=length.generated_frames)
    return generated.model_dump() | {
        "fps": length.fps,
        "delivery": None if delivery == generated else delivery,
        "seconds": requested.seconds if is_video and requested.fps is None else None,
    }
