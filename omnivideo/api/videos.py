"""Videos: jobs that are asked for, polled, and whose clips are downloaded, as OpenAI's clients speak of them."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel

from omnivideo.api.drawing import EditAsked, VideoAsked, edit_order, remix_order, submitted, video_order
from omnivideo.api.errors import REFUSALS, WireError, not_found
from omnivideo.api.forms import After, Fields, Id, Key, documented, name_for
from omnivideo.api.media import ranged
from omnivideo.api.rooms import Owner, Room, Rooms
from omnivideo.contracts import JobState, JobStatus

router = APIRouter(prefix="/v1/videos", tags=["videos"], responses=REFUSALS)
Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
STATES: dict[JobState, Status] = {
    "queued": "queued", "running": "in_progress", "done": "completed", "failed": "failed", "cancelled": "cancelled",
}  # fmt: skip
Variant = Literal["video", "thumbnail", "spritesheet"]
POLL_LEAST, POLL_MOST = 100, 1000  # ms between two looks of a polling client


class Trouble(BaseModel):
    code: str
    message: str


class Video(BaseModel):
    """`seconds` is what was asked for; the clip's length is the next that the model can draw."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Status
    progress: int
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    prompt: str
    size: str
    seconds: str
    remixed_from_video_id: str | None = None
    error: Trouble | None = None


class VideoList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool


class VideoDeleted(BaseModel):
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


def shown(rooms: Rooms, status: JobStatus) -> Video:
    made = Video(
        id=status.id,
        model=rooms.settings.preset,
        status=STATES[status.state],
        progress=progress(status),
        created_at=int(status.made),
        prompt=status.job.prompt,
        size=status.meta["size"],
        seconds=status.meta["seconds"],
        remixed_from_video_id=status.meta.get("remixed_from"),
    )
    if status.state == "done" and status.ended is not None:
        made.completed_at, made.expires_at = int(status.ended), int(status.ended) + rooms.settings.lifetime
    if status.state == "failed":
        made.error = Trouble(code=status.code or "internal", message=status.error or "it could not be drawn")
    return made


def progress(status: JobStatus) -> int:
    """Steps are not all: the clip is still to be decoded and kept after the last one."""
    if status.state == "done":
        return 100
    return min(99, 100 * status.step // status.steps) if status.steps else 0


def found(rooms: Rooms, video_id: str, owner: str) -> JobStatus:
    status: JobStatus | None = rooms.records.job(video_id, owner, "video")
    if status is None:
        raise not_found("video", video_id)
    return status


# ---------------------------------------------------------------- routes


@router.post("", response_model_exclude_none=True, openapi_extra=documented(VideoAsked, "input_reference"))
def create(rooms: Room, owner: Owner, fields: Fields, key: Key = None) -> Video:
    """Asks for a clip of the prompt, or for the `input_reference` changed as the prompt says.

    The same Idempotency-Key with the same request is the same video, as it stands by then.
    """
    wanted = video_order(rooms, owner, fields, name_for("video", owner, key))
    return shown(rooms, submitted(rooms, owner, wanted))


@router.post("/edits", response_model_exclude_none=True, openapi_extra=documented(EditAsked, "video"))
def edit(rooms: Room, owner: Owner, fields: Fields, key: Key = None) -> Video:
    """Asks for a video, uploaded or drawn here, changed as the prompt says."""
    wanted = edit_order(rooms, owner, fields, name_for("video", owner, key))
    return shown(rooms, submitted(rooms, owner, wanted))


@router.post("/extensions", response_model=None)
def extend(owner: Owner) -> None:
    """Not possible: the model draws a clip as a whole and cannot go on from another one's end."""
    text = "this model cannot continue a clip; ask for a longer one (seconds), or edit one (/v1/videos/edits)"
    raise WireError(400, text, None, "unsupported")


@router.post("/{video_id}/remix", response_model_exclude_none=True, openapi_extra=documented(VideoAsked))
def remix(video_id: Id, rooms: Room, owner: Owner, fields: Fields, key: Key = None) -> Video:
    """Asks for a completed video changed as the prompt says, in its own size and length."""
    wanted = remix_order(rooms, fields, name_for("video", owner, key), found(rooms, video_id, owner))
    return shown(rooms, submitted(rooms, owner, wanted))


@router.get("")
def listing(
    rooms: Room, owner: Owner, after: After = None, limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> VideoList:  # fmt: skip
    """Your videos by age, `after` the one of that id."""
    statuses, more = rooms.records.jobs(owner, "video", after, limit, order == "desc")
    data = [shown(rooms, status) for status in statuses]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return VideoList(data=data, first_id=first, last_id=last, has_more=more)


@router.get("/{video_id}", response_model_exclude_none=True)
def get(video_id: Id, rooms: Room, owner: Owner, response: Response) -> Video:
    """How far it is; `openai-poll-after-ms` says when to look again."""
    status = found(rooms, video_id, owner)
    if status.state in ("queued", "running"):
        response.headers["openai-poll-after-ms"] = str(pause(status))
    return shown(rooms, status)


def pause(status: JobStatus) -> int:
    """Half of the time that is left, as far as it is known."""
    wait = 500 * status.left if status.state == "running" and status.step else POLL_MOST / 2
    return round(min(POLL_MOST, max(POLL_LEAST, wait)))


@router.post("/{video_id}/cancel", response_model_exclude_none=True)
def cancel(video_id: Id, rooms: Room, owner: Owner) -> Video:
    """Stops it within a denoising step; one that has ended stays as it is."""
    found(rooms, video_id, owner)
    rooms.jobs.cancel(video_id)
    return shown(rooms, found(rooms, video_id, owner))


@router.delete("/{video_id}")
def delete(video_id: Id, rooms: Room, owner: Owner) -> VideoDeleted:
    """Forgets it, and stops it where it is not completed; the clip's bytes go with the next sweep."""
    if not rooms.records.remove_job(video_id, owner, "video"):
        raise not_found("video", video_id)
    rooms.jobs.cancel(video_id)
    return VideoDeleted(id=video_id)


@router.get("/{video_id}/content", response_class=Response)
def content(video_id: Id, request: Request, rooms: Room, owner: Owner, variant: Variant = "video") -> Response:
    """The clip (mp4), or a picture of its middle (webp) or of all its course (jpeg); in ranges, if asked."""
    status = found(rooms, video_id, owner)
    return held(rooms, status, request, variant)


def held(rooms: Rooms, status: JobStatus, request: Request, variant: str = "") -> Response:
    """What a job has drawn, or a picture of it, under a file name of our own."""
    if status.result is None:
        raise WireError(400, f"id: there is nothing to download, as it is {status.state}", "id", "not_ready")
    if variant in ("thumbnail", "spritesheet"):
        assert rooms.pictured, "the wiring gives a service its way to make pictures"
        data, suffix = rooms.pictured(status.result, variant)
        response = ranged(request, data, f"{status.result.key.partition('.')[0]}-{variant}.{suffix}")
    else:
        suffix = status.result.key.rpartition(".")[2]
        response = ranged(request, rooms.store.get(status.result.key), status.result.key)
    response.headers["Content-Disposition"] = f'inline; filename="{status.id}.{suffix}"'
    response.headers["Cache-Control"] = "private, max-age=3600"
    return response
