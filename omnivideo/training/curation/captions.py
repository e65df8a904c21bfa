"""A clip's caption from omnivideo's language model server (`POST /v1/write`, one JSON string a line, then null).

The recipe of a caption is in `QUESTION`; any callable from frames to a string stands in this place as well.
"""

import base64
import io
import json
import time
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from omnivideo.errors import InvalidInput, ModelAway, UnreadableMedia
from omnivideo.training.curation.reading import encode_into, needed

# uint8 [F, H, W, 3] at SHOWN_FPS; UnreadableMedia leaves this clip without, any other exception ends the run.
Caption = Callable[[np.ndarray], str]

QUESTION = (
    "Describe this video in one paragraph for somebody who is to draw it: who or what is in it and what it looks "
    "like, what happens, where, how the camera moves, the light and the style. Name only what can be seen."
)
SHOWN_FPS = 2.0
TRIES = 4  # pauses of 0.5, 1, 2 s
OF_ALL = (401, 403, 404, 405)  # what is wrong with the address or the key, not with a clip
LATER = (408, 425, 429)
MOST_TOKENS = 256


class ServedCaption:
    """The port, wired to a server at `address`."""

    def __init__(self, address: str, question: str = QUESTION):
        httpx = needed("httpx")
        self.question = question
        self.errors = httpx.HTTPError
        self.http = httpx.Client(base_url=address, timeout=httpx.Timeout(300.0, connect=5.0), trust_env=False)

    def __call__(self, frames: np.ndarray) -> str:
        shown = {"data": mp4(frames), "suffix": "mp4", "medium": "video", "fps": SHOWN_FPS}
        body = {"asked": {"text": self.question, "shown": [shown]}, "most": MOST_TOKENS}
        for attempt in range(TRIES):
            try:
                return self.answer(body)
            except self.errors:
                time.sleep(0.5 * 2**attempt)
        raise ModelAway("the language model at --captions does not answer; run again to go on where this stopped")

    def close(self) -> None:
        self.http.close()

    def answer(self, body: dict) -> str:
        answer = self.http.post("/v1/write", json=body)
        if answer.status_code in OF_ALL:
            what = f"{answer.status_code} {answer.reason_phrase}"
            raise InvalidInput("captions", f"the server answers {what}; allowed: omnivideo's language model server")
        if answer.is_client_error and answer.status_code not in LATER:
            raise UnreadableMedia("captions", f"the server refuses the clip: {' '.join(answer.text.split())[:200]}")
        answer.raise_for_status()
        pieces = [json.loads(line) for line in answer.text.splitlines() if line]
        if not pieces or pieces[-1] is not None:  # the server went away in the middle
            raise self.errors("cut short")
        return "".join(pieces[:-1]).strip()


def mp4(frames: np.ndarray) -> str:
    """The frames as base64 of a small file."""
    buffer = io.BytesIO()
    encode_into(buffer, ((at / SHOWN_FPS, frame) for at, frame in enumerate(frames)), Fraction(SHOWN_FPS))
    return base64.b64encode(buffer.getvalue()).decode()
