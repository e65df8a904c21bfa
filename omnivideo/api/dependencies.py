"""The dependencies of routes: the parts of the service, a request's owner, and ids for what the request creates.

What a POST with an Idempotency-Key has created is found again by every later request of its owner with that key:
`IdempotentRequest` is the only implementation, for all routes.
"""

import hashlib
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, BinaryIO, Protocol, TypeVar, cast

from anyio.to_thread import run_sync
from fastapi import Depends, Header, Path, Query, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel

from omnivideo.agent.conversations import Conversations
from omnivideo.api.access import Access, AccessControl
from omnivideo.api.errors import build_key_in_use_error, build_key_reused_error
from omnivideo.api.request_digest import digest_request
from omnivideo.api.stores import (
    APIKeyStore,
    BatchStore,
    IdempotencyStore,
    UsageStore,
    UserFileStore,
    WebhookStore,
    WorkerStore,
)
from omnivideo.api.turn_process import TurnProcess
from omnivideo.api.turn_runner import TurnRunner
from omnivideo.contracts import Artifact
from omnivideo.ports import JobStore, SweepableObjectStore, TextLimits, TurnStore
from omnivideo.records import KeyClaim
from omnivideo.settings import ServiceSettings

BEARER = HTTPBearer(auto_error=False, description="An API key")
KEY_LEASE_SECONDS = 60.0  # longer than it takes to check a request and to store what it creates
KEY_WAIT_SECONDS, KEY_POLL_SECONDS = 20.0, 0.05  # how long a request waits for another one with the same key
Resource = TypeVar("Resource")


class IngestMedia(Protocol):
    def __call__(self, owner: str, source: bytes | BinaryIO, created_by: str, name: str = "", /) -> Artifact:
        """Store an owner's image or clip, after decoding it in a process with limits.

        Raises UnreadableMedia if it is neither, and ServiceBusy.
        """
        ...


class MLLMServer(Protocol):
    """The state of the MLLM's own server, for readiness checks and metrics."""

    def is_ready(self) -> bool: ...

    def describe_state(self) -> str:
        """Return "ready", "starting", or why the server cannot be used however long one waits."""
        ...

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
    idempotency_keys: IdempotencyStore
    workers: WorkerStore
    api_keys: APIKeyStore
    access: AccessControl
    usage: UsageStore
    conversations: Conversations
    turn_runner: TurnRunner
    ingest_media: IngestMedia
    fetch_media: Callable[[str, str], bytes]  # of an owner and a URL; raises InvalidInput if it may not be fetched
    notify_workers: Callable[[], None]  # called when a job has been queued
    render_thumbnail: Callable[[str, Artifact, str], tuple[bytes, str]]  # of owner, clip, variant: image, file suffix
    check_webhook_url: Callable[[str], None]  # raises InvalidInput for a URL that may not receive events
    text_limits: TextLimits
    turn_process: TurnProcess | None = None  # which runs the turns; None if `turn_runner` does so in this process
    mllm_server: MLLMServer | None = None  # None if the MLLM runs in this process
    fetch_mllm_metrics: Callable[[], str] | None = None  # of its server, or of the MLLM in this process

    def stop_turns(self) -> None:
        """Give the running turns back to the queue, and answer the requests that wait for turns."""
        if self.turn_process is not None:
            self.turn_process.stop()
        self.turn_runner.stop()


async def get_service_context(request: Request) -> ServiceContext:
    return cast(ServiceContext, request.app.state.context)


async def authenticate_owner(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)] = None
) -> str:
    """Return the request's owner, whom the middleware has found, except for links with a signature.

    Raises APIError (401 or 403), and LimitReached.
    """
    owner: str | None = getattr(request.state, "owner", None)
    if owner is None:
        context = await get_service_context(request)
        access = await admit_request(context, request.headers.get("authorization"), request.method)
        request.state.access, request.state.owner = access, (owner := access.key.id)
    return owner


async def admit_request(context: ServiceContext, authorization: str | None, method: str) -> Access:
    """Return what a request may do. Raises APIError (401 or 403), and LimitReached."""
    if not context.access.needs_database:
        return context.access.admit(authorization, method)
    return await run_sync(context.access.admit, authorization, method)


ContextDep = Annotated[ServiceContext, Depends(get_service_context)]
OwnerDep = Annotated[str, Depends(authenticate_owner)]
ID_PATTERN = r"^[A-Za-z0-9_.-]{1,200}$"
ID_DESCRIPTION = "an id: 1 to 200 letters, digits, dots, dashes or underscores"
ResourceId = Annotated[str, Path(pattern=ID_PATTERN, description=ID_DESCRIPTION)]
AfterCursor = Annotated[str | None, Query(pattern=ID_PATTERN, description=ID_DESCRIPTION)]
IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=255)]


def make_id(prefix: str) -> str:
    """Return a new id, such as `video_...` for the prefix `video_`."""
    return f"{prefix}{uuid.uuid4().hex}"


# ---------------------------------------------------------------- idempotency


class IdempotentRequest:
    """A POST of an owner, with its idempotency key if it has one. Without a key, every request is a new one."""

    def __init__(self, keys: IdempotencyStore, owner: str, key: str | None, path: str):
        self.keys = keys
        self.owner = owner
        self.key_digest = None if key is None else hashlib.sha256(key.encode()).hexdigest()
        self.path = path
        self.request_digest = ""

    def run(
        self,
        payload: BaseModel | None,
        prefix: str,
        find: Callable[[str], Resource | None],
        create: Callable[[str], Resource],
        *,
        resource_id: str | None = None,
        is_waiting: bool = False,
    ) -> Resource:
        """Return what an earlier request with this key has created, or create it under a new id.

        `find` returns None for an id whose resource does not exist, was cancelled or was deleted: it is made anew.
        `resource_id` is the id that the client has chosen. If `is_waiting` is set, the client waits for the result:
        call `leave` afterwards. Requests with one key run one after the other. Raises APIError (422) if the key was
        used for another path or for other fields. If `create` refuses the first request with a key, the key is free.
        """
        if self.key_digest is None:
            return create(resource_id or make_id(prefix))
        self.request_digest = digest_request(self.path, payload)
        claim = self.claim_key(resource_id or make_id(prefix))
        waiting_clients = claim.waiting_clients
        try:
            resource = None if claim.is_new else find(claim.resource_id)
            if resource is None:
                new_id = claim.resource_id if claim.is_new else resource_id or make_id(prefix)
                if not claim.is_new:
                    self.keys.set_key_resource(self.owner, self.key_digest, new_id)
                    waiting_clients = 0
                resource = create(new_id)
        except Exception:
            if claim.is_new:
                self.keys.delete_key(self.owner, self.key_digest)
            else:
                self.keys.release_key(self.owner, self.key_digest)
            raise
        self.keys.release_key(self.owner, self.key_digest, waiting_clients + is_waiting)
        return resource

    def repeat(self, resource_id: str, action: Callable[[str], Resource], payload: BaseModel | None = None) -> Resource:
        """Do what a request may do again, such as a cancellation, unless its key was used for another request."""
        return self.run(payload, "", find=lambda _: None, create=action, resource_id=resource_id)

    def claim_key(self, resource_id: str) -> KeyClaim:
        """Claim the key; wait while another request has claimed it."""
        assert self.key_digest is not None
        deadline = time.monotonic() + KEY_WAIT_SECONDS
        while True:
            claim = self.keys.claim_key(
                self.owner,
                self.key_digest,
                request_digest=self.request_digest,
                resource_id=resource_id,
                lease_seconds=KEY_LEASE_SECONDS,
            )
            if claim is not None and claim.request_digest != self.request_digest:
                raise build_key_reused_error()
            if claim is not None:
                return claim
            if time.monotonic() > deadline:
                raise build_key_in_use_error()
            time.sleep(KEY_POLL_SECONDS)

    def leave(self, resource_id: str, cancel: Callable[[], None] | None = None) -> None:
        """Record that this client no longer waits; cancel what it has waited for if no other client waits."""
        if self.key_digest is None:
            if cancel is not None:
                cancel()
            return
        claim = self.claim_key(resource_id)
        waiting_clients = claim.waiting_clients
        if claim.resource_id == resource_id:
            waiting_clients = max(0, waiting_clients - 1)
            if cancel is not None and not waiting_clients:
                cancel()
        self.keys.release_key(self.owner, self.key_digest, waiting_clients)


async def get_idempotent_request(
    request: Request, context: ContextDep, owner: OwnerDep, idempotency_key: IdempotencyKey = None
) -> IdempotentRequest:
    return IdempotentRequest(context.idempotency_keys, owner, idempotency_key, request.url.path)


IdempotencyDep = Annotated[IdempotentRequest, Depends(get_idempotent_request)]
