"""What the Python drivers share: the README's conversation, a picture, and a record of what a client saw.

    PYTHON driver.py ADDRESS KEY FOLDER

A driver runs in its client's environment, without our package, and writes FOLDER/observations.json: for each feature
what the client returned, or the error that it raised.
"""

import base64
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ADDRESS, KEY, FOLDER = sys.argv[1], sys.argv[2], Path(sys.argv[3])
PICTURE = Path(__file__).parent / "picture.png"
BASE_URL = f"{ADDRESS}/v1"
MODEL, TEXT_MODEL = "tiny", "tiny-text"
CONVERSATION = ("a small red circle moving right", "make it blue", "how does it move?")
TITLE_REQUEST = "Suggest a short title for this conversation."
OVER_LONG = "a red circle " * 400
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


def read_picture() -> bytes:
    """Return the picture that is described: a red square on white, 640x480."""
    return PICTURE.read_bytes()


def encode_picture() -> str:
    return "data:image/png;base64," + base64.b64encode(read_picture()).decode()


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
