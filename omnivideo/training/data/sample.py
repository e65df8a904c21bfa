"""One sample of any of the six tasks, and the media in it, read with distrust.

    understanding   source, turns (question, answer) ...
    generation      target, text (the prompt)
    editing         source, target, text (the instruction)

Pixels are uint8 [F, H, W, 3], RGB.  Media are kept as they came (mp4, png, jpeg ...) until somebody needs pixels.
"""

import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageOps

from omnivideo.contracts import TASKS, TRAINING_TASKS, TrainingTask, get_task_medium, is_editing_task
from omnivideo.errors import ArtifactNotFound, InvalidInput, UnreadableMedia

MAX_FRAME_PIXELS = 8192 * 8192  # of a frame
MAX_DECODED_BYTES = 4 << 30  # bytes of a clip's pixels
MAGIC_BYTES = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpg", b"GIF8": "gif", b"\x1a\x45\xdf\xa3": "webm"}
CLIP_DEMUXERS = {"mp4": "mov", "webm": "matroska", "avi": "avi"}  # FFmpeg's names of the only demuxers that are let in


@dataclass(frozen=True)
class TrainingSample:
    """`caption` is what the target of an edit shows, where its source says; `origin` names the data set."""

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
    width: int
    height: int
    frames: int
    fps: float


SkippedSample = tuple[str, str, str]  # kind, where, what


@dataclass
class SkipReport:
    """What was skipped, and why: counted by kind, named in the report."""

    skipped_samples: list[SkippedSample] = field(default_factory=list)

    def add_skip(self, kind: str, location: str, detail: str) -> None:
        self.skipped_samples.append((kind, location, detail))

    def merge_skips(self, incoming: Iterable[SkippedSample]) -> list[SkippedSample]:
        """Adds those that are not known yet, and returns them: a sample is met again in every epoch."""
        unseen = [skip for skip in dict.fromkeys(incoming) if skip not in self.skipped_samples]
        self.skipped_samples += unseen
        return unseen

    @contextmanager
    def skip_on_error(self, location: str) -> Iterator[None]:
        """Notes a sample that cannot be used, and goes on after it."""
        try:
            yield
        except UnreadableMedia as error:
            self.add_skip("unreadable media", location, str(error))
        except ArtifactNotFound as error:
            self.add_skip("missing file", location, str(error))
        except InvalidInput as error:
            self.add_skip("missing file" if error.field == "file" else "wrong record", location, str(error))

    def count_by_kind(self) -> dict[str, int]:
        return dict(sorted(Counter(kind for kind, _, _ in self.skipped_samples).items()))

    def write_jsonl(self, path: Path) -> None:
        """One line of JSON for each."""
        rows = [{"kind": kind, "where": where, "what": what} for kind, where, what in self.skipped_samples]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------- media


def detect_format(data: bytes) -> str:
    """The file type by its content; raises UnreadableMedia for what is none of ours."""
    for start, kind in MAGIC_BYTES.items():
        if data.startswith(start):
            return kind
    if data[:4] == b"RIFF" and data[8:12] in (b"WEBP", b"AVI "):
        return data[8:12].decode().strip().lower()
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mp4"
    raise UnreadableMedia("media", "it is no image or video; allowed: mp4, mov, webm, mkv, avi, gif, png, jpeg, webp")


def is_clip(data: bytes) -> bool:
    return detect_format(data) in CLIP_DEMUXERS


def decode_media(data: bytes) -> Iterator[tuple[np.ndarray, float, float]]:
    """Every frame, the frames a second on average, and the time of this one in s; a still has one, 0 and 0.

    Raises UnreadableMedia where a byte is amiss.
    """
    kind = detect_format(data)
    try:
        yield from decode_clip(data, CLIP_DEMUXERS[kind]) if kind in CLIP_DEMUXERS else decode_still(data)
    except UnreadableMedia:
        raise
    except Exception as error:  # decoders raise whatever they like on hostile bytes
        raise UnreadableMedia("media", f"the {kind} is damaged or cut short ({type(error).__name__})") from error


def decode_still(data: bytes) -> Iterator[tuple[np.ndarray, float, float]]:
    """The first picture, upright, alpha on white."""
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "GIF", "WEBP")) as image:
        check_frame_size(*image.size)
        upright = ImageOps.exif_transpose(image)
        if upright.has_transparency_data:
            canvas = Image.new("RGBA", upright.size, "white")
            canvas.alpha_composite(upright.convert("RGBA"))
            upright = canvas
        yield np.asarray(upright.convert("RGB")), 0.0, 0.0


def decode_clip(data: bytes, demuxer: str) -> Iterator[tuple[np.ndarray, float, float]]:
    """A clip that ends before its header says, or has a damaged packet, is refused."""
    with av.open(io.BytesIO(data), "r", format=demuxer) as container:
        stream = container.streams.video[0]
        check_frame_size(stream.width, stream.height)
        fps, frame_count, expected_count = (
            float(stream.average_rate or stream.guessed_rate or 1),
            0,
            expected_frame_count(stream),
        )
        start_time, time = None, 0.0
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise UnreadableMedia("media", "the clip is damaged midway")
            for frame in packet.decode():
                frame_count += 1
                if frame_count * stream.width * stream.height * 3 > MAX_DECODED_BYTES:
                    raise UnreadableMedia("media", f"the clip's pixels take more than {MAX_DECODED_BYTES >> 30} GiB")
                if frame.time is not None:
                    start_time = frame.time if start_time is None else start_time
                    time = frame.time - start_time
                yield np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)), fps, time
                time += 1 / fps  # where the next one's is not told
        if frame_count < max(expected_count, 1):
            raise UnreadableMedia("media", f"the clip is cut short: {frame_count} frames of {max(expected_count, 1)}")


def expected_frame_count(stream: Any) -> int:
    """Frames that the header promises, less those its edit list cuts away; 0 where it does not say."""
    indexed = sum(not entry.is_discard for entry in stream.index_entries) if stream.frames else 0
    return min(stream.frames, indexed)


def check_frame_size(width: int, height: int) -> None:
    if not 0 < width * height <= MAX_FRAME_PIXELS:
        raise UnreadableMedia("media", f"a frame has {width}x{height} pixels; allowed: 1 to {MAX_FRAME_PIXELS}")


def measure_media(data: bytes) -> MediaShape:
    """A medium's shape, by decoding all of it, one frame in memory at a time."""
    frame_sizes = [(*pixels.shape[:2], fps) for pixels, fps, _ in decode_media(data)]
    if len(set(frame_sizes)) != 1:
        raise UnreadableMedia("media", "the clip changes its frame size midway, or has no frame")
    height, width, fps = frame_sizes[0]
    return MediaShape(width, height, len(frame_sizes), fps)


def resample_media(
    data: bytes, width: int, height: int, frames: int, fps: float, frame_indices: Sequence[int] | None = None
) -> np.ndarray:
    """Pixels [frames, height, width, 3]: cropped at the centre to the aspect ratio, resized, every 1/fps seconds;
    `only` some of them, in their order.

    A still stands for all frames; a clip that is too short holds its last frame.  Decoded as far as it is looked at.
    """
    moments = (np.arange(frames) if frame_indices is None else np.array(frame_indices)) / fps + 1e-6
    resampled, previous_pixels, previous_time = list[np.ndarray](), np.empty(0), 0.0
    for pixels, rate, time in decode_media(data):
        # It is the nearest one from half way on, but after a pause not long before its time.
        begins = time - min((time - previous_time) / 2, 0.5 / (rate or 1))
        count = int(np.searchsorted(moments, begins)) - len(resampled)
        resampled += [center_crop_resize(previous_pixels, width, height)] * count if count > 0 else []
        if len(resampled) == len(moments):
            break
        previous_pixels, previous_time = pixels, time
    resampled += [center_crop_resize(previous_pixels, width, height)] * (len(moments) - len(resampled))
    return np.stack(resampled)


def center_crop_resize(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """The largest centred box of the wanted aspect ratio, resized to [height, width, 3]."""
    full_height, full_width = pixels.shape[:2]
    if (full_height, full_width) == (height, width):
        return pixels
    scale = min(full_width / width, full_height / height)
    left, top = (full_width - width * scale) / 2, (full_height - height * scale) / 2
    box = (left, top, full_width - left, full_height - top)
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS, box=box))


# ---------------------------------------------------------------- checking


def required_fields(task: TrainingTask) -> tuple[str, ...]:
    """The fields that a task's samples have."""
    if task not in TASKS:
        return ("source", "turns")
    return ("source", "target", "text") if is_editing_task(task) else ("target", "text")


def check_sample(sample: TrainingSample) -> None:
    """Raises InvalidInput where a field is missing, is one too many, or is a clip where the task wants an image."""
    if sample.task not in TRAINING_TASKS:
        raise InvalidInput("task", f"{sample.task!r} is not one of {', '.join(TRAINING_TASKS)}")
    for name in ("source", "target", "text", "turns"):
        if bool(getattr(sample, name)) != (name in required_fields(sample.task)):
            raise InvalidInput(
                name, f"{'missing from' if name in required_fields(sample.task) else 'not for'} {sample.task}"
            )
    all_text = "".join((sample.text, sample.caption, *(side for turn in sample.turns for side in turn)))
    if any("\ud800" <= letter <= "\udfff" for letter in all_text):
        raise InvalidInput("text", "it holds half of a surrogate pair")
    for data in (sample.source, sample.target):
        if data is not None and is_clip(data) != (get_task_medium(sample.task) == "video"):
            raise InvalidInput("task", f"{sample.task} with a medium of type {detect_format(data)}")


def measure_sample(sample: TrainingSample) -> MediaShape:
    """The shape of what is to be drawn, or looked at; every medium is decoded, so a damaged one is found."""
    shapes = [measure_media(data) for data in (sample.source, sample.target) if data is not None]
    return shapes[-1]
