"""Images: asked for and waited for in one request, as OpenAI's clients speak of them."""

import base64
from collections.abc import Callable, Mapping
from typing import Any, Literal

import anyio
from anyio.to_thread import run_sync
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from omnivideo.api.drawing import (
    ImageAsked,
    ImageEditAsked,
    Order,
    image_edit_orders,
    image_orders,
    submitted,
    trouble,
)
from omnivideo.api.errors import REFUSALS, not_found
from omnivideo.api.forms import Fields, Id, Key, documented, name_for
from omnivideo.api.rooms import Owner, Room, Rooms
from omnivideo.api.videos import held
from omnivideo.contracts import Artifact, JobStatus

router = APIRouter(prefix="/v1/images", tags=["images"], responses=REFUSALS)
LOOK = 0.05  # seconds between two looks at the jobs
LINK = 3600  # seconds that a link to the store is good for
GONE = 499  # what others write into their logs for a client that did not wait
Take = Callable[[Rooms, str, Mapping[str, Any], str], list[Order]]


class Image(BaseModel):
    b64_json: str | None = None
    url: str | None = None


class Images(BaseModel):
    created: int
    data: list[Image]
    output_format: Literal["png"] = "png"
    size: str


@router.post("/generations", response_model=Images, openapi_extra=documented(ImageAsked))
async def generate(request: Request, rooms: Room, owner: Owner, fields: Fields, key: Key = None) -> Response:
    """`n` images of the prompt, with seeds that follow each other; a client that goes away stops them."""
    return await made(request, rooms, owner, fields, name_for("image", owner, key), image_orders)


@router.post("/edits", response_model=Images, openapi_extra=documented(ImageEditAsked, "image"))
async def edit(request: Request, rooms: Room, owner: Owner, fields: Fields, key: Key = None) -> Response:
    """The image, changed as the prompt says."""
    return await made(request, rooms, owner, fields, name_for("image", owner, key), image_edit_orders)


@router.get("/{image_id}/content", response_class=Response)
def content(image_id: Id, request: Request, rooms: Room, owner: Owner) -> Response:
    """An image that was asked for as a URL."""
    status: JobStatus | None = rooms.records.job(image_id, owner, "image")
    if status is None:
        raise not_found("image", image_id)
    return held(rooms, status, request)


async def made(
    request: Request, rooms: Rooms, owner: str, fields: Mapping[str, Any], name: str, take: Take
) -> Response:  # fmt: skip
    ids = await run_sync(ordered, rooms, owner, fields, name, take)
    ended = await waited(request, rooms, ids)
    if ended is None:
        return Response(status_code=GONE)
    inline = fields.get("response_format") != "url"
    shown = await run_sync(answer, rooms, ended, inline, str(request.base_url))
    return JSONResponse(shown.model_dump(exclude_none=True))


def ordered(rooms: Rooms, owner: str, fields: Mapping[str, Any], name: str, take: Take) -> list[str]:
    """The ids of the jobs: all of them, or none where one finds no room."""
    ids: list[str] = []
    try:
        for order in take(rooms, owner, fields, name):
            ids.append(submitted(rooms, owner, order).id)
    except Exception:
        stop(rooms, ids)
        raise
    return ids


def stop(rooms: Rooms, ids: list[str]) -> None:
    for job_id in ids:
        rooms.jobs.cancel(job_id)


async def waited(request: Request, rooms: Rooms, ids: list[str]) -> list[JobStatus] | None:
    """The jobs in order, once all are done; None where the client has gone.  Raises what ended one of them."""
    while True:
        known = {status.id: status for status in await run_sync(rooms.jobs.statuses, ids)}
        statuses = [known[job_id] for job_id in ids]
        failed = next((status for status in statuses if status.state in ("failed", "cancelled")), None)
        if failed is not None:
            await run_sync(stop, rooms, ids)
            raise trouble(failed)
        if all(status.state == "done" for status in statuses):
            return statuses
        if await request.is_disconnected():
            await run_sync(stop, rooms, ids)
            return None
        await anyio.sleep(LOOK)


def answer(rooms: Rooms, statuses: list[JobStatus], inline: bool, base: str) -> Images:
    data = [image(rooms, status, inline, base) for status in statuses]
    return Images(created=int(statuses[0].made), data=data, size=statuses[0].meta["size"])


def image(rooms: Rooms, status: JobStatus, inline: bool, base: str) -> Image:
    """Its bytes, or where it is: in the store, if that gives links, else here, with the key that asked for it."""
    artifact: Artifact | None = status.result
    assert artifact is not None
    if inline:
        return Image(b64_json=base64.b64encode(rooms.store.get(artifact.key)).decode())
    if base and (signed := getattr(rooms.store, "signed", None)):
        return Image(url=signed(artifact.key, LINK))
    return Image(url=f"{base or '/'}v1/images/{status.id}/content")
