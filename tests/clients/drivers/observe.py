"""What the Python drivers share: the README's conversation, a picture, and a record of what a client saw.

    PYTHON driver.py ADDRESS KEY FOLDER

A driver runs in its client's environment, without our package, and writes FOLDER/observations.json: for each feature
what the client returned, or the error that it raised.
"""

import base64
import json
import struct
import sys
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

ADDRESS, KEY, FOLDER = sys.argv[1], sys.argv[2], Path(sys.argv[3])
BASE_URL = f"{ADDRESS}/v1"
MODEL, TEXT_MODEL = "tiny", "tiny-text"
CONVERSATION = ("a small red circle moving right", "make it blue", "how does it move?")
TITLE_REQUEST = "Suggest a short title for this conversation."
TOOL_NAME, TOOL_RESULT = "look_up_colour", "the colour is green"

seen: dict[str, dict[str, Any]] = {}


def observe(feature: str) -> Callable[[Callable[[], Any]], None]:
    """Run the decorated function at once and write down what it returns or raises."""

    def run(look: Callable[[], Any]) -> None:
        try:
            seen[feature] = {"saw": look()}
        except Exception as error:
            traceback.print_exc()
            seen[feature] = {"error": f"{type(error).__name__}: {error}"[:1000]}
        (FOLDER / "observations.json").write_text(json.dumps(seen, indent=1))

    return run


def make_square_png(size: int = 64) -> bytes:
    """Return a picture of a red square on black, without an imaging library."""
    rows = []
    for y in range(size):
        inside = [max(abs(x - size / 2), abs(y - size / 2)) < size / 4 for x in range(size)]
        rows.append(b"\0" + b"".join(b"\xdc\x1e\x1e" if hit else b"\0\0\0" for hit in inside))
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"".join(rows))),
        (b"IEND", b""),
    )
    packed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def make_square_url() -> str:
    return "data:image/png;base64," + base64.b64encode(make_square_png()).decode()


def describe_bytes(data: bytes) -> dict[str, Any]:
    """Return what the test checks of a file: its first bytes and its length."""
    return {"begins": data[:12].hex(), "length": len(data)}


def hold(answer: Callable[[list[dict[str, str]]], str]) -> dict[str, Any]:
    """Hold the conversation with a function from all messages to the next answer."""
    messages: list[dict[str, str]] = []
    for words in CONVERSATION:
        messages.append({"role": "user", "content": words})
        messages.append({"role": "assistant", "content": answer(messages)})
    return {"answers": [message["content"] for message in messages[1::2]]}
