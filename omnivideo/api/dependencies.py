"""The dependencies of routes: the parts of the service, a request's owner, and ids for what the request creates."""

import hashlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Protocol, cast

from anyio.to_thread import run_sync
from fastapi import Depends, Header, Path, Query, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from omnivideo.agent.conversations import LOCAL_OWNER, Conversations
from omnivideo.api.errors import APIError
from omnivideo.api.stores import APIKeyStore, BatchStore, UserFileStore, WebhookStore
from omnivideo.api.turn_runner import TurnRunner
from omnivideo.contracts import Artifact
from omnivideo.ports import JobStore, SweepableObjectStore, TurnStore
from omnivideo.settings import ServiceSettings

BEARER = HTTPBearer(auto_error=False, description="An API key")


class IngestMedia(Protocol):
    def __call__(self, data: bytes, created_by: str, name: str = "", /) -> Artifact:
        """Store a user's image or clip, after decoding it in a process with limits.

        Raises UnreadableMedia if it is neither, and ServiceBusy.
        """
        ...


class MLLMServer(Protocol):
    """The state of the MLLM's own server, for readiness checks and metrics."""

    def is_ready(self) -> bool: ...

    def fetch_metrics(self) -> str:
        """Return the server's metrics in Prometheus' text format."""
        ...


@dataclass
class ServiceContext:
    """The parts of one service. `wiring.ServiceWiring` builds it, so the API imports no implementation."""

    settings: ServiceSettings
    store: SweepableObjectStore
    jobs: JobStore
    turns: TurnStore
    files: UserFileStore
    batches: BatchStore
    webhooks: WebhookStore
    api_keys: APIKeyStore
    conversations: Conversations
    turn_runner: TurnRunner
    ingest_media: IngestMedia
    fetch_media: Callable[[str], bytes]  # raises InvalidInput for a URL that may not be fetched
    notify_workers: Callable[[], None]  # called when a job has been queued
    render_thumbnail: Callable[[Artifact, str], tuple[bytes, str]]  # (clip, variant) to the image and its file suffix
    check_webhook_url: Callable[[str], None]  # raises InvalidInput for a URL that may not receive events
    mllm_server: MLLMServer | None = None  # None if the MLLM runs in this process


async def get_service_context(request: Request) -> ServiceContext:
    return cast(ServiceContext, request.app.state.context)


async def authenticate_owner(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)] = None
) -> str:
    """Return the id of the request's API key, or LOCAL_OWNER if the service requires no keys.

    Raises APIError (401) if the key is missing, wrong or revoked.
    """
    api_keys = (await get_service_context(request)).api_keys
    if not api_keys.is_required:
        return LOCAL_OWNER
    owner = await run_sync(api_keys.find_owner, credentials.credentials) if credentials else None
    if owner is None:
        unauthorized = APIError(401, "the API key is missing, wrong or revoked", None, "invalid_api_key")
        unauthorized.headers["WWW-Authenticate"] = "Bearer"
        raise unauthorized
    request.state.owner = owner
    return owner


ContextDep = Annotated[ServiceContext, Depends(get_service_context)]
OwnerDep = Annotated[str, Depends(authenticate_owner)]
ResourceId = Annotated[str, Path(pattern=r"^[A-Za-z0-9_.-]{1,200}$")]
AfterCursor = Annotated[str | None, Query(pattern=r"^[A-Za-z0-9_.-]{1,200}$")]
IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=255)]


def make_id(prefix: str, owner: str, idempotency_key: str | None) -> str:
    """Return a new id, or the id that all requests of this owner with this idempotency key share."""
    if idempotency_key is None:
        return f"{prefix}_{uuid.uuid4().hex}"
    digest = hashlib.sha256(f"{owner}\0{prefix}\0{idempotency_key}".encode())
    return f"{prefix}_{digest.hexdigest()[:32]}"
