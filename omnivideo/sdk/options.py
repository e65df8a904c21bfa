"""What Studio, Client and AsyncClient share: the options of their methods, their sources, and the seeds of several."""

import io
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, Union

from omnivideo.contracts import MAX_SEED, StepProgress
from omnivideo.errors import InvalidInput

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from omnivideo.sdk.result import Result

# A file, a picture, uint8 frames [H, W, 3] or [F, H, W, 3], or what another call has returned.
Source: TypeAlias = Union[str, Path, "Image", "np.ndarray[Any, Any]", "Result"]
StepCallback: TypeAlias = Callable[[StepProgress], None]
TextCallback: TypeAlias = Callable[[str], None]
MAX_RESULTS = 64
CLIP_TO_ANIMATE = "it is a clip; give a picture, or extend or edit the clip"
PICTURE_TO_EXTEND = "it is a picture; give a clip, or animate the picture"
SOURCE_TYPES = "a path, a PIL image, a uint8 array [H, W, 3] or [F, H, W, 3], or a result"


class SamplingOptions(TypedDict, total=False):
    """The options of an edit. What is None or left out comes from the preset."""

    width: int | None
    height: int | None
    frames: int | None
    fps: float | None
    seconds: float | None
    steps: int | None
    guidance_scale: float | None
    flow_shift: float | None
    negative_prompt: str | None
    seed: int
    progress: bool | None
    on_step: StepCallback | None


class GenerationOptions(SamplingOptions, total=False):
    """The options of a generation. With `image` None, the model decides between an image and a clip."""

    image: bool | None


def ignore_text(piece: str) -> None:
    """Do nothing; the default of `on_text`."""


def choose_seeds(seed: int, n: int) -> list[int]:
    """Return `n` consecutive seeds, beginning with `seed`, or with any if it is -1. Raises InvalidInput."""
    if not 1 <= n <= MAX_RESULTS:
        raise InvalidInput("n", f"{n} results cannot be made in one call; allowed: 1 to {MAX_RESULTS}")
    first = secrets.randbelow(2**31) if seed == -1 else seed
    return [first] if n == 1 else [(first + index) % (MAX_SEED + 1) for index in range(n)]


def find_requested_medium(
    image: bool | None, frames: int | None, fps: float | None, seconds: float | None
) -> bool | None:
    """Return whether an image is asked for (True) or a clip (False), or None if the model is to decide."""
    if image is None and any(value is not None for value in (frames, fps, seconds)):
        return frames == 1
    return image


# ---------------------------------------------------------------- sources


@dataclass(frozen=True)
class SourceFile:
    """A source as a file: a path, or its content. `name` is what manifests and services call it."""

    name: str
    file: Path | bytes

    def read(self, field: str = "source") -> bytes:
        if isinstance(self.file, bytes):
            return self.file
        try:
            return self.file.read_bytes()
        except OSError as error:
            raise InvalidInput(field, f"{self.name!r} cannot be read: {error.strerror}") from None


def to_source_file(source: Source, field: str = "source") -> SourceFile:
    """Return a source as a file. Raises an InvalidInput that names the field for anything that is none."""
    if isinstance(source, str | Path):
        return SourceFile(Path(source).name, Path(source))
    from omnivideo.sdk.result import Result

    if isinstance(source, Result):
        return SourceFile(f"result.{source.suffix}", source.data)
    import numpy as np
    from PIL import Image

    if isinstance(source, Image.Image):
        buffer = io.BytesIO()
        has_alpha = "A" in source.mode or "transparency" in source.info
        source.convert("RGBA" if has_alpha else "RGB").save(buffer, "PNG")
        return SourceFile("image.png", buffer.getvalue())
    if isinstance(source, np.ndarray):
        return encode_array(source, field)
    raise InvalidInput(field, f"it is a {type(source).__name__}; allowed: {SOURCE_TYPES}")


def encode_array(array: "np.ndarray[Any, Any]", field: str) -> SourceFile:
    from omnivideo.media.artifacts import encode_clip
    from omnivideo.sdk.result import ARRAY_FPS

    frames = array[None] if array.ndim == 3 else array
    if array.dtype != "uint8" or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        shape = "x".join(map(str, array.shape))
        raise InvalidInput(field, f"it is an array of {array.dtype} and shape {shape}; allowed: {SOURCE_TYPES}")
    data, suffix = encode_clip(frames, ARRAY_FPS)
    return SourceFile(f"array.{suffix}", data)
