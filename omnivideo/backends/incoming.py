"""The way a user's media come into a service of many users: as bytes, in a data URL, or by URL from allowed hosts.

Nothing here believes what it is told: not a size, not a type, not a name.  Every refusal is one line that names the
field and the allowed range.
"""

import binascii
import re

from omnivideo.backends.decoder.video import Limits
from omnivideo.backends.decoding import BOUNDS, LIMITS, Bounds, measured, suffix_of
from omnivideo.backends.fetching import fetch
from omnivideo.contracts import Artifact
from omnivideo.errors import InvalidInput, UnreadableMedia
from omnivideo.ports import ObjectStore

__all__ = ["data_url", "fetch", "taken"]

# ---------------------------------------------------------------- bytes into the store


def taken(
    store: ObjectStore, data: bytes, made_by: str, name: str = "", *,
    limits: Limits = LIMITS, bounds: Bounds = BOUNDS, field: str = "source",
) -> Artifact:  # fmt: skip
    """A user's bytes as an artifact; `name` is what the user calls them, and gives words only, never a path or a type.

    Raises UnreadableMedia that names the field, or Busy, and then nothing is stored.  `limits` may be lower than the
    default, never higher: the default is what read_media takes.

    That is what makes media.frames_of safe to call on an artifact in a process without limits of its own: the key is
    the digest of these very bytes, which were decoded whole by the same reader, under the same limits or lower ones,
    before they got it.
    """
    assert all(getattr(limits, cap) <= most for cap, most in vars(LIMITS).items() if most is not None)
    try:
        found = measured(data, limits, bounds)
    except UnreadableMedia as error:
        raise UnreadableMedia(field, f"{called(name)} {str(error).removeprefix('source: ')}") from None
    key = store.put(data, suffix_of(data[:64]) or "bin")
    return Artifact(
        key=key, medium=found.kind, width=found.width, height=found.height, frames=found.frames,
        fps=found.fps or 1.0, about=words(name) or found.kind, made_by=made_by,
    )  # fmt: skip


def base(name: str) -> str:
    """The last part of a path of any system, short."""
    return re.split(r"[\\/]", name)[-1][:100]


def called(name: str) -> str:
    """The name for a message: on one line whatever it holds."""
    shown = "".join(char if char.isprintable() else "?" for char in base(name))
    return f"'{shown}'" if shown else "the file"


def words(name: str) -> str:
    """The words of a file name: letters and digits of any script, without the ending."""
    stem = re.sub(r"\.\w{1,5}$", "", base(name))
    return " ".join(re.findall(r"[^\W_]+", stem))


# ---------------------------------------------------------------- data URLs

DATA_URL = re.compile(r"data:(?:image|video)/[a-z0-9][a-z0-9.+-]{0,63};base64,", re.IGNORECASE)


def data_url(text: str, most: int = LIMITS.max_bytes, *, field: str = "url") -> bytes:
    """The bytes of `data:image/...;base64,...` or `data:video/...`; raises InvalidInput before it decodes too much.

    The type is not kept: content decides.
    """
    head = DATA_URL.match(text[:200])
    if head is None:
        raise InvalidInput(field, "is no data URL of media; allowed: data:image/...;base64,... or data:video/...")
    padding = text[-2:].count("=")
    size = (len(text) - head.end()) // 4 * 3 - padding
    if not 1 <= size <= most:
        raise InvalidInput(field, f"holds {size} bytes; allowed: 1 to {most}")
    try:
        data = binascii.a2b_base64(text[head.end() :], strict_mode=True)
    except ValueError:  # binascii.Error is one, and so is a letter beyond ASCII
        data = b""
    if len(data) != size:  # strict mode lets padding through that pads nothing
        raise InvalidInput(field, "is damaged; allowed: base64 with its padding and nothing else")
    return data
