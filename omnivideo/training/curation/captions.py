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

from omnivideo.errors import InvalidInput, ModelUnavailable, UnreadableMedia
from omnivideo.training.curation.reading import encode_into, import_optional

# uint8 [F, H, W, 3] at SHOWN_FPS; UnreadableMedia leaves this clip without, any other exception ends the run.
Captioner = Callable[[np.ndarray], str]

CAPTION_PROMPT = (
    "Describe this video in one paragraph for somebody who is to draw it: who or what is in it and what it looks "
    "like, what happens, where, how the camera moves, the light and the style. Name only what can be seen."
)
CAPTION_FPS = 2.0
MAX_ATTEMPTS = 4  # pauses of 0.5, 1, 2 s
FATAL_STATUS_CODES = (401, 403, 404, 405)  # what is wrong with the address or the key, not with a clip
RETRYABLE_STATUS_CODES = (408, 425, 429)
MAX_CAPTION_TOKENS = 256


class RemoteCaptioner:
    """The port, wired to a server at `address`."""

    def __init__(self, address: str, prompt: str = CAPTION_PROMPT):
        httpx = import_optional("httpx")
        self.prompt = prompt
        self.http_error = httpx.HTTPError
        self.client = httpx.Client(base_url=address, timeout=httpx.Timeout(300.0, connect=5.0), trust_env=False)

    def __call__(self, frames: np.ndarray) -> str:
        media_payload = {"data": encode_base64_mp4(frames), "suffix": "mp4", "medium": "video", "fps": CAPTION_FPS}
        body = {"payload": {"text": self.prompt, "media": [media_payload]}, "max_tokens": MAX_CAPTION_TOKENS}
        for attempt in range(MAX_ATTEMPTS):
            try:
                return self.request_caption(body)
            except self.http_error:
                time.sleep(0.5 * 2**attempt)
        raise ModelUnavailable(
            "the language model at --captions does not answer; run again to go on where this stopped"
        )

    def close(self) -> None:
        self.client.close()

    def request_caption(self, body: dict) -> str:
        response = self.client.post("/v1/write", json=body)
        if response.status_code in FATAL_STATUS_CODES:
            what = f"{response.status_code} {response.reason_phrase}"
            raise InvalidInput("captions", f"the server answers {what}; allowed: omnivideo's language model server")
        if response.is_client_error and response.status_code not in RETRYABLE_STATUS_CODES:
            raise UnreadableMedia("captions", f"the server refuses the clip: {' '.join(response.text.split())[:200]}")
        response.raise_for_status()
        pieces = [json.loads(line) for line in response.text.splitlines() if line]
        if not pieces or pieces[-1] is not None:  # the server went away in the middle
            raise self.http_error("cut short")
        return "".join(pieces[:-1]).strip()


def encode_base64_mp4(frames: np.ndarray) -> str:
    """The frames as base64 of a small file."""
    buffer = io.BytesIO()
    encode_into(buffer, ((index / CAPTION_FPS, frame) for index, frame in enumerate(frames)), Fraction(CAPTION_FPS))
    return base64.b64encode(buffer.getvalue()).decode()
