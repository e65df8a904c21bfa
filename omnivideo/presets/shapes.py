"""Choose the size and the length at which a model generates what a request asks for, and count its tokens.

A model draws what it was trained on (`TrainedShapes`); at another size or length it computes noise. So a clip is always
generated at a trained size and length, and delivered as requested: frames are scaled and cropped, and a shorter clip
is the beginning of a trained one. A longer one is refused, unless the frame rate is free, which then fills the time.
"""

import math
from dataclasses import dataclass

from omnivideo.errors import InvalidInput
from omnivideo.presets.fields import Preset, SamplingDefaults, Task, TrainedShapes

MIN_FPS, MAX_FPS = 0.5, 60  # frames per second of a clip


@dataclass(frozen=True)
class ClipLength:
    """The frames that are generated, those of them that are delivered from the first on, and their rate."""

    generated_frames: int
    frames: int
    fps: float


@dataclass(frozen=True)
class SourceLength:
    """The length of an edit's source, a clip: its frames, and their rate per second."""

    frames: int
    fps: float


def get_trained_shapes(preset: Preset, task: Task, defaults: SamplingDefaults) -> TrainedShapes:
    """Return what a task was trained on; only its defaults if the preset states nothing else."""
    stated = TrainedShapes(sizes=((defaults.width, defaults.height),), frames=(defaults.frames,))
    return preset.trained.get(task, stated)


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


def list_numbers(numbers: tuple[int, ...]) -> str:
    return " or ".join(map(str, sorted(numbers)))


# ---------------------------------------------------------------- the tokens of a clip

VAE_SPATIAL_STRIDE, VAE_TEMPORAL_STRIDE = 8, 4
MIN_TEXT_TOKENS = 64  # of the prompt and the markers that an edit keeps, if its condition cuts the text


def compute_latent_grid(width: int, height: int, frames: int) -> tuple[int, int, int]:
    """Return the latent frames, height and width of a clip; raises InvalidInput for sizes that cannot be patched."""
    for field, value in (("width", width), ("height", height)):
        if value < 16 or value % 16:
            raise InvalidInput(field, f"{value} is not a positive multiple of 16")
    if frames < 1 or frames % VAE_TEMPORAL_STRIDE != 1:
        raise InvalidInput("frames", f"{frames} is not of the form 4k + 1 (1, 5, 9, 13 ...)")
    return (frames - 1) // VAE_TEMPORAL_STRIDE + 1, height // VAE_SPATIAL_STRIDE, width // VAE_SPATIAL_STRIDE


def count_decoder_tokens(preset: Preset, grid: tuple[int, int, int]) -> int:
    """Return the number of the decoder's tokens for a latent grid."""
    t, y, x = map(int, preset.decoder["patch_size"])
    return (grid[0] // t) * (grid[1] // y) * (grid[2] // x)


def count_visual_context_tokens(preset: Preset, grid: tuple[int, int, int]) -> int:
    """Return the number of the visual context's tokens for a source's latent grid."""
    kernel = preset.visual_context.kernel_size
    return grid[0] * (grid[1] // kernel) * (grid[2] // kernel)


def count_visual_tokens(preset: Preset, frames: int) -> int:
    """Return the number of the adapter's tokens for a clip, or for an image, which has one visual token."""
    if preset.adapter is None or preset.vision_head is None:
        return 0
    return preset.adapter.num_queries * (preset.vision_head.num_queries if frames > 1 else 1)


def check_model_limits(preset: Preset, width: int, height: int, frames: int, has_source: bool) -> None:
    """Raise InvalidInput if a clip has more positions, or an edit's source more tokens, than the model allows."""
    grid, max_positions = compute_latent_grid(width, height, frames), preset.decoder["rope_max_seq_len"]
    sizes = (("frames", frames), ("height", height), ("width", width))
    for axis, patch, (field, size) in zip(grid, preset.decoder["patch_size"], sizes, strict=True):
        if axis // patch > max_positions:
            raise InvalidInput(field, f"{size} is more than this model's positions allow")
    tokens = count_visual_context_tokens(preset, grid) if has_source else 0
    max_tokens = preset.condition.max_tokens
    if preset.condition.overflow == "text":  # the prompt is what would be lost
        max_tokens -= count_visual_tokens(preset, frames) + MIN_TEXT_TOKENS
    if tokens > max_tokens:
        text = f"an edit at this size and length has {tokens} tokens of source; allowed: {max_tokens}"
        raise InvalidInput("size", text)
