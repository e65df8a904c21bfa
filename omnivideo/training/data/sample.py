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

from omnivideo.errors import InvalidInput, NotStored, UnreadableMedia
from omnivideo.training.data.batches import TASKS, Task

MOST_PIXELS = 8192 * 8192  # of a frame
MOST_DECODED = 4 << 30  # bytes of a clip's pixels
STARTS = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpg", b"GIF8": "gif", b"\x1a\x45\xdf\xa3": "webm"}
CLIPS = {"mp4": "mov", "webm": "matroska", "avi": "avi"}  # FFmpeg's names of the only demuxers that are let in


@dataclass(frozen=True)
class Sample:
    """`caption` is what the target of an edit shows, where its source says; `origin` names the data set."""

    task: Task
    text: str = ""
    source: bytes | None = None
    target: bytes | None = None
    turns: tuple[tuple[str, str], ...] = ()
    caption: str = ""
    origin: str = ""
    key: str = ""


@dataclass(frozen=True)
class Shape:
    width: int
    height: int
    frames: int
    fps: float


Problem = tuple[str, str, str]  # kind, where, what


@dataclass
class Problems:
    """What was skipped, and why: counted by kind, named in the report."""

    found: list[Problem] = field(default_factory=list)

    def add(self, kind: str, where: str, what: str) -> None:
        self.found.append((kind, where, what))

    def meet(self, more: Iterable[Problem]) -> list[Problem]:
        """Adds those that are not known yet, and returns them: a sample is met again in every epoch."""
        new = [one for one in dict.fromkeys(more) if one not in self.found]
        self.found += new
        return new

    @contextmanager
    def skipping(self, where: str) -> Iterator[None]:
        """Notes a sample that cannot be used, and goes on after it."""
        try:
            yield
        except UnreadableMedia as error:
            self.add("unreadable media", where, str(error))
        except NotStored as error:
            self.add("missing file", where, str(error))
        except InvalidInput as error:
            self.add("missing file" if error.field == "file" else "wrong record", where, str(error))

    def counts(self) -> dict[str, int]:
        return dict(sorted(Counter(kind for kind, _, _ in self.found).items()))

    def write(self, path: Path) -> None:
        """One line of JSON for each."""
        rows = [{"kind": kind, "where": where, "what": what} for kind, where, what in self.found]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------- media


def kind_of(data: bytes) -> str:
    """The file type by its content; raises UnreadableMedia for what is none of ours."""
    for start, kind in STARTS.items():
        if data.startswith(start):
            return kind
    if data[:4] == b"RIFF" and data[8:12] in (b"WEBP", b"AVI "):
        return data[8:12].decode().strip().lower()
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mp4"
    raise UnreadableMedia("media", "it is no image or video; allowed: mp4, mov, webm, mkv, avi, gif, png, jpeg, webp")


def is_clip(data: bytes) -> bool:
    return kind_of(data) in CLIPS


def decoded(data: bytes) -> Iterator[tuple[np.ndarray, float, float]]:
    """Every frame, the frames a second on average, and the time of this one in s; a still has one, 0 and 0.

    Raises UnreadableMedia where a byte is amiss.
    """
    kind = kind_of(data)
    try:
        yield from clip_frames(data, CLIPS[kind]) if kind in CLIPS else still_frames(data)
    except UnreadableMedia:
        raise
    except Exception as error:  # decoders raise whatever they like on hostile bytes
        raise UnreadableMedia("media", f"the {kind} is damaged or cut short ({type(error).__name__})") from error


def still_frames(data: bytes) -> Iterator[tuple[np.ndarray, float, float]]:
    """The first picture, upright, alpha on white."""
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "GIF", "WEBP")) as image:
        check_pixels(*image.size)
        upright = ImageOps.exif_transpose(image)
        if upright.has_transparency_data:
            canvas = Image.new("RGBA", upright.size, "white")
            canvas.alpha_composite(upright.convert("RGBA"))
            upright = canvas
        yield np.asarray(upright.convert("RGB")), 0.0, 0.0


def clip_frames(data: bytes, demuxer: str) -> Iterator[tuple[np.ndarray, float, float]]:
    """A clip that ends before its header says, or has a damaged packet, is refused."""
    with av.open(io.BytesIO(data), "r", format=demuxer) as container:
        stream = container.streams.video[0]
        check_pixels(stream.width, stream.height)
        fps, found, wanted = float(stream.average_rate or stream.guessed_rate or 1), 0, kept_frames(stream)
        begun, time = None, 0.0
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise UnreadableMedia("media", "the clip is damaged midway")
            for frame in packet.decode():
                found += 1
                if found * stream.width * stream.height * 3 > MOST_DECODED:
                    raise UnreadableMedia("media", f"the clip's pixels take more than {MOST_DECODED >> 30} GiB")
                if frame.time is not None:
                    begun = frame.time if begun is None else begun
                    time = frame.time - begun
                yield np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)), fps, time
                time += 1 / fps  # where the next one's is not told
        if found < max(wanted, 1):
            raise UnreadableMedia("media", f"the clip is cut short: {found} frames of {max(wanted, 1)}")


def kept_frames(stream: Any) -> int:
    """Frames that the header promises, less those its edit list cuts away; 0 where it does not say."""
    indexed = sum(not entry.is_discard for entry in stream.index_entries) if stream.frames else 0
    return min(stream.frames, indexed)


def check_pixels(width: int, height: int) -> None:
    if not 0 < width * height <= MOST_PIXELS:
        raise UnreadableMedia("media", f"a frame has {width}x{height} pixels; allowed: 1 to {MOST_PIXELS}")


def measure(data: bytes) -> Shape:
    """A medium's shape, by decoding all of it, one frame in memory at a time."""
    seen = [(*pixels.shape[:2], fps) for pixels, fps, _ in decoded(data)]
    if len(set(seen)) != 1:
        raise UnreadableMedia("media", "the clip changes its frame size midway, or has no frame")
    height, width, fps = seen[0]
    return Shape(width, height, len(seen), fps)


def fitted(
    data: bytes, width: int, height: int, frames: int, fps: float, only: Sequence[int] | None = None
) -> np.ndarray:
    """Pixels [frames, height, width, 3]: cropped at the centre to the aspect ratio, resized, every 1/fps seconds;
    `only` some of them, in their order.

    A still stands for all frames; a clip that is too short holds its last frame.  Decoded as far as it is looked at.
    """
    moments = (np.arange(frames) if only is None else np.array(only)) / fps + 1e-6
    made, before, last = list[np.ndarray](), np.empty(0), 0.0
    for pixels, rate, time in decoded(data):
        # It is the nearest one from half way on, but after a pause not long before its time.
        begins = time - min((time - last) / 2, 0.5 / (rate or 1))
        count = int(np.searchsorted(moments, begins)) - len(made)
        made += [cropped(before, width, height)] * count if count > 0 else []
        if len(made) == len(moments):
            break
        before, last = pixels, time
    made += [cropped(before, width, height)] * (len(moments) - len(made))
    return np.stack(made)


def cropped(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """The largest centred box of the wanted aspect ratio, resized to [height, width, 3]."""
    full_height, full_width = pixels.shape[:2]
    if (full_height, full_width) == (height, width):
        return pixels
    scale = min(full_width / width, full_height / height)
    left, top = (full_width - width * scale) / 2, (full_height - height * scale) / 2
    box = (left, top, full_width - left, full_height - top)
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS, box=box))


# ---------------------------------------------------------------- checking


def needs(task: Task) -> tuple[str, ...]:
    """The fields that a task's samples have."""
    if task.endswith("understanding"):
        return ("source", "turns")
    return ("source", "target", "text") if task.endswith("editing") else ("target", "text")


def check(sample: Sample) -> None:
    """Raises InvalidInput where a field is missing, is one too many, or is a clip where the task wants an image."""
    if sample.task not in TASKS:
        raise InvalidInput("task", f"{sample.task!r} is not one of {', '.join(TASKS)}")
    for name in ("source", "target", "text", "turns"):
        if bool(getattr(sample, name)) != (name in needs(sample.task)):
            raise InvalidInput(name, f"{'missing from' if name in needs(sample.task) else 'not for'} {sample.task}")
    said = "".join((sample.text, sample.caption, *(side for turn in sample.turns for side in turn)))
    if any("\ud800" <= letter <= "\udfff" for letter in said):
        raise InvalidInput("text", "it holds half of a surrogate pair")
    for data in (sample.source, sample.target):
        if data is not None and is_clip(data) != ("video" in sample.task):
            raise InvalidInput("task", f"{sample.task} with a medium of type {kind_of(data)}")


def shape_of(sample: Sample) -> Shape:
    """The shape of what is to be drawn, or looked at; every medium is decoded, so a damaged one is found."""
    shapes = [measure(data) for data in (sample.source, sample.target) if data is not None]
    return shapes[-1]
