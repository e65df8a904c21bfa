"""Videos: jobs that are asked for, polled, and whose clips are downloaded, as OpenAI's clients speak of them."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel

from omnivideo.api.dependencies import ContextDep, OwnerDep, ServiceContext
from omnivideo.api.errors import ERROR_RESPONSES, APIError, build_not_found_error
from omnivideo.api.generation import (
    VideoEditRequest,
    VideoRequest,
    build_remix_job,
    build_video_edit_job,
    build_video_job,
    submit_job,
)
from omnivideo.api.media import build_range_response
from omnivideo.api.request_body import (
    AfterCursor,
    BodyFields,
    IdempotencyKey,
    ResourceId,
    document_request_body,
    make_id,
)
from omnivideo.contracts import JobState, JobStatus

router = APIRouter(prefix="/v1/videos", tags=["videos"], responses=ERROR_RESPONSES)
VideoStatus = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
STATUS_BY_STATE: dict[JobState, VideoStatus] = {
    "queued": "queued", "running": "in_progress", "done": "completed", "failed": "failed", "cancelled": "cancelled",
}  # fmt: skip
VideoVariant = Literal["video", "thumbnail", "spritesheet"]
MIN_POLL_MS, MAX_POLL_MS = 100, 1000  # ms between two looks of a polling client


class VideoError(BaseModel):
    code: str
    message: str


class VideoObject(BaseModel):
    """`seconds` is what was asked for; the clip's length is the next that the model can draw."""

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
        model=context.settings.preset,
        status=STATUS_BY_STATE[status.state],
        progress=compute_progress(status),
        created_at=int(status.created_at),
        prompt=status.job.prompt,
        size=status.meta["size"],
        seconds=status.meta["seconds"],
        remixed_from_video_id=status.meta.get("remixed_from"),
    )
    if status.state == "done" and status.ended_at is not None:
        video.completed_at, video.expires_at = (
            int(status.ended_at),
            int(status.ended_at) + context.settings.artifact_lifetime_seconds,
        )
    if status.state == "failed":
        video.error = VideoError(code=status.code or "internal", message=status.error or "it could not be drawn")
    return video


def compute_progress(status: JobStatus) -> int:
    """Steps are not all: the clip is still to be decoded and kept after the last one."""
    if status.state == "done":
        return 100
    return min(99, 100 * status.step // status.steps) if status.steps else 0


def require_video(context: ServiceContext, video_id: str, owner: str) -> JobStatus:
    status: JobStatus | None = context.jobs.get_owned_job(video_id, owner, "video")
    if status is None:
        raise build_not_found_error("video", video_id)
    return status


# ---------------------------------------------------------------- routes


@router.post("", response_model_exclude_none=True, openapi_extra=document_request_body(VideoRequest, "input_reference"))
def create_video(
    context: ContextDep, owner: OwnerDep, fields: BodyFields, idempotency_key: IdempotencyKey = None
) -> VideoObject:
    """Asks for a clip of the prompt, or for the `input_reference` changed as the prompt says.

    The same Idempotency-Key with the same request is the same video, as it stands by then.
    """
    job_request = build_video_job(context, owner, fields, make_id("video", owner, idempotency_key))
    return to_video_object(context, submit_job(context, owner, job_request))


@router.post("/edits", response_model_exclude_none=True, openapi_extra=document_request_body(VideoEditRequest, "video"))
def edit_video(
    context: ContextDep, owner: OwnerDep, fields: BodyFields, idempotency_key: IdempotencyKey = None
) -> VideoObject:
    """Asks for a video, uploaded or drawn here, changed as the prompt says."""
    job_request = build_video_edit_job(context, owner, fields, make_id("video", owner, idempotency_key))
    return to_video_object(context, submit_job(context, owner, job_request))


@router.post("/extensions", response_model=None)
def extend_video(owner: OwnerDep) -> None:
    """Not possible: the model draws a clip as a whole and cannot go on from another one's end."""
    text = "this model cannot continue a clip; ask for a longer one (seconds), or edit one (/v1/videos/edits)"
    raise APIError(400, text, None, "unsupported")


@router.post("/{video_id}/remix", response_model_exclude_none=True, openapi_extra=document_request_body(VideoRequest))
def remix_video(
    video_id: ResourceId,
    context: ContextDep,
    owner: OwnerDep,
    fields: BodyFields,
    idempotency_key: IdempotencyKey = None,
) -> VideoObject:
    """Asks for a completed video changed as the prompt says, in its own size and length."""
    job_request = build_remix_job(
        context, fields, make_id("video", owner, idempotency_key), require_video(context, video_id, owner)
    )
    return to_video_object(context, submit_job(context, owner, job_request))


@router.get("")
def list_videos(
    context: ContextDep, owner: OwnerDep, after: AfterCursor = None, limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> VideoList:  # fmt: skip
    """Your videos by age, `after` the one of that id."""
    statuses, has_more = context.jobs.list_owned_jobs(owner, "video", after, limit, order == "desc")
    data = [to_video_object(context, status) for status in statuses]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return VideoList(data=data, first_id=first, last_id=last, has_more=has_more)


@router.get("/{video_id}", response_model_exclude_none=True)
def get_video(video_id: ResourceId, context: ContextDep, owner: OwnerDep, response: Response) -> VideoObject:
    """How far it is; `openai-poll-after-ms` says when to look again."""
    status = require_video(context, video_id, owner)
    if status.state in ("queued", "running"):
        response.headers["openai-poll-after-ms"] = str(suggest_poll_ms(status))
    return to_video_object(context, status)


def suggest_poll_ms(status: JobStatus) -> int:
    """Half of the time that is left, as far as it is known."""
    wait_ms = 500 * status.eta_seconds if status.state == "running" and status.step else MAX_POLL_MS / 2
    return round(min(MAX_POLL_MS, max(MIN_POLL_MS, wait_ms)))


@router.post("/{video_id}/cancel", response_model_exclude_none=True)
def cancel_video(video_id: ResourceId, context: ContextDep, owner: OwnerDep) -> VideoObject:
    """Stops it within a denoising step; one that has ended stays as it is."""
    require_video(context, video_id, owner)
    context.jobs.cancel(video_id)
    return to_video_object(context, require_video(context, video_id, owner))


@router.delete("/{video_id}")
def delete_video(video_id: ResourceId, context: ContextDep, owner: OwnerDep) -> VideoDeleted:
    """Forgets it, and stops it where it is not completed; the clip's bytes go with the next sweep."""
    if not context.jobs.delete_owned_job(video_id, owner, "video"):
        raise build_not_found_error("video", video_id)
    context.jobs.cancel(video_id)
    return VideoDeleted(id=video_id)


@router.get("/{video_id}/content", response_class=Response)
def get_video_content(
    video_id: ResourceId, request: Request, context: ContextDep, owner: OwnerDep, variant: VideoVariant = "video"
) -> Response:
    """The clip (mp4), or a picture of its middle (webp) or of all its course (jpeg); in ranges, if asked."""
    status = require_video(context, video_id, owner)
    return build_content_response(context, status, request, variant)


def build_content_response(context: ServiceContext, status: JobStatus, request: Request, variant: str = "") -> Response:
    """What a job has drawn, or a picture of it, under a file name of our own."""
    if status.result is None:
        raise APIError(400, f"id: there is nothing to download, as it is {status.state}", "id", "not_ready")
    if variant in ("thumbnail", "spritesheet"):
        data, suffix = context.render_thumbnail(status.result, variant)
        response = build_range_response(request, data, f"{status.result.key.partition('.')[0]}-{variant}.{suffix}")
    else:
        suffix = status.result.key.rpartition(".")[2]
        response = build_range_response(request, context.store.get(status.result.key), status.result.key)
    response.headers["Content-Disposition"] = f'inline; filename="{status.id}.{suffix}"'
    response.headers["Cache-Control"] = "private, max-age=3600"
    return response
