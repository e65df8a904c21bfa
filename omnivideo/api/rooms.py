"""What the routes stand on, and who is asking.  The parts are typed where they are made (wiring.py): the API knows
their names only, so that it imports no room behind it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, cast

from anyio.to_thread import run_sync
from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from omnivideo.api.errors import WireError
from omnivideo.ports import Keeper
from omnivideo.settings import Service

BEARER = HTTPBearer(auto_error=False, description="An API key")


@dataclass
class Rooms:
    settings: Service
    store: Keeper
    jobs: Any  # storage.jobs.Jobs
    keys: Any  # storage.keys.Keys
    records: Any  # storage.records.Records: files, batches, hooks, and what was answered to a repeated request
    turns: Any  # storage.turns.Turns
    conversations: Any  # conversations.Conversations
    taken: Callable[..., Any]  # a user's bytes as an artifact, decoded in a limited process
    fetched: Callable[[str], bytes]  # a user's URL, from allowed hosts
    tell: Callable[[], None]  # there is work
    pictured: Callable[[Any, str], tuple[bytes, str]] | None = None  # a clip's thumbnail or spritesheet, and its type
    model: Any = None  # backends.mllm.remote.RemoteMLLM; None where the language model is in this process
    reachable: Callable[[str], None] | None = None  # raises InvalidInput for a URL that no webhook may have
    runner: Any = None  # api.running.Runner
    requests: Any = None  # api.watching.Requests, of the application


async def rooms_of(request: Request) -> Rooms:
    return cast(Rooms, request.app.state.rooms)


async def owner_of(
    request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)] = None
) -> str:
    """The key's id; "local" where the service asks for none."""
    keys = request.app.state.rooms.keys
    if not keys.asked_for:
        return "local"
    owner = await run_sync(keys.owner, given.credentials) if given else None
    if owner is None:
        wrong = WireError(401, "the API key is missing, wrong or revoked", None, "invalid_api_key")
        wrong.headers["WWW-Authenticate"] = "Bearer"
        raise wrong
    request.state.owner = owner
    return cast(str, owner)


Room = Annotated[Rooms, Depends(rooms_of)]
Owner = Annotated[str, Depends(owner_of)]
