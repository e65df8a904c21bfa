"""The planner's MLLM over HTTP, from a process without torch: of vLLM's server or of ours, which speak the same."""

import json
import time
from collections.abc import Iterator

import httpx
from pydantic import BaseModel, ValidationError

from omnivideo.backends.mllm.protocol import (
    AgreementResponse,
    MediaPayload,
    MLLMPayload,
    RefusalResponse,
    VisualTokensRequest,
    WriteRequest,
)
from omnivideo.contracts import Artifact, Medium, MLLMRequest, Route
from omnivideo.errors import InvalidInput, ModelUnavailable
from omnivideo.ports import ObjectStore

MAX_ATTEMPTS = 4  # of a call that is safe to repeat; pauses of 0.5, 1 and 2 s
UNAVAILABLE_MESSAGE = "the language model is starting or away; try again in a moment"


class RemoteMLLM:
    """`store` holds the artifacts that are shown, and takes the visual tokens.

    Every call gives the same answer for the same ask, so all are safe to repeat.  Raises ModelUnavailable where the
    server
    does not answer, and InvalidInput for what it refuses.
    """

    max_tokens = 1024  # tokens of an answer

    def __init__(self, address: str, store: ObjectStore):
        self.store = store
        self.http = httpx.Client(base_url=address, timeout=httpx.Timeout(120.0, connect=5.0), trust_env=False)

    def build_media_payload(self, artifact: Artifact) -> MediaPayload:
        data, suffix = self.store.get(artifact.key), artifact.key.rpartition(".")[2]
        return MediaPayload(data=data, suffix=suffix, medium=artifact.medium, fps=artifact.fps)

    def build_payload(self, ask: MLLMRequest) -> MLLMPayload:
        return MLLMPayload(text=ask.text, media=tuple(map(self.build_media_payload, ask.artifacts)), system=ask.system)

    def route(self, request: MLLMRequest) -> Route:
        return Route.model_validate_json(self.post_request("/v1/route", self.build_payload(request)))

    def score_agreement(self, request: MLLMRequest) -> float:
        return AgreementResponse.model_validate_json(
            self.post_request("/v1/agreement", self.build_payload(request))
        ).agreement

    def predict_visual_tokens(self, request: MLLMRequest, medium: Medium) -> str:
        tokens = self.post_request(
            "/v1/visual_tokens", VisualTokensRequest(payload=self.build_payload(request), medium=medium)
        )
        return self.store.put(tokens, "safetensors")

    def stream_text(self, request: MLLMRequest) -> Iterator[str]:
        """What was said before the server went away is not said again."""
        body, emitted_chars = (
            WriteRequest(payload=self.build_payload(request), max_tokens=self.max_tokens).model_dump_json(),
            0,
        )
        for attempt in range(MAX_ATTEMPTS):
            received_chars = 0  # characters: the next server may cut its pieces elsewhere
            try:
                for piece in self.stream_pieces(body):
                    if piece is None:
                        return
                    received_chars += len(piece)
                    if received_chars > emitted_chars:
                        yield piece[len(piece) - (received_chars - emitted_chars) :]
                        emitted_chars = received_chars
            except httpx.HTTPError:
                pass
            time.sleep(0.5 * 2**attempt)
        raise ModelUnavailable(UNAVAILABLE_MESSAGE)

    def stream_pieces(self, body: str) -> Iterator[str | None]:
        headers = {"Content-Type": "application/json"}
        with self.http.stream("POST", "/v1/write", content=body, headers=headers) as response:
            if response.is_error:
                response.read()
                raise_for_refusal(response)
            for line in response.iter_lines():
                yield json.loads(line)

    def post_request(self, path: str, body: BaseModel) -> bytes:
        content, headers = body.model_dump_json(), {"Content-Type": "application/json"}
        for attempt in range(MAX_ATTEMPTS):
            try:
                response = self.http.post(path, content=content, headers=headers)
                raise_for_refusal(response)
                return response.content
            except httpx.HTTPError:
                time.sleep(0.5 * 2**attempt)
        raise ModelUnavailable(UNAVAILABLE_MESSAGE)

    def is_ready(self) -> bool:
        """Whether the server answers now."""
        return self.fetch_text("/health") is not None

    def fetch_metrics(self) -> str:
        """What the server tells Prometheus; empty where it is away, or tells nothing."""
        return self.fetch_text("/metrics") or ""

    def fetch_text(self, path: str) -> str | None:
        try:
            response = self.http.get(path, timeout=2.0)
        except httpx.HTTPError:
            return None
        return response.text if response.is_success else None

    def close(self) -> None:
        self.http.close()


def raise_for_refusal(response: httpx.Response) -> None:
    """Raises InvalidInput for what the server refuses, HTTPStatusError for what it fails at (try again)."""
    if not response.is_client_error:
        response.raise_for_status()
        return
    try:
        refusal = RefusalResponse.model_validate_json(response.content)
    except ValidationError:
        code = response.status_code
        raise ModelUnavailable(
            f"the language model's server does not know our requests (HTTP {code}): is it ours?"
        ) from None
    raise InvalidInput(refusal.field, refusal.message)
