"""Accept media from users: as bytes, in a data URL, or by URL from allowed hosts.

Declared sizes, types and names are never trusted. Every refusal is one line with the field and the allowed range.
"""

import binascii
import io
import re
from typing import BinaryIO

from omnivideo.contracts import Artifact
from omnivideo.errors import InvalidInput, UnreadableMedia
from omnivideo.media.fetch import fetch_media
from omnivideo.media.limits import MediaLimits
from omnivideo.media.sandbox import (
    DEFAULT_MEDIA_LIMITS,
    DEFAULT_PROCESS_LIMITS,
    ProcessLimits,
    detect_suffix,
    measure_in_sandbox,
)
from omnivideo.ports import SweepableObjectStore

__all__ = ["decode_data_url", "fetch_media", "ingest_media"]

# ---------------------------------------------------------------- bytes into the store


def ingest_media(
    store: SweepableObjectStore, source: bytes | BinaryIO, made_by: str, name: str = "", *,
    limits: MediaLimits = DEFAULT_MEDIA_LIMITS, process_limits: ProcessLimits = DEFAULT_PROCESS_LIMITS,
    field: str = "source", owner: str = "",
) -> Artifact:  # fmt: skip
    """Store an owner's bytes or file as an artifact, with only a part of a file in memory.

    The user's `name` gives only words of the caption, never a path or a type. Raises UnreadableMedia with the field, or
    DecodingBusy; nothing is stored then. `limits` may only be lower than the default ones, which `read_media` applies.

    Because of this check, `load_frames` is safe in an unconfined process: the key is the digest of these bytes, which
    the same reader has already decoded completely, under the same or lower limits.
    """
    assert all(
        getattr(limits, limit_name) <= max_value
        for limit_name, max_value in vars(DEFAULT_MEDIA_LIMITS).items()
        if max_value is not None
    )
    try:
        info = measure_in_sandbox(source, limits, process_limits, owner)
    except UnreadableMedia as error:
        raise UnreadableMedia(field, f"{printable_file_name(name)} {str(error).removeprefix('source: ')}") from None
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    file.seek(0)
    key = store.put_stream(file, detect_suffix(file.read(64)) or "bin")
    return Artifact(
        key=key, medium=info.kind, width=info.width, height=info.height, frames=info.frames,
        fps=info.fps or 1.0, caption=words_from_name(name) or info.kind, created_by=made_by,
    )  # fmt: skip


def base_name(name: str) -> str:
    """Return the last part of a path of any operating system, truncated to 100 characters."""
    return re.split(r"[\\/]", name)[-1][:100]


def printable_file_name(name: str) -> str:
    """Return the name for a message, on one line."""
    printable = "".join(char if char.isprintable() else "?" for char in base_name(name))
    return f"'{printable}'" if printable else "the file"


def words_from_name(name: str) -> str:
    """Return the words of a file name without its suffix: letters and digits of any script."""
    stem = re.sub(r"\.\w{1,5}$", "", base_name(name))
    return " ".join(re.findall(r"[^\W_]+", stem))


# ---------------------------------------------------------------- data URLs

DATA_URL_PATTERN = re.compile(r"data:(?:image|video)/[a-z0-9][a-z0-9.+-]{0,63};base64,", re.IGNORECASE)


def decode_data_url(text: str, max_bytes: int = DEFAULT_MEDIA_LIMITS.max_bytes, *, field: str = "url") -> bytes:
    """Return the bytes of `data:image/...;base64,...` or `data:video/...`; check their size before decoding.

    The declared type is ignored, since the content decides. Raises InvalidInput for anything else.
    """
    head = DATA_URL_PATTERN.match(text[:200])
    if head is None:
        raise InvalidInput(field, "is not a data URL of media; allowed: data:image/...;base64,... or data:video/...")
    padding = text[-2:].count("=")
    size = (len(text) - head.end()) // 4 * 3 - padding
    if not 1 <= size <= max_bytes:
        raise InvalidInput(field, f"holds {size} bytes; allowed: 1 to {max_bytes}")
    try:
        data = binascii.a2b_base64(text[head.end() :], strict_mode=True)
    except ValueError:  # binascii.Error is a ValueError; non-ASCII characters raise one too
        data = b""
    if len(data) != size:  # strict mode accepts superfluous padding
        raise InvalidInput(field, "is damaged; allowed: base64 with its padding and nothing else")
    return data
