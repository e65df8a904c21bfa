"""Webhooks: where to say that a video has come to its end.

The routes are those of the openai client's `webhooks`, and the same under /v1/webhooks.
"""

import base64
import secrets
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from omnivideo.api.errors import REFUSALS, not_found
from omnivideo.api.forms import After, Fields, Id, Text, documented, name_for, validated
from omnivideo.api.rooms import Owner, Room

router = APIRouter(prefix="/v1", tags=["webhooks"], responses=REFUSALS)
MOST = 20  # of one owner
EventType = Literal["video.completed", "video.failed"]
BOTH: list[EventType] = ["video.completed", "video.failed"]


class NewHook(BaseModel):
    """`url` is told of the events by POST, at a public address unless the operator has listed its host."""

    url: Text = Field(min_length=1, max_length=2000)
    name: Text = Field(default="webhook", min_length=1, max_length=100)
    event_types: list[EventType] = Field(default=BOTH, min_length=1, max_length=20)


class Hook(BaseModel):
    """`signing_secret`, and `secret`, which is the same, are told when it is made and never again."""

    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    created_at: int
    name: str
    url: str
    event_types: list[str]
    signing_secret: str | None = None
    secret: str | None = None


class HookList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Hook]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool


class HookDeleted(BaseModel):
    id: str
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    deleted: bool = True


def shown(row: Any, secret: str | None = None) -> Hook:
    return Hook(
        id=row.id, created_at=int(row.made), name=row.name, url=row.url, event_types=row.events,
        signing_secret=secret, secret=secret,
    )  # fmt: skip


@router.post("/webhook_endpoints", response_model_exclude_none=True, openapi_extra=documented(NewHook))
@router.post("/webhooks", response_model_exclude_none=True, openapi_extra=documented(NewHook))
def create(rooms: Room, owner: Owner, fields: Fields) -> Hook:
    asked = validated(NewHook, fields)
    assert rooms.reachable, "the wiring gives a service its way to look at a webhook's URL"
    rooms.reachable(asked.url)
    secret = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
    row = rooms.records.add_hook(
        owner, MOST, id=name_for("whe", owner, None), url=asked.url, secret=secret, name=asked.name,
        events=list(dict.fromkeys(asked.event_types)),
    )  # fmt: skip
    return shown(row, secret)


@router.get("/webhook_endpoints", response_model_exclude_none=True)
@router.get("/webhooks", response_model_exclude_none=True)
def listing(
    rooms: Room, owner: Owner, after: After = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> HookList:  # fmt: skip
    """Your webhooks, the newest first."""
    rows, more = rooms.records.hooks(owner, after, limit)
    data = [shown(row) for row in rows]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return HookList(data=data, first_id=first, last_id=last, has_more=more)


@router.get("/webhook_endpoints/{hook_id}", response_model_exclude_none=True)
@router.get("/webhooks/{hook_id}", response_model_exclude_none=True)
def get(hook_id: Id, rooms: Room, owner: Owner) -> Hook:
    row = rooms.records.hook(hook_id, owner)
    if row is None:
        raise not_found("webhook", hook_id)
    return shown(row)


@router.delete("/webhook_endpoints/{hook_id}")
@router.delete("/webhooks/{hook_id}")
def delete(hook_id: Id, rooms: Room, owner: Owner) -> HookDeleted:
    """What it has not been told by now it will not be."""
    if not rooms.records.remove_hook(hook_id, owner):
        raise not_found("webhook", hook_id)
    return HookDeleted(id=hook_id)
