"""Detect file formats by content, and check that a file has all the bytes that its container declares."""

import os
from functools import cache
from importlib.util import find_spec
from typing import BinaryIO

AVIF_BRANDS = (b"avif", b"avis")
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"mif1", b"msf1")  # pictures in mp4's container format
MAGIC_BYTES = {
    b"\x89PNG\r\n\x1a\n": "png",
    b"\xff\xd8\xff": "jpeg",
    b"GIF8": "gif",
    b"\x1a\x45\xdf\xa3": "matroska",
}


@cache
def can_read_heic() -> bool:
    """Return whether the optional package is installed that decodes HEIC: pip install 'omnivideo[heic]'."""
    return find_spec("pillow_heif") is not None


def is_heic(head: bytes) -> bool:
    return head[4:8] == b"ftyp" and head[8:12] in HEIC_BRANDS


def sniff_format(head: bytes) -> str | None:
    """Detect the format from the first 16 bytes: png, jpeg, gif, webp, avif, mov, matroska or avi; None for any other.

    HEIC is "heif" if it can be read here. The names are those of Pillow's formats and FFmpeg's demuxers.
    """
    for prefix, kind in MAGIC_BYTES.items():
        if head.startswith(prefix):
            return kind
    if head.startswith(b"RIFF"):
        return {b"WEBP": "webp", b"AVI ": "avi"}.get(head[8:12])
    if head[4:8] == b"ftyp" and head[8:12] in AVIF_BRANDS:
        return "avif"
    if is_heic(head):
        return "heif" if can_read_heic() else None
    boxes = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
    return "mov" if head[4:8] in boxes else None


def read_stated_size(file: BinaryIO, kind: str, size: int) -> int:
    """Return the size in bytes that the content declares; more than `size` means that the file is cut short.

    Return `size` if the content does not declare one.
    """
    if kind in ("png", "gif"):
        file.seek(max(0, size - 2**16))
        tail = file.read()
        is_complete = b"IEND\xaeB`\x82" in tail if kind == "png" else tail.rstrip(b"\0\r\n").endswith(b";")
        return size if is_complete else size + 1
    if kind in ("mov", "avif", "heif"):
        return find_boxes_end(file, size)
    if kind == "matroska":
        return find_segment_end(file, size)
    if kind == "avi":
        file.seek(4)
        return 8 + int.from_bytes(file.read(4), "little")
    return size


def find_boxes_end(file: BinaryIO, size: int) -> int:
    """Return the offset at which the last top-level box of an mp4 ends (ISO/IEC 14496-12, 4.2)."""
    offset = 0
    for _ in range(10_000):  # a fragmented mp4 has two boxes per frame
        file.seek(offset)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:], "big")
        if length == 0 and len(head) >= 8:  # the box reaches to the end of the file
            return size
        offset += max(8, length)
        if offset >= size:
            return offset
    return size


def find_segment_end(file: BinaryIO, size: int) -> int:
    """Return the offset at which the segment of a webm or mkv ends.

    Return `size` if its length is unknown, as in a live recording.
    """
    file.seek(4)
    file.seek(read_vint(file) or 0, os.SEEK_CUR)
    if file.read(4) != b"\x18\x53\x80\x67":
        return size
    length = read_vint(file)
    return size if length is None else file.tell() + length


def read_vint(file: BinaryIO) -> int | None:
    """Read a variable-size integer (RFC 8794, section 4); return None for the reserved value that means unknown."""
    first = file.read(1)[0]
    width = 9 - first.bit_length()
    value = int.from_bytes(bytes([first & (0xFF >> width)]) + file.read(width - 1), "big")
    return None if value == 2 ** (7 * width) - 1 else value
