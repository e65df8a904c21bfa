"""The limits on a source of pixels, and the refusals that name them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from PIL import Image

from omnivideo.errors import InvalidInput, UnreadableMedia

READABLE_FORMATS = "mp4, mov, webm, mkv, avi, gif, png, jpeg, webp or avif"


@dataclass(frozen=True)
class MediaLimits:
    """The largest source that is read.

    A picture above `max_frame_pixels` is reduced while it is decoded, unless it is above `max_still_pixels`; a clip is
    refused. `max_decoded_bytes` is the memory that all its pixels would take. `codecs` are FFmpeg's names of the
    decoders that may run; None allows all of them.
    """

    max_bytes: int = 512 * 2**20
    max_frame_pixels: int = 4096 * 2304
    max_still_pixels: int = 2**26
    max_frames: int = 2000
    max_seconds: float = 120
    max_fps: float = 240
    max_streams: int = 32
    max_decoded_bytes: int = 4 * 2**30
    codecs: tuple[str, ...] | None = None


@dataclass(frozen=True)
class MediaGuard:
    """Refuses a source with one line: the field, the source's printable name, the problem and the allowed range."""

    name: str
    limits: MediaLimits
    field: str = "source"

    def build_error(self, problem: str) -> UnreadableMedia:
        """Return the refusal, for callers that raise it from another error."""
        return UnreadableMedia(self.field, f"{self.name} {problem}".strip())

    def refuse_media(self, problem: str) -> NoReturn:
        """Raise UnreadableMedia."""
        raise self.build_error(problem)

    def check_at_most(self, quantity: str, value: float, limit: float) -> None:
        """Raise UnreadableMedia if `value` is above `limit`."""
        if value > limit:
            self.refuse_media(f"has {value:.12g} {quantity}; allowed: 1 to {limit:.12g}")

    def check_dimensions(self, width: int, height: int, frames: int, seconds: float) -> None:
        """Raise UnreadableMedia if the frame size, the number of frames, the duration or the pixels exceed a limit."""
        self.check_at_most("pixels per frame", width * height, self.limits.max_frame_pixels)
        self.check_at_most("frames", frames, self.limits.max_frames)
        self.check_at_most("seconds", seconds, self.limits.max_seconds)
        self.check_at_most("bytes of pixels", width * height * frames * 3, self.limits.max_decoded_bytes)

    @contextmanager
    def translate_decoder_errors(self) -> Iterator[None]:
        """Turn any exception that a decoder raises on hostile bytes into UnreadableMedia."""
        try:
            yield
        except InvalidInput:  # such as UnreadableMedia
            raise
        except Image.DecompressionBombError:
            self.refuse_media(f"has too many pixels per frame; allowed: 1 to {self.limits.max_still_pixels}")
        except MemoryError as error:  # FFmpeg also raises it for many damaged headers
            problem = "is damaged, or needs more memory than is available; allowed: a shorter or smaller source"
            raise self.build_error(problem) from error
        except Exception as error:
            problem = f"is damaged, cut short or uses an unknown codec; allowed: a complete {READABLE_FORMATS}"
            raise self.build_error(problem) from error


def printable_name(path: Path) -> str:
    """Return the file's name for a message: quoted, without its folder, and on one line."""
    return "'" + "".join(char if char.isprintable() else "?" for char in path.name or str(path)) + "'"
