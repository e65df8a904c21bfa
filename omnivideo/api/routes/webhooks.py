"""Webhooks, which receive an event when a video has been completed, has failed or was cancelled.

The routes are those of the openai client's `webhooks`; they also exist under /v1/webhook_endpoints.
"""

import base64
import secrets
import time
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from omnivideo.api.dependencies import AfterCursor, ContextDep, IdempotencyDep, OwnerDep, ResourceId, ServiceContext
from omnivideo.api.errors import ERROR_RESPONSES, build_not_found_error
from omnivideo.api.request_body import BodyFields, CleanText, ServiceRoute, document_request_body, validate_fields
from omnivideo.contracts import RequestModel
from omnivideo.records import WebhookRecord

router = APIRouter(route_class=ServiceRoute, prefix="/v1", tags=["webhooks"], responses=ERROR_RESPONSES)
MAX_WEBHOOKS_PER_OWNER = 20
WebhookEventType = Literal["video.completed", "video.failed", "video.cancelled"]
ALL_EVENT_TYPES: list[WebhookEventType] = ["video.completed", "video.failed", "video.cancelled"]
TEST_EVENT_TYPE = "webhook.test"


class CreateWebhookRequest(RequestModel):
    """Events are sent to `url` by POST. Its address must be public, unless the operator has listed the host."""

    url: CleanText = Field(min_length=1, max_length=2000)
    name: CleanText = Field(default="webhook", min_length=1, max_length=100)
    event_types: list[WebhookEventType] = Field(default=ALL_EVENT_TYPES, min_length=1, max_length=20)


class UpdateWebhookRequest(RequestModel):
    """A field that is absent is not changed. The secret is changed by `rotate_secret`."""

    url: CleanText | None = Field(default=None, min_length=1, max_length=2000)
    name: CleanText | None = Field(default=None, min_length=1, max_length=100)
    event_types: list[WebhookEventType] | None = Field(default=None, min_length=1, max_length=20)


class WebhookTestResult(BaseModel):
    """A test event is sent, and repeated like every other event until it is accepted."""

    id: str
    object: Literal["event"] = "event"
    type: Literal["webhook.test"] = "webhook.test"


class WebhookEndpoint(BaseModel):
    """The secret is returned only when it is new, as `signing_secret` and again as `secret`."""

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


def to_webhook_endpoint(webhook: WebhookRecord, secret: str | None = None) -> WebhookEndpoint:
    return WebhookEndpoint(
        id=webhook.id,
        created_at=int(webhook.created_at),
        name=webhook.name,
        url=webhook.url,
        event_types=webhook.event_types,
        signing_secret=secret,
        secret=secret,
    )


@router.post(
    "/webhook_endpoints", response_model_exclude_none=True, openapi_extra=document_request_body(CreateWebhookRequest)
)
@router.post("/webhooks", response_model_exclude_none=True, openapi_extra=document_request_body(CreateWebhookRequest))
def create_webhook(
    context: ContextDep, owner: OwnerDep, fields: BodyFields, idempotent_request: IdempotencyDep
) -> WebhookEndpoint:
    """Create a webhook and return it with its secret."""
    payload = validate_fields(CreateWebhookRequest, fields)
    webhook = idempotent_request.run(
        payload,
        "whe_",
        find=lambda hook_id: context.webhooks.get_webhook(hook_id, owner),
        create=lambda hook_id: store_webhook(context, owner, payload, hook_id),
    )
    return to_webhook_endpoint(webhook, webhook.secret)


def store_webhook(context: ServiceContext, owner: str, payload: CreateWebhookRequest, hook_id: str) -> WebhookRecord:
    context.check_webhook_url(payload.url)
    return context.webhooks.create_webhook(
        owner,
        MAX_WEBHOOKS_PER_OWNER,
        webhook_id=hook_id,
        url=payload.url,
        secret=generate_secret(),
        name=payload.name,
        event_types=list(dict.fromkeys(payload.event_types)),
    )


def generate_secret() -> str:
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


@router.get("/webhook_endpoints", response_model_exclude_none=True)
@router.get("/webhooks", response_model_exclude_none=True)
def list_webhooks(
    context: ContextDep, owner: OwnerDep, after: AfterCursor = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> WebhookEndpointList:
    """Return a page of your webhooks, newest first, beginning after the id `after`."""
    webhooks, has_more = context.webhooks.list_webhooks(owner, after, limit)
    data = [to_webhook_endpoint(webhook) for webhook in webhooks]
    first_id, last_id = (data[0].id, data[-1].id) if data else (None, None)
    return WebhookEndpointList(data=data, first_id=first_id, last_id=last_id, has_more=has_more)


@router.get("/webhook_endpoints/{hook_id}", response_model_exclude_none=True)
@router.get("/webhooks/{hook_id}", response_model_exclude_none=True)
def get_webhook(hook_id: ResourceId, context: ContextDep, owner: OwnerDep) -> WebhookEndpoint:
    return to_webhook_endpoint(require_webhook(context, owner, hook_id))


@router.delete("/webhook_endpoints/{hook_id}")
@router.delete("/webhooks/{hook_id}")
def delete_webhook(hook_id: ResourceId, context: ContextDep, owner: OwnerDep) -> WebhookEndpointDeleted:
    """Delete a webhook. Events that have not been delivered to it yet are dropped."""
    if not context.webhooks.delete_webhook(hook_id, owner):
        raise build_not_found_error("webhook", hook_id)
    return WebhookEndpointDeleted(id=hook_id)


@router.post(
    "/webhook_endpoints/{hook_id}",
    response_model_exclude_none=True,
    openapi_extra=document_request_body(UpdateWebhookRequest),
)
@router.post(
    "/webhooks/{hook_id}", response_model_exclude_none=True, openapi_extra=document_request_body(UpdateWebhookRequest)
)
def update_webhook(
    hook_id: ResourceId,
    context: ContextDep,
    owner: OwnerDep,
    fields: BodyFields,
    idempotent_request: IdempotencyDep,
) -> WebhookEndpoint:
    """Change the address, the name or the event types of a webhook."""
    payload = validate_fields(UpdateWebhookRequest, fields)

    def update(hook_id: str) -> WebhookRecord:
        webhook = require_webhook(context, owner, hook_id)
        if payload.url is not None:
            context.check_webhook_url(payload.url)
        values = payload.model_dump(exclude_none=True)
        return (context.webhooks.update_webhook(hook_id, owner, **values) if values else None) or webhook

    return to_webhook_endpoint(idempotent_request.repeat(hook_id, update, payload))


@router.post("/webhook_endpoints/{hook_id}/rotate_secret", response_model_exclude_none=True)
@router.post("/webhooks/{hook_id}/rotate_secret", response_model_exclude_none=True)
def rotate_webhook_secret(
    hook_id: ResourceId, context: ContextDep, owner: OwnerDep, idempotent_request: IdempotencyDep
) -> WebhookEndpoint:
    """Give a webhook a new secret and return it. Events are signed with it from now on.

    The same Idempotency-Key returns the same secret.
    """

    def rotate(hook_id: str) -> WebhookRecord | None:
        return context.webhooks.update_webhook(hook_id, owner, secret=generate_secret())

    require_webhook(context, owner, hook_id)
    idempotent_request.run(
        None,
        "",
        find=lambda hook_id: context.webhooks.get_webhook(hook_id, owner),
        create=rotate,
        resource_id=hook_id,
    )
    webhook = require_webhook(context, owner, hook_id)
    return to_webhook_endpoint(webhook, webhook.secret)


@router.post("/webhook_endpoints/{hook_id}/test")
@router.post("/webhooks/{hook_id}/test")
def send_test_event(
    hook_id: ResourceId, context: ContextDep, owner: OwnerDep, idempotent_request: IdempotencyDep
) -> WebhookTestResult:
    """Send an event of the type `webhook.test` to a webhook, whatever its event types are."""
    require_webhook(context, owner, hook_id)

    def send(event_id: str) -> str:
        body = {
            "id": event_id, "object": "event", "created_at": int(time.time()), "type": TEST_EVENT_TYPE,
            "data": {"id": hook_id},
        }  # fmt: skip
        context.webhooks.enqueue_deliveries([(event_id, hook_id, body)])
        return event_id

    return WebhookTestResult(id=idempotent_request.run(None, "evt_", find=lambda event_id: event_id, create=send))


def require_webhook(context: ServiceContext, owner: str, hook_id: str) -> WebhookRecord:
    webhook = context.webhooks.get_webhook(hook_id, owner)
    if webhook is None:
        raise build_not_found_error("webhook", hook_id)
    return webhook
