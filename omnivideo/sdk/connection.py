"""Requests to a service: retries, idempotency keys, and its refusals as errors of omnivideo/errors.py."""

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import anyio
import httpx

from omnivideo.errors import (
    ArtifactNotFound,
    InvalidInput,
    JobFailed,
    ModelUnavailable,
    OmniVideoError,
    ServiceBusy,
    StoreError,
)
from omnivideo.network import CERTIFICATE_ADVICE, create_tls_context, find_certificate_problem, find_proxy

MAX_ATTEMPTS = 5  # per request; a repeated POST carries the same idempotency key, so it creates nothing twice
CANCEL_TIMEOUT_SECONDS = 5.0  # how long a cancelled call waits until the service knows
MAX_RETRY_AFTER_SECONDS = 60.0  # a request that may be repeated only later than that is not repeated
TEMPORARY_STATUSES = (429, 502, 503, 504)
UNREACHABLE_MESSAGE = "service: it cannot be reached; is it running, and is the address right?"
# Our names of options -> the names in requests.
REQUEST_FIELD_NAMES = {"frames": "num_frames", "steps": "num_inference_steps"}
OPTION_NAMES = {name: option for option, name in REQUEST_FIELD_NAMES.items()}


class ServiceConnection:
    """The connections to the service at `address`. `timeout` is in seconds.

    Raises InvalidInput for an address that is none, and if the environment names a proxy that cannot be used.
    """

    def __init__(self, address: str, api_key: str | None, timeout: float):
        if not address.startswith(("http://", "https://")):
            raise InvalidInput("address", f"{address!r} is not one; give http://host:port or https://host")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.http = httpx.AsyncClient(
            base_url=address,
            headers=headers,
            timeout=timeout,
            trust_env=False,
            verify=create_tls_context(),
            proxy=find_proxy(address),
        )

    async def close(self) -> None:
        await self.http.aclose()

    async def send_request(
        self, method: str, path: str, field_names: dict[str, str] | None = None, **request_options: Any
    ) -> httpx.Response:
        """Send a request, and retry while the service is unavailable or busy.

        `field_names` maps the request's names of fields to those of the caller's arguments. Raises OmniVideoError.
        """
        headers = {"Idempotency-Key": uuid.uuid4().hex} if method == "POST" else {}
        error: OmniVideoError = StoreError(UNREACHABLE_MESSAGE)
        for attempt in range(MAX_ATTEMPTS):
            pause = min(8.0, 0.25 * 2**attempt)
            try:
                response = await self.http.request(method, path, headers=headers, **request_options)
                if response.status_code < 400:
                    return response
                error = error_from_response(response, field_names or {})
                if response.status_code not in TEMPORARY_STATUSES and "Retry-After" not in response.headers:
                    raise error
                pause = float(response.headers.get("Retry-After", pause))
                if pause > MAX_RETRY_AFTER_SECONDS:  # such as a share of the day that is used up
                    raise error
            except httpx.TransportError as transport_error:
                raise_for_certificate(transport_error)
            if attempt + 1 < MAX_ATTEMPTS:
                await asyncio.sleep(min(pause, 30.0))
        raise error

    async def fetch_json(self, method: str, path: str, **request_options: Any) -> Any:
        """Return the JSON of an answer."""
        return (await self.send_request(method, path, **request_options)).json()

    async def stream_json_lines(
        self, path: str, form: dict[str, str], files: dict[str, tuple[str, bytes]]
    ) -> AsyncGenerator[Any]:
        """Yield the JSON lines of an answer to a form; leaving the loop ends the request. Raises OmniVideoError."""
        try:
            async with self.http.stream("POST", path, data=form, files=files) as response:
                if response.status_code >= 400:
                    await response.aread()
                    raise error_from_response(response, {})
                async for line in response.aiter_lines():
                    yield json.loads(line)
        except httpx.TransportError as transport_error:
            raise_for_certificate(transport_error)
            raise StoreError(UNREACHABLE_MESSAGE) from None


@contextmanager
def cancel_on_service() -> Iterator[None]:
    """Let a cancelled call tell the service, for a few seconds; what then fails is nobody's concern any more."""
    with anyio.move_on_after(CANCEL_TIMEOUT_SECONDS, shield=True), suppress(OmniVideoError):
        yield


def raise_for_certificate(error: httpx.TransportError) -> None:
    """Raise StoreError if the service's certificate was refused, which no retry changes."""
    if problem := find_certificate_problem(error):
        raise StoreError(f"service: its certificate is not trusted ({problem}); {CERTIFICATE_ADVICE}") from None


def to_request_fields(options: dict[str, Any]) -> dict[str, Any]:
    """Return options under the names that requests use, without those that are None."""
    return {REQUEST_FIELD_NAMES.get(name, name): value for name, value in options.items() if value is not None}


def error_from_response(response: httpx.Response, field_names: dict[str, str]) -> OmniVideoError:
    """Return the error in omnivideo/errors.py that corresponds to an error response."""
    try:
        error = response.json()["error"]
        message = str(error["message"])
    except (ValueError, KeyError, TypeError):
        return StoreError(f"service: it answered {response.status_code} with an unknown body; is it omnivideo?")
    match response.status_code:
        case 404:
            return ArtifactNotFound(message)
        case 429:
            return ServiceBusy(message, float(response.headers.get("Retry-After", 1)))
        case 503:
            return ModelUnavailable(message)
    return error_from_body(error, OPTION_NAMES | field_names)


def error_from_body(error: dict[str, Any], field_names: dict[str, str]) -> OmniVideoError:
    """Return the error that a body describes, which names a field or has a code."""
    message, param = str(error["message"]), error.get("param")
    if param:
        return InvalidInput(field_names.get(param, param), message.removeprefix(f"{param}: "))
    return JobFailed(error.get("code") or "failed", message)
