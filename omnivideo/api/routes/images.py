"""Images, which are generated while the request waits, in the format of OpenAI's clients."""

import base64
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, Literal, TypeVar

from anyio.to_thread import run_sync
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from omnivideo.api.answers.links import LinkBuilder, MediaOwnerDep, create_link_builder
from omnivideo.api.dependencies import (
    ContextDep,
    IdempotencyDep,
    IdempotentRequest,
    OwnerDep,
    ResourceId,
    ServiceContext,
)
from omnivideo.api.errors import ERROR_RESPONSES, build_not_found_error, error_from_job
from omnivideo.api.generation import (
    ImageEditRequest,
    ImageRequest,
    JobRequest,
    build_image_edit_jobs,
    build_image_jobs,
    find_live_job,
    make_image_ids,
    submit_job,
)
from omnivideo.api.request_body import BodyFields, document_request_body, validate_fields
from omnivideo.api.routes.videos import build_content_response
from omnivideo.api.waiting import CLIENT_CLOSED_REQUEST, leave_work
from omnivideo.contracts import JobStatus

router = APIRouter(prefix="/v1/images", tags=["images"], responses=ERROR_RESPONSES)
DISCONNECT_CHECK_SECONDS = 0.5  # how often a waiting request checks that its client is still connected
LINK_LIFETIME_SECONDS = 3600  # how long a signed URL of the object store is valid
Payload = TypeVar("Payload", bound=ImageRequest)


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
    request: Request,
    context: ContextDep,
    owner: OwnerDep,
    fields: BodyFields,
    idempotent_request: IdempotencyDep,
) -> Response:
    """Generate `n` images from the prompt, with consecutive seeds. They are cancelled if the client disconnects.

    With an Idempotency-Key, they are cancelled once no client waits for them.
    """
    image_jobs = ImageJobs(context, owner, validate_fields(ImageRequest, fields), idempotent_request, build_image_jobs)
    return await run_image_jobs(request, image_jobs)


@router.post("/edits", response_model=ImagesResponse, openapi_extra=document_request_body(ImageEditRequest, "image"))
async def edit_images(
    request: Request,
    context: ContextDep,
    owner: OwnerDep,
    fields: BodyFields,
    idempotent_request: IdempotencyDep,
) -> Response:
    """Edit an image as the prompt says."""
    payload = validate_fields(ImageEditRequest, fields)
    return await run_image_jobs(request, ImageJobs(context, owner, payload, idempotent_request, build_image_edit_jobs))


@router.get("/{image_id}/content", response_class=Response)
def get_image_content(image_id: ResourceId, request: Request, context: ContextDep, owner: MediaOwnerDep) -> Response:
    """Return an image that was requested with `response_format` "url"."""
    status = context.jobs.get_owned_job(image_id, owner, "image")
    if status is None:
        raise build_not_found_error("image", image_id)
    return build_content_response(context, status, request)


class ImageJobs(Generic[Payload]):
    """The jobs of one request for images. Several clients may wait for them with one idempotency key."""

    def __init__(
        self,
        context: ServiceContext,
        owner: str,
        payload: Payload,
        idempotent_request: IdempotentRequest,
        build_jobs: Callable[[ServiceContext, str, Payload, str], list[JobRequest]],
    ):
        self.context, self.owner, self.payload = context, owner, payload
        self.idempotent_request = idempotent_request
        self.build_jobs = build_jobs
        self.base_id, self.ids = "", list[str]()

    def submit(self) -> None:
        """Submit the jobs, unless an earlier request with the key has done so, and wait for them from now on."""
        self.base_id = self.idempotent_request.run(
            self.payload, "image_", self.find_live_jobs, self.submit_new_jobs, is_waiting=True
        )
        self.ids = make_image_ids(self.base_id, self.payload.n)

    def find_live_jobs(self, base_id: str) -> str | None:
        """Return the id if all jobs exist and none was cancelled or deleted."""
        job_ids = make_image_ids(base_id, self.payload.n)
        live_jobs = [find_live_job(self.context, self.owner, "image", job_id) for job_id in job_ids]
        return base_id if all(live_jobs) else None

    def submit_new_jobs(self, base_id: str) -> str:
        """Submit all jobs. If one is refused, cancel the others and raise its error."""
        try:
            for job_request in self.build_jobs(self.context, self.owner, self.payload, base_id):
                submit_job(self.context, self.owner, job_request)
                self.ids.append(job_request.job.id)
        except Exception:
            self.cancel()
            raise
        return base_id

    def cancel(self) -> None:
        for job_id in self.ids:
            self.context.jobs.cancel(job_id)

    def leave(self, has_disconnected: bool = False) -> None:
        """Stop waiting. If the client has disconnected and no other one waits, cancel the jobs."""
        self.idempotent_request.leave(self.base_id, self.cancel if has_disconnected else None)


async def run_image_jobs(request: Request, image_jobs: ImageJobs[Any]) -> Response:
    await run_sync(image_jobs.submit)
    statuses = None
    try:
        statuses = await wait_for_jobs(request, image_jobs)
    finally:
        grace_seconds = image_jobs.context.settings.disconnect_grace_seconds
        await leave_work(image_jobs.leave, statuses is None, grace_seconds)
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


async def wait_for_jobs(request: Request, image_jobs: ImageJobs[Any]) -> list[JobStatus] | None:
    """Return the jobs in order once all are done, or None if the client has disconnected.

    If a job fails or is cancelled, the others are cancelled and its error is raised.
    """
    jobs = image_jobs.context.jobs
    with jobs.watch_ends(image_jobs.ids) as watch:
        while True:
            status_by_id = {status.id: status for status in await run_sync(jobs.list_statuses, image_jobs.ids)}
            statuses = [status_by_id[job_id] for job_id in image_jobs.ids]
            failed = next((status for status in statuses if status.state in ("failed", "cancelled")), None)
            if failed is not None:
                await run_sync(image_jobs.cancel)
                raise error_from_job(failed)
            if all(status.state == "done" for status in statuses):
                return statuses
            if await request.is_disconnected():
                return None
            await watch.receive(DISCONNECT_CHECK_SECONDS)


def build_images_response(
    statuses: list[JobStatus], to_image_object: Callable[[JobStatus], ImageObject]
) -> ImagesResponse:
    data = list(map(to_image_object, statuses))
    return ImagesResponse(created=int(statuses[0].created_at), data=data, size=statuses[0].meta["size"])


def to_inline_image(context: ServiceContext, status: JobStatus) -> ImageObject:
    assert status.result is not None
    return ImageObject(b64_json=base64.b64encode(context.store.get(status.result.key)).decode())


def to_linked_image(context: ServiceContext, links: LinkBuilder, status: JobStatus) -> ImageObject:
    """Return the image's address: a signed one of the object store if it can sign, otherwise one of this service."""
    assert status.result is not None
    if sign_url := getattr(context.store, "presign_url", None):
        return ImageObject(url=sign_url(status.result.key, LINK_LIFETIME_SECONDS))
    return ImageObject(url=links.build_link(build_image_path(status.id)))


def build_image_path(image_id: str) -> str:
    return f"/v1/images/{image_id}/content"
