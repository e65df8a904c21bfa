"""The planner's MLLM over HTTP, from a process without torch: of vLLM's server or of ours, which speak the same."""

import json
import time
from collections.abc import Iterator

import httpx
from pydantic import BaseModel, ValidationError

from omnivideo.backends.mllm.wire import Agreement, Asked, AskedForTokens, AskedToWrite, Refused, Shown
from omnivideo.contracts import Artifact, Ask, Medium, Routed
from omnivideo.errors import InvalidInput, ModelAway
from omnivideo.ports import ObjectStore

TRIES = 4  # of a call that is safe to repeat; pauses of 0.5, 1 and 2 s
AWAY = "the language model is starting or away; try again in a moment"


class RemoteMLLM:
    """`store` holds the artifacts that are shown, and takes the visual tokens.

    Every call gives the same answer for the same ask, so all are safe to repeat.  Raises ModelAway where the server
    does not answer, and InvalidInput for what it refuses.
    """

    most = 1024  # tokens of an answer

    def __init__(self, address: str, store: ObjectStore):
        self.store = store
        self.http = httpx.Client(base_url=address, timeout=httpx.Timeout(120.0, connect=5.0), trust_env=False)

    def shown(self, artifact: Artifact) -> Shown:
        data, suffix = self.store.get(artifact.key), artifact.key.rpartition(".")[2]
        return Shown(data=data, suffix=suffix, medium=artifact.medium, fps=artifact.fps)

    def asked(self, ask: Ask) -> Asked:
        return Asked(text=ask.text, shown=tuple(map(self.shown, ask.shown)), system=ask.system)

    def route(self, ask: Ask) -> Routed:
        return Routed.model_validate_json(self.call("/v1/route", self.asked(ask)))

    def agreement(self, ask: Ask) -> float:
        return Agreement.model_validate_json(self.call("/v1/agreement", self.asked(ask))).agreement

    def visual_tokens(self, ask: Ask, medium: Medium) -> str:
        tokens = self.call("/v1/visual_tokens", AskedForTokens(asked=self.asked(ask), medium=medium))
        return self.store.put(tokens, "safetensors")

    def write(self, ask: Ask) -> Iterator[str]:
        """What was said before the server went away is not said again."""
        body, said = AskedToWrite(asked=self.asked(ask), most=self.most).model_dump_json(), 0
        for attempt in range(TRIES):
            at = 0  # characters: the next server may cut its pieces elsewhere
            try:
                for piece in self.pieces(body):
                    if piece is None:
                        return
                    at += len(piece)
                    if at > said:
                        yield piece[len(piece) - (at - said) :]
                        said = at
            except httpx.HTTPError:
                pass
            time.sleep(0.5 * 2**attempt)
        raise ModelAway(AWAY)

    def pieces(self, body: str) -> Iterator[str | None]:
        headers = {"Content-Type": "application/json"}
        with self.http.stream("POST", "/v1/write", content=body, headers=headers) as answer:
            if answer.is_error:
                answer.read()
                refuse(answer)
            for line in answer.iter_lines():
                yield json.loads(line)

    def call(self, path: str, body: BaseModel) -> bytes:
        content, headers = body.model_dump_json(), {"Content-Type": "application/json"}
        for attempt in range(TRIES):
            try:
                answer = self.http.post(path, content=content, headers=headers)
                refuse(answer)
                return answer.content
            except httpx.HTTPError:
                time.sleep(0.5 * 2**attempt)
        raise ModelAway(AWAY)

    def ready(self) -> bool:
        """Whether the server answers now."""
        return self.looked_at("/health") is not None

    def metrics(self) -> str:
        """What the server tells Prometheus; empty where it is away, or tells nothing."""
        return self.looked_at("/metrics") or ""

    def looked_at(self, path: str) -> str | None:
        try:
            answer = self.http.get(path, timeout=2.0)
        except httpx.HTTPError:
            return None
        return answer.text if answer.is_success else None

    def close(self) -> None:
        self.http.close()


def refuse(answer: httpx.Response) -> None:
    """Raises InvalidInput for what the server refuses, HTTPStatusError for what it fails at (try again)."""
    if not answer.is_client_error:
        answer.raise_for_status()
        return
    try:
        refused = Refused.model_validate_json(answer.content)
    except ValidationError:
        code = answer.status_code
        raise ModelAway(f"the language model's server does not know our requests (HTTP {code}): is it ours?") from None
    raise InvalidInput(refused.field, refused.message)
