"""What the routes stand on, and who is asking.  The parts are typed where they are made (wiring.py): the API knows
their names only, so that it imports no room behind it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, cast

from anyio.to_thread import run_sync
from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from omnivideo.api.errors import APIError
from omnivideo.ports import SweepableObjectStore
from omnivideo.settings import ServiceSettings

BEARER = HTTPBearer(auto_error=False, description="An API key")


@dataclass
class ServiceContext:
    settings: ServiceSettings
    store: SweepableObjectStore
    jobs: Any  # storage.database.jobs.JobRepository
    api_keys: Any  # storage.database.keys.APIKeyRepository
    files: Any  # storage.database.files.FileRepository
    batches: Any  # storage.database.batches.BatchRepository
    webhooks: Any  # storage.database.webhooks.WebhookRepository
    turns: Any  # storage.database.turns.TurnRepository
    conversations: Any  # agent.conversations.Conversations
    ingest_media: Callable[..., Any]  # a user's bytes as an artifact, decoded in a limited process
    fetch_media: Callable[[str], bytes]  # a user's URL, from allowed hosts
    notify_workers: Callable[[], None]  # there is work
    render_thumbnail: Callable[[Any, str], tuple[bytes, str]] | None = (
        None  # a clip's thumbnail or spritesheet, and its type
    )
    remote_mllm: Any = None  # backends.mllm.remote.RemoteMLLM; None where the language model is in this process
    check_webhook_url: Callable[[str], None] | None = None  # raises InvalidInput for a URL that no webhook may have
    turn_runner: Any = None  # api.turn_runner.TurnRunner
    request_metrics: Any = None  # api.routes.operations.RequestMetrics, of the application


async def get_service_context(request: Request) -> ServiceContext:
    return cast(ServiceContext, request.app.state.context)


async def authenticate_owner(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)] = None
) -> str:
    """The key's id; "local" where the service asks for none."""
    api_keys = request.app.state.context.api_keys
    if not api_keys.is_required:
        return "local"
    owner = await run_sync(api_keys.find_owner, credentials.credentials) if credentials else None
    if owner is None:
        unauthorized = APIError(401, "the API key is missing, wrong or revoked", None, "invalid_api_key")
        unauthorized.headers["WWW-Authenticate"] = "Bearer"
        raise unauthorized
    request.state.owner = owner
    return cast(str, owner)


ContextDep = Annotated[ServiceContext, Depends(get_service_context)]
OwnerDep = Annotated[str, Depends(authenticate_owner)]
