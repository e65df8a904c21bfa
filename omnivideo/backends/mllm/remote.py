"""The planner's MLLM over HTTP, from a process without torch."""

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx

from omnivideo.contracts import Ask, Medium, Routed
from omnivideo.errors import ModelAway

TRIES = 4  # of a call that is safe to repeat; pauses of 0.5, 1 and 2 s
AWAY = "the language model is starting or away; try again in a moment"


class RemoteMLLM:
    """Every call gives the same answer for the same ask, so all are safe to repeat.  Raises ModelAway."""

    def __init__(self, address: str):
        self.http = httpx.Client(base_url=address, timeout=httpx.Timeout(120.0, connect=5.0), trust_env=False)

    def route(self, ask: Ask) -> Routed:
        return Routed(**self.call("/route", ask.model_dump()))

    def write(self, ask: Ask) -> Iterator[str]:
        """What was said before the server went away is not said again."""
        said = 0
        for attempt in range(TRIES):
            try:
                for at, piece in enumerate(self.pieces(ask)):
                    if piece is None:
                        return
                    if at >= said:
                        said += 1
                        yield piece
            except httpx.HTTPError:
                pass
            time.sleep(0.5 * 2**attempt)
        raise ModelAway(AWAY)

    def pieces(self, ask: Ask) -> Iterator[str | None]:
        with self.http.stream("POST", "/write", json=ask.model_dump()) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                yield json.loads(line)

    def agreement(self, ask: Ask) -> float:
        return float(self.call("/agreement", ask.model_dump())["agreement"])

    def visual_tokens(self, ask: Ask, medium: Medium) -> str:
        return str(self.call("/visual_tokens", {"ask": ask.model_dump(), "medium": medium})["key"])

    def call(self, path: str, body: dict[str, Any]) -> Any:
        for attempt in range(TRIES):
            try:
                answer = self.http.post(path, json=body)
                if answer.status_code < 500:
                    return answer.raise_for_status().json()
            except httpx.TransportError:
                pass
            time.sleep(0.5 * 2**attempt)
        raise ModelAway(AWAY)

    def close(self) -> None:
        self.http.close()
