"""Images, which are generated while the request waits, in the format of OpenAI's clients."""

import base64
from collections.abc import Callable, Mapping
from typing import Any, Literal

from anyio.to_thread import run_sync
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from omnivideo.api.dependencies import ContextDep, IdempotencyKey, OwnerDep, ResourceId, ServiceContext, make_id
from omnivideo.api.errors import ERROR_RESPONSES, build_not_found_error, error_from_job
from omnivideo.api.generation import (
    ImageEditRequest,
    ImageRequest,
    JobRequest,
    build_image_edit_jobs,
    build_image_jobs,
    submit_job,
)
from omnivideo.api.request_body import BodyFields, document_request_body
from omnivideo.api.routes.videos import build_content_response
from omnivideo.contracts import JobStatus

router = APIRouter(prefix="/v1/images", tags=["images"], responses=ERROR_RESPONSES)
DISCONNECT_CHECK_SECONDS = 0.5  # how often a waiting request checks that its client is still connected
LINK_LIFETIME_SECONDS = 3600  # how long a signed URL of the object store is valid
CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that has disconnected; it is only logged
ImageJobBuilder = Callable[[ServiceContext, str, Mapping[str, Any], str], list[JobRequest]]


class ImageObject(BaseModel):
    b64_json: str | None = None
    url: str | None = None


class ImagesResponse(BaseModel):
    created: int
    data: list[ImageObject]
    output_format: Literal["png"] = "png"
    size: str


@router.post("/generations", response_model=ImagesResponse, openapi_extra=document_request_body(ImageRequest))
async def generate_images(
    request: Request, context: ContextDep, owner: OwnerDep, fields: BodyFields, idempotency_key: IdempotencyKey = None
) -> Response:
    """Generate `n` images from the prompt, with consecutive seeds. They are cancelled if the client disconnects."""
    base_id = make_id("image", owner, idempotency_key)
    return await run_image_jobs(request, context, owner, fields, base_id, build_image_jobs)


@router.post("/edits", response_model=ImagesResponse, openapi_extra=document_request_body(ImageEditRequest, "image"))
async def edit_images(
    request: Request, context: ContextDep, owner: OwnerDep, fields: BodyFields, idempotency_key: IdempotencyKey = None
) -> Response:
    """Edit an image as the prompt says."""
    base_id = make_id("image", owner, idempotency_key)
    return await run_image_jobs(request, context, owner, fields, base_id, build_image_edit_jobs)


@router.get("/{image_id}/content", response_class=Response)
def get_image_content(image_id: ResourceId, request: Request, context: ContextDep, owner: OwnerDep) -> Response:
    """Return an image that was requested with `response_format` "url"."""
    status = context.jobs.get_owned_job(image_id, owner, "image")
    if status is None:
        raise build_not_found_error("image", image_id)
    return build_content_response(context, status, request)


async def run_image_jobs(
    request: Request,
    context: ServiceContext,
    owner: str,
    fields: Mapping[str, Any],
    base_id: str,
    build_jobs: ImageJobBuilder,
) -> Response:
    job_ids = await run_sync(submit_image_jobs, context, owner, fields, base_id, build_jobs)
    statuses = await wait_for_jobs(request, context, job_ids)
    if statuses is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    inline = fields.get("response_format") != "url"
    images_response = await run_sync(build_images_response, context, statuses, inline, str(request.base_url))
    return JSONResponse(images_response.model_dump(exclude_none=True))


def submit_image_jobs(
    context: ServiceContext, owner: str, fields: Mapping[str, Any], base_id: str, build_jobs: ImageJobBuilder
) -> list[str]:
    """Submit all jobs and return their ids. If one is refused, cancel the others and raise its error."""
    job_ids: list[str] = []
    try:
        for job_request in build_jobs(context, owner, fields, base_id):
            job_ids.append(submit_job(context, owner, job_request).id)
    except Exception:
        cancel_jobs(context, job_ids)
        raise
    return job_ids


def cancel_jobs(context: ServiceContext, job_ids: list[str]) -> None:
    for job_id in job_ids:
        context.jobs.cancel(job_id)


async def wait_for_jobs(request: Request, context: ServiceContext, job_ids: list[str]) -> list[JobStatus] | None:
    """Return the jobs in order once all are done, or None if the client has disconnected.

    If a job fails or is cancelled, the others are cancelled and its error is raised.
    """
    with context.jobs.watch_ends(job_ids) as watch:
        while True:
            status_by_id = {status.id: status for status in await run_sync(context.jobs.list_statuses, job_ids)}
            statuses = [status_by_id[job_id] for job_id in job_ids]
            failed = next((status for status in statuses if status.state in ("failed", "cancelled")), None)
            if failed is not None:
                await run_sync(cancel_jobs, context, job_ids)
                raise error_from_job(failed)
            if all(status.state == "done" for status in statuses):
                return statuses
            if await request.is_disconnected():
                await run_sync(cancel_jobs, context, job_ids)
                return None
            await watch.receive(DISCONNECT_CHECK_SECONDS)


def build_images_response(
    context: ServiceContext, statuses: list[JobStatus], inline: bool, base_url: str
) -> ImagesResponse:
    data = [to_image_object(context, status, inline, base_url) for status in statuses]
    return ImagesResponse(created=int(statuses[0].created_at), data=data, size=statuses[0].meta["size"])


def to_image_object(context: ServiceContext, status: JobStatus, inline: bool, base_url: str) -> ImageObject:
    """Return the image's bytes or its URL: a signed one if the object store can sign, otherwise one of this service."""
    artifact = status.result
    assert artifact is not None
    if inline:
        return ImageObject(b64_json=base64.b64encode(context.store.get(artifact.key)).decode())
    if base_url and (sign_url := getattr(context.store, "presign_url", None)):
        return ImageObject(url=sign_url(artifact.key, LINK_LIFETIME_SECONDS))
    return ImageObject(url=f"{base_url or '/'}v1/images/{status.id}/content")
