"""Images, which are generated while the request waits, in the format of OpenAI's clients."""

import base64
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

from anyio.to_thread import run_sync
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from omnivideo.api.answers.links import LinkBuilder, MediaOwnerDep, create_link_builder
from omnivideo.api.dependencies import (
    ContextDep,
    IdempotencyDep,
    OwnerDep,
    ResourceId,
    ServiceContext,
)
from omnivideo.api.errors import ERROR_RESPONSES, build_not_found_error
from omnivideo.api.generation import build_image_edit_jobs, build_image_jobs, make_image_ids
from omnivideo.api.generation_requests import ImageEditRequest, ImageFormat, ImageGenerationRequest
from omnivideo.api.request_body import BodyFields, ServiceRoute, document_request_body, validate_fields
from omnivideo.api.routes.videos import build_content_response, build_manifest_response, read_image_content
from omnivideo.api.waiting import CLIENT_CLOSED_REQUEST
from omnivideo.api.waiting_jobs import WaitingJobs
from omnivideo.contracts import JobStatus

router = APIRouter(route_class=ServiceRoute, prefix="/v1/images", tags=["images"], responses=ERROR_RESPONSES)
LINK_LIFETIME_SECONDS = 3600  # how long a signed URL of the object store is valid


class ImageObject(BaseModel):
    """An image; `/v1/images/{id}/content` has its bytes."""

    id: str
    b64_json: str | None = None
    url: str | None = None


class ImagesResponse(BaseModel):
    """The images of a request; `id` is that of the first."""

    id: str
    created: int
    data: list[ImageObject]
    output_format: ImageFormat
    size: str


class ImageDeleted(BaseModel):
    id: str
    object: Literal["image.deleted"] = "image.deleted"
    deleted: bool = True


@router.post("/generations", response_model=ImagesResponse, openapi_extra=document_request_body(ImageGenerationRequest))
async def generate_images(
    request: Request,
    context: ContextDep,
    owner: OwnerDep,
    fields: BodyFields,
    idempotent_request: IdempotencyDep,
) -> Response:
    """Generate `n` images from the prompt, with consecutive seeds. They are cancelled if the client disconnects.

    With an Idempotency-Key, they are cancelled once no client waits for them.
    """
    payload = validate_fields(ImageGenerationRequest, fields)
    return await run_image_jobs(
        request,
        WaitingJobs(context, owner, payload, idempotent_request, "image", build_image_jobs, make_image_ids),
    )


@router.post(
    "/edits", response_model=ImagesResponse, openapi_extra=document_request_body(ImageEditRequest, "image", "mask")
)
async def edit_images(
    request: Request,
    context: ContextDep,
    owner: OwnerDep,
    fields: BodyFields,
    idempotent_request: IdempotencyDep,
) -> Response:
    """Edit an image as the prompt says; with a `mask`, only where its alpha is 0."""
    payload = validate_fields(ImageEditRequest, fields)
    return await run_image_jobs(
        request,
        WaitingJobs(context, owner, payload, idempotent_request, "image", build_image_edit_jobs, make_image_ids),
    )


@router.get("/{image_id}/content", response_class=Response)
def get_image_content(image_id: ResourceId, request: Request, context: ContextDep, owner: MediaOwnerDep) -> Response:
    """Return an image that was requested with `response_format` "url"."""
    return build_content_response(context, require_image(context, image_id, owner), request)


@router.get("/{image_id}/manifest", response_class=Response)
def get_image_manifest(image_id: ResourceId, request: Request, context: ContextDep, owner: OwnerDep) -> Response:
    """Return everything that the image was generated from, as JSON."""
    return build_manifest_response(context, require_image(context, image_id, owner), request)


@router.delete("/{image_id}")
def delete_image(image_id: ResourceId, context: ContextDep, owner: OwnerDep) -> ImageDeleted:
    """Delete an image. Sweeps remove its bytes within a day, unless something else refers to them."""
    if not context.jobs.delete_owned_job(image_id, owner, "image"):
        raise build_not_found_error("image", image_id)
    context.jobs.cancel(image_id)
    return ImageDeleted(id=image_id)


def require_image(context: ServiceContext, image_id: str, owner: str) -> JobStatus:
    status = context.jobs.get_owned_job(image_id, owner, "image")
    if status is None:
        raise build_not_found_error("image", image_id)
    return status


async def run_image_jobs(request: Request, image_jobs: WaitingJobs[Any]) -> Response:
    statuses = await image_jobs.run(request)
    if statuses is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    inline = image_jobs.payload.response_format != "url"
    if inline:
        to_object = partial(to_inline_image, image_jobs.context)
    else:
        links = create_link_builder(image_jobs.context, image_jobs.owner, str(request.base_url))
        to_object = partial(to_linked_image, image_jobs.context, links)
    images_response = await run_sync(build_images_response, statuses, to_object)
    return JSONResponse(images_response.model_dump(exclude_none=True))


def build_images_response(
    statuses: list[JobStatus], to_image_object: Callable[[JobStatus], ImageObject]
) -> ImagesResponse:
    first = statuses[0]
    image_format = cast(ImageFormat, first.meta.get("format", "png"))
    return ImagesResponse(
        id=first.id, created=int(first.created_at), data=list(map(to_image_object, statuses)),
        output_format=image_format, size=first.meta["size"],
    )  # fmt: skip


def to_inline_image(context: ServiceContext, status: JobStatus) -> ImageObject:
    assert status.result is not None
    data, _ = read_image_content(context, status, status.result)
    return ImageObject(id=status.id, b64_json=base64.b64encode(data).decode())


def to_linked_image(context: ServiceContext, links: LinkBuilder, status: JobStatus) -> ImageObject:
    """Return the image's address: a signed one of the object store if it can sign, otherwise one of this service.

    The store has a png; an image in another format is converted by this service.
    """
    assert status.result is not None
    is_stored = status.meta.get("format", "png") == "png"
    if is_stored and (sign_url := getattr(context.store, "presign_url", None)):
        return ImageObject(id=status.id, url=sign_url(status.result.key, LINK_LIFETIME_SECONDS))
    return ImageObject(id=status.id, url=links.build_link(build_image_path(status.id)))


def build_image_path(image_id: str) -> str:
    return f"/v1/images/{image_id}/content"
