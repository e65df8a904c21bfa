"""Caption clips with omnivideo's MLLM server (`POST /v1/write`, which returns one JSON string per line, then null).

CAPTION_PROMPT is the prompt; any callable from frames to a string can replace this captioner.
"""

import base64
import io
import json
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from omnivideo.errors import InvalidInput, ModelUnavailable, UnreadableMedia
from omnivideo.network import create_tls_context, find_proxy
from omnivideo.training.curation.reading import encode_into, import_optional

# Takes uint8 [F, H, W, 3] at CAPTION_FPS. UnreadableMedia skips the caption; any other exception ends the run.
Captioner = Callable[[np.ndarray], str]

CAPTION_PROMPT = (
    "Describe this video in one paragraph for somebody who is to draw it: who or what is in it and what it looks "
    "like, what happens, where, how the camera moves, the light and the style. Name only what can be seen."
)
CAPTION_FPS = 2.0
MAX_ATTEMPTS = 4  # pauses of 0.5, 1, 2 s
FATAL_STATUS_CODES = (401, 403, 404, 405)  # the address or the key is wrong, not the clip
RETRYABLE_STATUS_CODES = (408, 425, 429)
MAX_CAPTION_TOKENS = 256


class RemoteCaptioner:
    """A Captioner that sends clips to the server at `address`."""

    def __init__(self, address: str, prompt: str = CAPTION_PROMPT):
        httpx = import_optional("httpx")
        self.prompt = prompt
        self.http_error = httpx.HTTPError
        timeout, proxy = httpx.Timeout(300.0, connect=5.0), find_proxy(address)
        self.client = httpx.Client(
            base_url=address, timeout=timeout, trust_env=False, verify=create_tls_context(), proxy=proxy
        )

    def __call__(self, frames: np.ndarray) -> str:
        """Return the caption of a clip; retry while the server is busy."""
        media_payload = {"data": encode_base64_mp4(frames), "suffix": "mp4", "medium": "video", "fps": CAPTION_FPS}
        body = {"payload": {"text": self.prompt, "media": [media_payload]}, "max_tokens": MAX_CAPTION_TOKENS}
        for attempt in range(MAX_ATTEMPTS):
            try:
                return self.request_caption(body)
            except self.http_error:
                time.sleep(0.5 * 2**attempt)
        raise ModelUnavailable("the server at --captions does not respond; run the command again to continue")

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def request_caption(self, body: dict[str, Any]) -> str:
        """Send one request and return the caption."""
        response = self.client.post("/v1/write", json=body)
        if response.status_code in FATAL_STATUS_CODES:
            what = f"{response.status_code} {response.reason_phrase}"
            raise InvalidInput(
                "captions", f"the server responds with {what}; allowed: omnivideo's language model server"
            )
        if response.is_client_error and response.status_code not in RETRYABLE_STATUS_CODES:
            raise UnreadableMedia("captions", f"the server refuses the clip: {' '.join(response.text.split())[:200]}")
        response.raise_for_status()
        pieces = [json.loads(line) for line in response.text.splitlines() if line]
        if not pieces or pieces[-1] is not None:  # the connection broke off midway
            raise self.http_error("cut short")
        return "".join(pieces[:-1]).strip()


def encode_base64_mp4(frames: np.ndarray) -> str:
    """Return the frames as the base64 of an mp4."""
    buffer = io.BytesIO()
    encode_into(buffer, ((index / CAPTION_FPS, frame) for index, frame in enumerate(frames)), Fraction(CAPTION_FPS))
    return base64.b64encode(buffer.getvalue()).decode()
