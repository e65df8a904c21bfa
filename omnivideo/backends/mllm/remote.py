"""The planner's MLLM over HTTP, for a process without torch. vLLM's server and ours speak the same protocol."""

import json
import math
import time
from collections.abc import Iterator

import httpx
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.propagate import inject
from pydantic import BaseModel, ValidationError

from omnivideo.backends.mllm.protocol import (
    AgreementResponse,
    MediaPayload,
    MLLMPayload,
    RefusalResponse,
    TokensResponse,
    VisualTokensRequest,
    WriteRequest,
)
from omnivideo.contracts import Artifact, Medium, MLLMRequest, Route
from omnivideo.errors import InvalidInput, ModelUnavailable
from omnivideo.network import CERTIFICATE_ADVICE, create_tls_context, find_certificate_problem, find_proxy
from omnivideo.ports import ObjectStore

TRACER = trace.get_tracer("omnivideo.mllm")
MAX_ATTEMPTS = 4  # with pauses of 0.5, 1 and 2 s
HANGING_MESSAGE = "the language model does not answer; try again in a moment"
UNAVAILABLE_MESSAGE = "the language model is starting or unavailable; try again in a moment"


class RemoteMLLM:
    """The MLLM at an address. `store` holds the artifacts that requests refer to and receives the visual tokens.

    Every call gives the same answer for the same request, so all of them can be retried. They raise ModelUnavailable
    if the server does not answer, and InvalidInput if it refuses the request. A server that sends nothing for
    `timeout_seconds` hangs: the call is not retried here, because its caller must tell a person. `key` is the one that
    the server requires of its clients.
    """

    max_tokens = 1024  # limit of an answer

    def __init__(self, address: str, store: ObjectStore, timeout_seconds: float = 25.0, key: str = ""):
        self.store = store
        timeout = httpx.Timeout(timeout_seconds, connect=min(2.0, timeout_seconds))
        self.http = httpx.Client(
            base_url=address,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=timeout,
            trust_env=False,
            verify=create_tls_context(),
            proxy=find_proxy(address),
        )

    # ------------------------------------------------------------ the planner's port

    def route(self, request: MLLMRequest) -> Route:
        return Route.parse_stored(self.post_request("/v1/route", self.build_payload(request)))

    def score_agreement(self, request: MLLMRequest) -> float:
        response = self.post_request("/v1/agreement", self.build_payload(request))
        return AgreementResponse.parse_stored(response).agreement

    def predict_visual_tokens(self, request: MLLMRequest, medium: Medium) -> str:
        body = VisualTokensRequest(payload=self.build_payload(request), medium=medium)
        return self.store.put(self.post_request("/v1/visual_tokens", body), "safetensors")

    def stream_text(self, request: MLLMRequest) -> Iterator[str]:
        """Yield the answer in pieces. After a failure, the answer continues where it broke off."""
        options = request.sampling.model_dump() | {"max_tokens": request.sampling.max_tokens or self.max_tokens}
        # Defaults are left out, so that a server of an earlier version accepts the request.
        body = WriteRequest(payload=self.build_payload(request), **options).model_dump_json(exclude_defaults=True)
        emitted_chars = 0
        for _ in iterate_attempts():
            received_chars = 0  # counted in characters, because a retry may split the answer differently
            try:
                for piece in self.stream_pieces(body):
                    if piece is None:
                        return
                    received_chars += len(piece)
                    if received_chars > emitted_chars:
                        yield piece[len(piece) - (received_chars - emitted_chars) :]
                        emitted_chars = received_chars
            except httpx.ReadTimeout:
                raise ModelUnavailable(HANGING_MESSAGE) from None
            except httpx.HTTPError as error:
                raise_for_certificate(error)
        raise ModelUnavailable(UNAVAILABLE_MESSAGE)

    def count_tokens(self, text: str) -> int:
        """Return the number of the text's tokens, or an estimate of four bytes each if the server does not say."""
        try:
            response = self.http.post("/v1/tokens", json={"text": text}, timeout=2.0)
            return TokensResponse.parse_stored(response.raise_for_status().content).count
        except (httpx.HTTPError, ValidationError):
            return math.ceil(len(text.encode()) / 4)

    # ------------------------------------------------------------ requests

    def build_payload(self, request: MLLMRequest) -> MLLMPayload:
        media = tuple(map(self.build_media_payload, request.artifacts))
        return MLLMPayload(text=request.text, media=media, system=request.system, json_schema=request.json_schema)

    def build_media_payload(self, artifact: Artifact) -> MediaPayload:
        data, suffix = self.store.get(artifact.key), artifact.key.rpartition(".")[2]
        return MediaPayload(data=data, suffix=suffix, medium=artifact.medium, fps=artifact.fps)

    def post_request(self, path: str, body: BaseModel) -> bytes:
        content = body.model_dump_json()
        for attempt in iterate_attempts():
            try:
                with TRACER.start_as_current_span(f"ask the language model {path}", attributes={"attempt": attempt}):
                    response = self.http.post(path, content=content, headers=build_headers())
                raise_for_refusal(response)
                return response.content
            except httpx.ReadTimeout:
                raise ModelUnavailable(HANGING_MESSAGE) from None
            except httpx.HTTPError as error:
                raise_for_certificate(error)
        raise ModelUnavailable(UNAVAILABLE_MESSAGE)

    def stream_pieces(self, body: str) -> Iterator[str | None]:
        """Yield the pieces of an answer as the server sends them, then None if the answer is complete."""
        # The span is not the current one: between two pieces, the caller's is.
        span = TRACER.start_span("ask the language model /v1/write")
        headers = build_headers(trace.set_span_in_context(span))
        try:
            with self.http.stream("POST", "/v1/write", content=body, headers=headers) as response:
                if response.is_error:
                    response.read()
                    raise_for_refusal(response)
                for line in response.iter_lines():
                    yield json.loads(line)
        finally:
            span.end()

    # ------------------------------------------------------------ the server's state

    def is_ready(self) -> bool:
        """Return whether the server answers now."""
        return self.describe_state() == "ready"

    def describe_state(self) -> str:
        """Return "ready", "starting", or why the server cannot be used however long one waits."""
        try:
            response = self.http.get("/health", timeout=2.0)
        except httpx.HTTPError as error:
            problem = find_certificate_problem(error)
            return f"its certificate is not trusted ({problem}); {CERTIFICATE_ADVICE}" if problem else "starting"
        return "ready" if response.is_success else "starting"

    def fetch_metrics(self) -> str:
        """Return the server's Prometheus metrics, or an empty text if it has none or does not answer."""
        return self.fetch_text("/metrics") or ""

    def fetch_text(self, path: str) -> str | None:
        try:
            response = self.http.get(path, timeout=2.0)
        except httpx.HTTPError:
            return None
        return response.text if response.is_success else None

    def close(self) -> None:
        self.http.close()


def build_headers(context: Context | None = None) -> dict[str, str]:
    """Return the headers of a request, with which its server continues the trace."""
    headers = {"Content-Type": "application/json"}
    inject(headers, context)
    return headers


def raise_for_certificate(error: httpx.HTTPError) -> None:
    """Raise ModelUnavailable if the server's certificate was refused, which no retry changes."""
    if problem := find_certificate_problem(error):
        message = f"the certificate of the language model's server is not trusted ({problem}); {CERTIFICATE_ADVICE}"
        raise ModelUnavailable(message) from None


def iterate_attempts() -> Iterator[int]:
    """Yield the numbers of the attempts, with a pause between two of them."""
    for attempt in range(MAX_ATTEMPTS):
        if attempt:
            time.sleep(0.25 * 2**attempt)
        yield attempt


def raise_for_refusal(response: httpx.Response) -> None:
    """Raise InvalidInput if the server refuses the request, and HTTPStatusError if a retry may succeed."""
    if not response.is_client_error:
        response.raise_for_status()
        return
    if response.status_code == httpx.codes.UNAUTHORIZED:
        raise ModelUnavailable(
            "the language model's server refuses the key; give both processes the same OMNIVIDEO_MLLM_KEY"
        )
    try:
        refusal = RefusalResponse.parse_stored(response.content)
    except ValidationError:
        text = f"the language model's server does not know our protocol (HTTP {response.status_code})"
        raise ModelUnavailable(f"{text}; start it with `omnivideo mllm serve`") from None
    raise InvalidInput(refusal.field, refusal.message)
