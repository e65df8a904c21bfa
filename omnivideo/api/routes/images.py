"""Images: asked for and waited for in one request, as OpenAI's clients speak of them."""

import base64
from collections.abc import Callable, Mapping
from typing import Any, Literal

from anyio.to_thread import run_sync
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from omnivideo.api.dependencies import ContextDep, OwnerDep, ServiceContext
from omnivideo.api.errors import ERROR_RESPONSES, build_not_found_error
from omnivideo.api.generation import (
    ImageEditRequest,
    ImageRequest,
    JobRequest,
    build_image_edit_jobs,
    build_image_jobs,
    error_from_status,
    submit_job,
)
from omnivideo.api.request_body import BodyFields, IdempotencyKey, ResourceId, document_request_body, make_id
from omnivideo.api.routes.videos import build_content_response
from omnivideo.contracts import Artifact, JobStatus

router = APIRouter(prefix="/v1/images", tags=["images"], responses=ERROR_RESPONSES)
DISCONNECT_CHECK_SECONDS = 0.5  # how often a waiting request checks that its client is still connected
LINK_LIFETIME_SECONDS = 3600  # seconds that a link to the store is good for
CLIENT_CLOSED_REQUEST = 499  # what others write into their logs for a client that did not wait
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
    """`n` images of the prompt, with seeds that follow each other; a client that goes away stops them."""
    return await run_image_jobs(
        request, context, owner, fields, make_id("image", owner, idempotency_key), build_image_jobs
    )


@router.post("/edits", response_model=ImagesResponse, openapi_extra=document_request_body(ImageEditRequest, "image"))
async def edit_images(
    request: Request, context: ContextDep, owner: OwnerDep, fields: BodyFields, idempotency_key: IdempotencyKey = None
) -> Response:
    """The image, changed as the prompt says."""
    return await run_image_jobs(
        request, context, owner, fields, make_id("image", owner, idempotency_key), build_image_edit_jobs
    )


@router.get("/{image_id}/content", response_class=Response)
def get_image_content(image_id: ResourceId, request: Request, context: ContextDep, owner: OwnerDep) -> Response:
    """An image that was asked for as a URL."""
    status: JobStatus | None = context.jobs.get_owned_job(image_id, owner, "image")
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
    """The ids of the jobs: all of them, or none where one finds no room."""
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
    """The jobs in order, once all are done; None where the client has gone.  Raises what ended one of them."""
    with context.jobs.watch_ends(job_ids) as watch:
        while True:
            status_by_id = {status.id: status for status in await run_sync(context.jobs.list_statuses, job_ids)}
            statuses = [status_by_id[job_id] for job_id in job_ids]
            failed = next((status for status in statuses if status.state in ("failed", "cancelled")), None)
            if failed is not None:
                await run_sync(cancel_jobs, context, job_ids)
                raise error_from_status(failed)
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
    """Its bytes, or where it is: in the store, if that gives links, else here, with the key that asked for it."""
    artifact: Artifact | None = status.result
    assert artifact is not None
    if inline:
        return ImageObject(b64_json=base64.b64encode(context.store.get(artifact.key)).decode())
    if base_url and (sign_url := getattr(context.store, "presign_url", None)):
        return ImageObject(url=sign_url(artifact.key, LINK_LIFETIME_SECONDS))
    return ImageObject(url=f"{base_url or '/'}v1/images/{status.id}/content")
