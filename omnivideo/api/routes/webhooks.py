"""Webhooks: where to say that a video has come to its end.

The routes are those of the openai client's `webhooks`, and the same under /v1/webhooks.
"""

import base64
import secrets
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from omnivideo.api.dependencies import ContextDep, OwnerDep
from omnivideo.api.errors import ERROR_RESPONSES, build_not_found_error
from omnivideo.api.request_body import (
    AfterCursor,
    BodyFields,
    CleanText,
    ResourceId,
    document_request_body,
    make_id,
    validate_fields,
)

router = APIRouter(prefix="/v1", tags=["webhooks"], responses=ERROR_RESPONSES)
MAX_WEBHOOKS_PER_OWNER = 20  # of one owner
WebhookEventType = Literal["video.completed", "video.failed"]
ALL_EVENT_TYPES: list[WebhookEventType] = ["video.completed", "video.failed"]


class CreateWebhookRequest(BaseModel):
    """`url` is told of the events by POST, at a public address unless the operator has listed its host."""

    url: CleanText = Field(min_length=1, max_length=2000)
    name: CleanText = Field(default="webhook", min_length=1, max_length=100)
    event_types: list[WebhookEventType] = Field(default=ALL_EVENT_TYPES, min_length=1, max_length=20)


class WebhookEndpoint(BaseModel):
    """`signing_secret`, and `secret`, which is the same, are told when it is made and never again."""

    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    created_at: int
    name: str
    url: str
    event_types: list[str]
    signing_secret: str | None = None
    secret: str | None = None


class WebhookEndpointList(BaseModel):
    object: Literal["list"] = "list"
    data: list[WebhookEndpoint]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool


class WebhookEndpointDeleted(BaseModel):
    id: str
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    deleted: bool = True


def to_webhook_endpoint(row: Any, secret: str | None = None) -> WebhookEndpoint:
    return WebhookEndpoint(
        id=row.id, created_at=int(row.created_at), name=row.name, url=row.url, event_types=row.event_types,
        signing_secret=secret, secret=secret,
    )  # fmt: skip


@router.post(
    "/webhook_endpoints", response_model_exclude_none=True, openapi_extra=document_request_body(CreateWebhookRequest)
)
@router.post("/webhooks", response_model_exclude_none=True, openapi_extra=document_request_body(CreateWebhookRequest))
def create_webhook(context: ContextDep, owner: OwnerDep, fields: BodyFields) -> WebhookEndpoint:
    payload = validate_fields(CreateWebhookRequest, fields)
    context.check_webhook_url(payload.url)
    secret = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
    row = context.webhooks.create_webhook(
        owner,
        MAX_WEBHOOKS_PER_OWNER,
        webhook_id=make_id("whe", owner, None),
        url=payload.url,
        secret=secret,
        name=payload.name,
        event_types=list(dict.fromkeys(payload.event_types)),
    )
    return to_webhook_endpoint(row, secret)


@router.get("/webhook_endpoints", response_model_exclude_none=True)
@router.get("/webhooks", response_model_exclude_none=True)
def list_webhooks(
    context: ContextDep, owner: OwnerDep, after: AfterCursor = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> WebhookEndpointList:  # fmt: skip
    """Your webhooks, the newest first."""
    rows, has_more = context.webhooks.list_webhooks(owner, after, limit)
    data = [to_webhook_endpoint(row) for row in rows]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return WebhookEndpointList(data=data, first_id=first, last_id=last, has_more=has_more)


@router.get("/webhook_endpoints/{hook_id}", response_model_exclude_none=True)
@router.get("/webhooks/{hook_id}", response_model_exclude_none=True)
def get_webhook(hook_id: ResourceId, context: ContextDep, owner: OwnerDep) -> WebhookEndpoint:
    row = context.webhooks.get_webhook(hook_id, owner)
    if row is None:
        raise build_not_found_error("webhook", hook_id)
    return to_webhook_endpoint(row)


@router.delete("/webhook_endpoints/{hook_id}")
@router.delete("/webhooks/{hook_id}")
def delete_webhook(hook_id: ResourceId, context: ContextDep, owner: OwnerDep) -> WebhookEndpointDeleted:
    """What it has not been told by now it will not be."""
    if not context.webhooks.delete_webhook(hook_id, owner):
        raise build_not_found_error("webhook", hook_id)
    return WebhookEndpointDeleted(id=hook_id)
