"""Videos: clients create jobs, poll them and download their clips, in the format of OpenAI's clients."""

from collections.abc import Callable
from typing import Annotated, Literal

from anyio.to_thread import run_sync
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel

from omnivideo.api.dependencies import (
    AfterCursor,
    ContextDep,
    IdempotencyDep,
    IdempotentRequest,
    OwnerDep,
    ResourceId,
    ServiceContext,
)
from omnivideo.api.errors import ERROR_RESPONSES, APIError, build_not_found_error, describe_job_failure
from omnivideo.api.generation import (
    JobRequest,
    build_remix_job,
    build_video_edit_job,
    build_video_extension_job,
    build_video_job,
    build_video_jobs,
    find_live_job,
    make_video_ids,
    repeat_video_job,
    submit_jobs,
)
from omnivideo.api.generation_requests import ClipRequest, VideoEditRequest, VideoExtensionRequest, VideoRequest
from omnivideo.api.media import build_range_response, content_from_bytes, content_from_store, has_expired
from omnivideo.api.request_body import BodyFields, ServiceRoute, document_request_body, validate_fields
from omnivideo.api.waiting import CLIENT_CLOSED_REQUEST
from omnivideo.api.waiting_jobs import WaitingJobs
from omnivideo.contracts import Artifact, JobState, JobStatus
from omnivideo.errors import InvalidInput
from omnivideo.media.artifacts import convert_picture
from omnivideo.presets import get_preset, get_sampling_defaults

router = APIRouter(route_class=ServiceRoute, prefix="/v1/videos", tags=["videos"], responses=ERROR_RESPONSES)
VideoStatus = Literal["queued", "in_progress", "completed", "failed", "cancelled", "expired"]
STATUS_BY_STATE: dict[JobState, VideoStatus] = {
    "queued": "queued", "running": "in_progress", "done": "completed", "failed": "failed", "cancelled": "cancelled",
}  # fmt: skip
VideoVariant = Literal["video", "thumbnail", "spritesheet"]
MIN_POLL_MS, MAX_POLL_MS = 100, 1000  # bounds of the polling interval that is suggested to clients


class VideoError(BaseModel):
    code: str
    message: str


class VideoObject(BaseModel):
    """`seconds` is the length; `video_ids` are all videos of a request with `n` above 1, of which this is the first.

    After `expires_at`, the status is "expired" and the clip can no longer be downloaded, edited or remixed.
    """

    id: str
    object: Literal["video"] = "video"
    model: str
    status: VideoStatus
    progress: int
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    prompt: str
    size: str
    seconds: str
    remixed_from_video_id: str | None = None
    video_ids: list[str] | None = None
    error: VideoError | None = None


class VideoList(BaseModel):
    object: Literal["list"] = "list"
    data: list[VideoObject]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool


class VideoDeleted(BaseModel):
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


def to_video_object(context: ServiceContext, status: JobStatus) -> VideoObject:
    video = VideoObject(
        id=status.id,
        model=status.job.preset or context.settings.preset,
        status=STATUS_BY_STATE[status.state],
        progress=compute_progress(status),
        created_at=int(status.created_at),
        prompt=status.job.prompt,
        size=status.meta["size"],
        seconds=status.meta["seconds"],
        remixed_from_video_id=status.meta.get("remixed_from"),
        video_ids=make_video_ids(status.id, int(status.meta["n"])) if "n" in status.meta else None,
    )
    if status.state == "done" and status.ended_at is not None:
        video.completed_at = int(status.ended_at)
        video.expires_at = video.completed_at + context.settings.artifact_lifetime_seconds
        video.status = "expired" if has_expired(context, status) else video.status
    if status.state == "failed":
        code, message = describe_job_failure(status)
        video.error = VideoError(code=code, message=message)
    return video


def compute_progress(status: JobStatus) -> int:
    """Return the progress in percent: at most 99 before the job is done, as decoding and storing follow the steps."""
    if status.state == "done":
        return 100
    return min(99, 100 * status.step // status.steps) if status.steps else 0


def require_video(context: ServiceContext, video_id: str, owner: str) -> JobStatus:
    status = context.jobs.get_owned_job(video_id, owner, "video")
    if status is None:
        raise build_not_found_error("video", video_id)
    return status


# ---------------------------------------------------------------- routes


@router.post(
    "",
    response_model_exclude_none=True,
    openapi_extra=document_request_body(VideoRequest, "input_reference", "last_image"),
)
def create_video(
    context: ContextDep, owner: OwnerDep, fields: BodyFields, idempotent_request: IdempotencyDep
) -> VideoObject:
    """Generate a clip from the prompt, begin with the picture in `input_reference`, or edit the reference.

    The same Idempotency-Key with the same request returns the same video, in its current state.
    """
    payload = validate_fields(VideoRequest, fields)

    def build_job(job_id: str) -> JobRequest:
        return build_video_job(context, owner, payload, job_id)

    return submit_video(context, owner, idempotent_request, payload, build_job)


def submit_video(
    context: ServiceContext,
    owner: str,
    idempotent_request: IdempotentRequest,
    payload: ClipRequest,
    build_job: Callable[[str], JobRequest],
) -> VideoObject:
    """Submit the job that `build_job` builds for a new id, unless an earlier request with the key has done so."""
    status = idempotent_request.run(
        payload,
        "video_",
        find=lambda job_id: find_live_job(context, owner, "video", job_id),
        create=lambda job_id: submit_jobs(context, owner, repeat_video_job(build_job(job_id), payload.n))[0],
    )
    return to_video_object(context, status)


@router.post(
    "/sync",
    response_class=Response,
    responses={200: {"content": {"video/mp4": {}}, "description": "The clip"}},
    openapi_extra=document_request_body(VideoRequest, "input_reference", "last_image"),
)
async def create_video_and_wait(
    request: Request,
    context: ContextDep,
    owner: OwnerDep,
    fields: BodyFields,
    idempotent_request: IdempotencyDep,
) -> Response:
    """Generate a clip as `POST /v1/videos` does, and return its bytes. It is cancelled if the client disconnects."""
    payload = validate_fields(VideoRequest, fields)
    if payload.n > 1:
        raise InvalidInput("n", "this response holds one video; allowed: 1")
    jobs = WaitingJobs(context, owner, payload, idempotent_request, "video", build_video_jobs, make_video_ids)
    statuses = await jobs.run(request)
    if statuses is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    response = await run_sync(build_content_response, context, statuses[0], request)
    response.headers["X-Video-Id"] = statuses[0].id
    return response


@router.post("/edits", response_model_exclude_none=True, openapi_extra=document_request_body(VideoEditRequest, "video"))
def edit_video(
    context: ContextDep, owner: OwnerDep, fields: BodyFields, idempotent_request: IdempotencyDep
) -> VideoObject:
    """Edit a video, uploaded or generated here, as the prompt says."""
    payload = validate_fields(VideoEditRequest, fields)

    def build_job(job_id: str) -> JobRequest:
        return build_video_edit_job(context, owner, payload, job_id)

    return submit_video(context, owner, idempotent_request, payload, build_job)


@router.post(
    "/extensions", response_model_exclude_none=True, openapi_extra=document_request_body(VideoExtensionRequest, "video")
)
def extend_video(
    context: ContextDep, owner: OwnerDep, fields: BodyFields, idempotent_request: IdempotencyDep
) -> VideoObject:
    """Continue a video, uploaded or generated here, as the prompt says; the new video begins with the old one.

    `seconds`, or `num_frames`, is what is added. A model that cannot continue clips refuses every request.
    """
    try:
        get_sampling_defaults(get_preset(context.settings.preset), "video-extension", "video")
    except InvalidInput as error:
        raise APIError(400, str(error), error.field, "unsupported") from None
    payload = validate_fields(VideoExtensionRequest, fields)

    def build_job(job_id: str) -> JobRequest:
        return build_video_extension_job(context, owner, payload, job_id)

    return submit_video(context, owner, idempotent_request, payload, build_job)


@router.post("/{video_id}/remix", response_model_exclude_none=True, openapi_extra=document_request_body(ClipRequest))
def remix_video(
    video_id: ResourceId,
    context: ContextDep,
    owner: OwnerDep,
    fields: BodyFields,
    idempotent_request: IdempotencyDep,
) -> VideoObject:
    """Edit a completed video as the prompt says; it keeps its size and length."""
    payload = validate_fields(ClipRequest, fields)

    def build_job(job_id: str) -> JobRequest:
        return build_remix_job(context, payload, job_id, require_video(context, video_id, owner))

    return submit_video(context, owner, idempotent_request, payload, build_job)


@router.get("")
def list_videos(
    context: ContextDep,
    owner: OwnerDep,
    after: AfterCursor = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> VideoList:
    """Return a page of your videos, ordered by age, beginning after the id `after`."""
    statuses, has_more = context.jobs.list_owned_jobs(owner, "video", after, limit, order == "desc")
    data = [to_video_object(context, status) for status in statuses]
    first_id, last_id = (data[0].id, data[-1].id) if data else (None, None)
    return VideoList(data=data, first_id=first_id, last_id=last_id, has_more=has_more)


@router.get("/{video_id}", response_model_exclude_none=True)
def get_video(video_id: ResourceId, context: ContextDep, owner: OwnerDep, response: Response) -> VideoObject:
    """Return the video's state. The header `openai-poll-after-ms` says when to ask again."""
    status = require_video(context, video_id, owner)
    if status.state in ("queued", "running"):
        response.headers["openai-poll-after-ms"] = str(suggest_poll_ms(status))
    return to_video_object(context, status)


def suggest_poll_ms(status: JobStatus) -> int:
    """Return half of the estimated remaining time, within MIN_POLL_MS and MAX_POLL_MS."""
    wait_ms = 500 * status.eta_seconds if status.state == "running" and status.step else MAX_POLL_MS / 2
    return round(min(MAX_POLL_MS, max(MIN_POLL_MS, wait_ms)))


@router.post("/{video_id}/cancel", response_model_exclude_none=True)
def cancel_video(
    video_id: ResourceId, context: ContextDep, owner: OwnerDep, idempotent_request: IdempotencyDep
) -> VideoObject:
    """Cancel a video within one denoising step. A video that has ended is left unchanged."""

    def cancel(job_id: str) -> JobStatus:
        require_video(context, job_id, owner)
        context.jobs.cancel(job_id)
        return require_video(context, job_id, owner)

    return to_video_object(context, idempotent_request.repeat(video_id, cancel))


@router.delete("/{video_id}")
def delete_video(video_id: ResourceId, context: ContextDep, owner: OwnerDep) -> VideoDeleted:
    """Delete a video, and cancel it if it has not ended. Sweeps remove the clip's bytes within a day."""
    if not context.jobs.delete_owned_job(video_id, owner, "video"):
        raise build_not_found_error("video", video_id)
    context.jobs.cancel(video_id)
    return VideoDeleted(id=video_id)


@router.get("/{video_id}/content", response_class=Response)
def get_video_content(
    video_id: ResourceId, request: Request, context: ContextDep, owner: OwnerDep, variant: VideoVariant = "video"
) -> Response:
    """Return the clip (mp4), its middle frame (webp) or a sheet of its frames (jpeg), or a range of the bytes."""
    status = require_video(context, video_id, owner)
    return build_content_response(context, status, request, variant)


@router.get("/{video_id}/manifest", response_class=Response)
def get_video_manifest(video_id: ResourceId, request: Request, context: ContextDep, owner: OwnerDep) -> Response:
    """Return everything that the clip was generated from, as JSON."""
    return build_manifest_response(context, require_video(context, video_id, owner), request)


def build_manifest_response(context: ServiceContext, status: JobStatus, request: Request) -> Response:
    result = require_result(context, status)
    assert result.manifest is not None, "a generated file has a manifest"
    return build_range_response(request, content_from_store(context, result.manifest))


def require_result(context: ServiceContext, status: JobStatus) -> Artifact:
    """Return the result of a job. Raises APIError if there is none yet, or if it may have been removed."""
    if status.result is None:
        raise APIError(400, f"id: it has no content to download yet; its state is {status.state}", "id", "not_ready")
    if has_expired(context, status):
        raise APIError(404, f"id: the {status.kind} has expired; generate it again", "id", "expired")
    return status.result


def read_image_content(context: ServiceContext, status: JobStatus, artifact: Artifact) -> tuple[bytes, str]:
    """Return the bytes of a result in the format that was requested, and a key whose suffix is that format."""
    data, image_format = context.store.get(artifact.key), status.meta.get("format", "png")
    if status.kind != "image" or image_format == "png":
        return data, artifact.key
    quality = int(status.meta.get("compression", "100"))
    key = f"{artifact.key.partition('.')[0]}-{quality}.{image_format}"
    return convert_picture(data, image_format, quality), key


def build_content_response(context: ServiceContext, status: JobStatus, request: Request, variant: str = "") -> Response:
    """Return a job's result, or a picture of it, with a file name that is derived from the job's id."""
    result = require_result(context, status)
    if variant in ("thumbnail", "spritesheet"):
        data, suffix = context.render_thumbnail(status.owner, result, variant)
        key = f"{result.key.partition('.')[0]}-{variant}.{suffix}"
        response = build_range_response(request, content_from_bytes(data, key))
    elif status.kind == "image" and status.meta.get("format", "png") != "png":
        data, key = read_image_content(context, status, result)
        suffix = key.rpartition(".")[2]
        response = build_range_response(request, content_from_bytes(data, key))
    else:
        suffix = result.key.rpartition(".")[2]
        response = build_range_response(request, content_from_store(context, result.key))
    response.headers["Content-Disposition"] = f'inline; filename="{status.id}.{suffix}"'
    response.headers["Cache-Control"] = "private, max-age=3600"
    return response
