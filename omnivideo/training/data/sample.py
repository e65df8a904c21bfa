"""Training samples of the six tasks, and the report of the samples that had to be skipped.

    understanding   source, turns (question, answer) ...
    generation      target, text (the prompt)
    editing         source, target, text (the instruction)

A sample keeps its media as encoded bytes (mp4, png, jpeg ...); `omnivideo.media` decodes them when pixels are needed.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from omnivideo.contracts import TASKS, TRAINING_TASKS, TrainingTask, get_task_medium, is_editing_task
from omnivideo.errors import ArtifactNotFound, InvalidInput, UnreadableMedia
from omnivideo.media.containers import sniff_format
from omnivideo.media.decode import CLIP_DEMUXERS
from omnivideo.media.limits import READABLE_FORMATS, MediaLimits
from omnivideo.media.read import measure_media

# Data sets hold larger frames and longer clips than users may send; memory is the only bound that matters here.
TRAINING_LIMITS = MediaLimits(
    max_bytes=4 << 30, max_frame_pixels=8192 * 8192, max_frames=1_000_000, max_seconds=86_400, max_fps=1000,
    max_decoded_bytes=4 << 30,
)  # fmt: skip
SUFFIX_BY_FORMAT = {"mov": "mp4", "matroska": "webm", "jpeg": "jpg"}  # other formats are their own suffix


@dataclass(frozen=True)
class TrainingSample:
    """A sample of one task; `caption` describes the target of an edit, if known, and `origin` names the data set."""

    task: TrainingTask
    text: str = ""
    source: bytes | None = None
    target: bytes | None = None
    turns: tuple[tuple[str, str], ...] = ()
    caption: str = ""
    origin: str = ""
    key: str = ""


@dataclass(frozen=True)
class MediaShape:
    """The shape of a stored medium; a still has one frame and 0 frames per second."""

    width: int
    height: int
    frames: int
    fps: float


SkippedSample = tuple[str, str, str]  # kind, location, detail


@dataclass
class SkipReport:
    """The skipped samples, each with its kind of fault, its location and the detail."""

    skipped_samples: list[SkippedSample] = field(default_factory=list)

    def add_skip(self, kind: str, location: str, detail: str) -> None:
        """Record a skipped sample."""
        self.skipped_samples.append((kind, location, detail))

    def merge_skips(self, incoming: Iterable[SkippedSample]) -> list[SkippedSample]:
        """Add the skips that are new and return them, since the same sample is skipped again in every epoch."""
        unseen = [skip for skip in dict.fromkeys(incoming) if skip not in self.skipped_samples]
        self.skipped_samples += unseen
        return unseen

    @contextmanager
    def skip_on_error(self, location: str) -> Iterator[None]:
        """Record a sample that cannot be used instead of raising its error."""
        try:
            yield
        except UnreadableMedia as error:
            self.add_skip("unreadable media", location, str(error))
        except ArtifactNotFound as error:
            self.add_skip("missing file", location, str(error))
        except InvalidInput as error:
            self.add_skip("missing file" if error.field == "file" else "wrong record", location, str(error))

    def count_by_kind(self) -> dict[str, int]:
        """Return the number of skipped samples of each kind of fault, sorted by kind."""
        return dict(sorted(Counter(kind for kind, _, _ in self.skipped_samples).items()))

    def write_jsonl(self, path: Path) -> None:
        """Write one line of JSON for each skipped sample."""
        rows = [{"kind": kind, "where": where, "what": what} for kind, where, what in self.skipped_samples]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------- media


def detect_format(data: bytes, field: str = "media") -> str:
    """Return the format by content, in FFmpeg's and Pillow's names; raise UnreadableMedia for any other content."""
    media_format = sniff_format(data[:16])
    if media_format is None:
        raise UnreadableMedia(field, f"it is not an image or video; allowed: {READABLE_FORMATS}")
    return media_format


def detect_member_suffix(data: bytes) -> str:
    """Return the suffix of a medium's member in a shard: png, jpg, gif, webp, mp4, webm or avi."""
    media_format = detect_format(data)
    return SUFFIX_BY_FORMAT.get(media_format, media_format)


def is_clip(data: bytes) -> bool:
    """Return whether the container is one for clips; an animated gif or webp counts as an image."""
    return detect_format(data) in CLIP_DEMUXERS


def measure_shape(data: bytes, field: str = "media") -> MediaShape:
    """Return a medium's shape by decoding all of it; only the first frame of an animation counts.

    Raises UnreadableMedia if any part is damaged.
    """
    info = measure_media(data, TRAINING_LIMITS, field=field)
    if not is_clip(data):
        return MediaShape(info.width, info.height, 1, 0.0)
    return MediaShape(info.width, info.height, info.frames, info.fps or 1.0)


# ---------------------------------------------------------------- checking


def required_fields(task: TrainingTask) -> tuple[str, ...]:
    """Return the fields that samples of a task have."""
    if task not in TASKS:
        return ("source", "turns")
    return ("source", "target", "text") if is_editing_task(task) else ("target", "text")


def check_sample(sample: TrainingSample) -> None:
    """Raise InvalidInput if a field is missing or does not belong to the task, or a medium is of the wrong kind."""
    if sample.task not in TRAINING_TASKS:
        raise InvalidInput("task", f"{sample.task!r} is not one of {', '.join(TRAINING_TASKS)}")
    for name in ("source", "target", "text", "turns"):
        is_required = name in required_fields(sample.task)
        if bool(getattr(sample, name)) != is_required:
            raise InvalidInput(name, f"{'missing from' if is_required else 'not allowed for'} {sample.task}")
    all_text = "".join((sample.text, sample.caption, *(side for turn in sample.turns for side in turn)))
    if any("\ud800" <= letter <= "\udfff" for letter in all_text):
        raise InvalidInput("text", "it contains a lone surrogate")
    for name, data in (("source", sample.source), ("target", sample.target)):
        if data is not None and is_clip(data) != (get_task_medium(sample.task) == "video"):
            raise InvalidInput(name, f"a file of type {detect_member_suffix(data)} does not fit the task {sample.task}")


def measure_sample(sample: TrainingSample) -> MediaShape:
    """Return the shape of the target, or of the source if nothing is to be generated.

    Both are decoded completely; raise UnreadableMedia if any part is damaged.
    """
    media = (("source", sample.source), ("target", sample.target))
    shapes = [measure_shape(data, name) for name, data in media if data is not None]
    return shapes[-1]
