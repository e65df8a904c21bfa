"""From the wire's words to jobs: what to draw, at which size and length, from what, under which name."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from omnivideo.api.errors import WireError
from omnivideo.api.forms import Reference, Text, digest_of, renamed, reused, source_of, validated
from omnivideo.api.rooms import Rooms
from omnivideo.contracts import Artifact, Given, Job, JobStatus, Lane, Settings, check_prompt, settings
from omnivideo.errors import InvalidInput, JobCancelled, JobFailed
from omnivideo.presets import Preset, Task, preset

SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
WIRE = {"width": "size", "height": "size", "frames": "num_frames", "steps": "num_inference_steps"}


def like(name: str) -> list[Any]:
    """The bounds that a setting has: they stand in contracts.Settings."""
    return Settings.model_fields[name].metadata


class Asked(BaseModel):
    """What an image and a clip have in common.  A size is WIDTHxHEIGHT, both multiples of 16."""

    prompt: Text = Field(min_length=1, max_length=4000)
    model: Text | None = None
    size: str | None = Field(default=None, pattern=r"^(\d{1,5}x\d{1,5}|auto)$")
    num_inference_steps: Annotated[int | None, *like("steps")] = None
    guidance_scale: Annotated[float | None, *like("guidance_scale")] = None
    flow_shift: Annotated[float | None, *like("flow_shift")] = None
    seed: Annotated[int | None, *like("seed")] = None
    negative_prompt: Annotated[Text | None, *like("negative_prompt")] = None


class VideoAsked(Asked):
    """A clip's length is `num_frames` (4k + 1), or the next such number to `seconds` at `fps`."""

    seconds: float | None = Field(default=None, gt=0, le=3600, allow_inf_nan=False)
    num_frames: Annotated[int | None, *like("frames")] = None
    fps: Annotated[int | None, *like("fps")] = None
    input_reference: Reference | None = None


class EditAsked(VideoAsked):
    video: Reference


class ImageAsked(Asked):
    n: int = Field(default=1, ge=1, le=8)
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png"] | None = None
    stream: Literal[False] | None = None
    mask: None = None


def as_list(given: Any) -> Any:
    return given if isinstance(given, list) else [given]


class ImageEditAsked(ImageAsked):
    image: Annotated[list[Reference], BeforeValidator(as_list)] = Field(min_length=1, max_length=1)


@dataclass(frozen=True)
class Order:
    """A job as it is submitted; `meta` is what the wire tells of it besides."""

    job: Job
    kind: Literal["video", "image"]
    meta: dict[str, str]


# ---------------------------------------------------------------- clips


def video_order(rooms: Rooms, owner: str, fields: Mapping[str, Any], name: str) -> Order:
    """A clip of the prompt; with an `input_reference`, the reference changed as the prompt says.

    The model edits: it has no first-frame mode.  A clip as a reference is edited as a clip; an image is taken as a
    still clip, which the prompt may set in motion.
    """
    asked = validated(VideoAsked, fields)
    source = None
    if asked.input_reference is not None:
        source = source_of(rooms, owner, asked.input_reference, "input_reference")
    task: Task = "text-to-video" if source is None else "video-editing"
    return clip(rooms, asked, task, name, source, {})


def edit_order(rooms: Rooms, owner: str, fields: Mapping[str, Any], name: str) -> Order:
    """The `video`, changed as the prompt says; one that was drawn here keeps its size, length and rate."""
    asked = validated(EditAsked, fields)
    source = source_of(rooms, owner, asked.video, "video")
    return clip(rooms, as_it_was(asked, source) if asked.video.id else asked, "video-editing", name, source, {})


def remix_order(rooms: Rooms, fields: Mapping[str, Any], name: str, original: JobStatus) -> Order:
    """A completed video, changed as the prompt says."""
    asked = validated(VideoAsked, fields)
    if original.result is None:
        raise InvalidInput("id", "that video is not completed")
    more = {"remixed_from": original.id}
    return clip(rooms, as_it_was(asked, original.result), "video-editing", name, original.result, more)


def as_it_was(asked: VideoAsked, source: Artifact) -> VideoAsked:
    kept: dict[str, Any] = {
        "size": asked.size or f"{source.width}x{source.height}",
        "fps": asked.fps or round(source.fps),
    }
    if asked.seconds is None:
        kept["num_frames"] = asked.num_frames or source.frames
    return asked.model_copy(update=kept)


def clip(
    rooms: Rooms, asked: VideoAsked, task: Task, name: str, source: Artifact | None, more: dict[str, str]
) -> Order:
    model = known(rooms, asked.model)
    given = given_of(asked, fps=asked.fps, frames=frames_of(model, task, asked))
    made = checked(model, task, given, seed_of(asked, name))
    seconds = made.frames / made.fps if asked.seconds is None else asked.seconds
    meta = {"size": f"{made.width}x{made.height}", "seconds": f"{seconds:.6g}"} | more
    return order(asked, made, given, name, source, "video", meta)


def frames_of(model: Preset, task: Task, asked: VideoAsked) -> int | None:
    """The clip's number of frames, None for the preset's."""
    if asked.seconds is None:
        return asked.num_frames
    fps = asked.fps or model.sampling[task].fps
    frames = 4 * round((asked.seconds * fps - 1) / 4) + 1
    if asked.num_frames not in (None, frames):
        text = f"{asked.seconds:g} s at {fps} fps are {frames} frames and not num_frames; give one of the two"
        raise InvalidInput("seconds", text)
    most = next(bound.le for bound in like("frames") if hasattr(bound, "le"))
    if not 5 <= frames <= most:
        text = f"{asked.seconds:g} s at {fps} fps are {max(0, frames)} frames"
        raise InvalidInput("seconds", f"{text}; allowed: 5 to {most}, so {5 / fps:.2g} to {most / fps:.3g} s")
    return frames


# ---------------------------------------------------------------- images


def image_orders(rooms: Rooms, owner: str, fields: Mapping[str, Any], name: str) -> list[Order]:
    """One job for each of `n` images, with seeds that follow each other."""
    return pictures(rooms, validated(ImageAsked, fields), "text-to-image", name, None)


def image_edit_orders(rooms: Rooms, owner: str, fields: Mapping[str, Any], name: str) -> list[Order]:
    asked = validated(ImageEditAsked, fields)
    source = source_of(rooms, owner, asked.image[0], "image")
    if source.medium != "image":
        raise InvalidInput("image", "it is a clip; use /v1/videos/edits")
    return pictures(rooms, asked, "image-editing", name, source)


def pictures(rooms: Rooms, asked: ImageAsked, task: Task, name: str, source: Artifact | None) -> list[Order]:
    model, given, seed = known(rooms, asked.model), given_of(asked), seed_of(asked, name)
    orders = []
    for at, part in enumerate(image_names(name, asked.n)):
        made = checked(model, task, given, (seed + at) % 2**63)
        orders.append(order(asked, made, given, part, source, "image", {"size": f"{made.width}x{made.height}"}))
    return orders


def image_names(name: str, n: int) -> list[str]:
    return [f"{name}_{at}" for at in range(n)]


# ---------------------------------------------------------------- jobs


def known(rooms: Rooms, name: str | None) -> Preset:
    served = rooms.settings.preset
    if name not in (None, served):
        raise InvalidInput("model", f"there is no {str(name)[:100]!r} here; allowed: {served}")
    return preset(served)


def seed_of(asked: Asked, name: str) -> int:
    """Chance where none is given, and yet the same for the same name: a repeated request asks for the same job."""
    drawn = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
    return drawn if asked.seed is None else asked.seed


def given_of(asked: Asked, **more: Any) -> Given:
    size = SIZE.fullmatch(asked.size or "")
    width, height = map(int, size.groups()) if size else (None, None)
    return Given(
        width=width, height=height, steps=asked.num_inference_steps, guidance_scale=asked.guidance_scale,
        flow_shift=asked.flow_shift, negative_prompt=asked.negative_prompt, **more,
    )  # fmt: skip


def checked(model: Preset, task: Task, given: Given, seed: int) -> Settings:
    """The job's settings; raises InvalidInput in the wire's words for what this model cannot draw."""
    try:
        return settings(model, task, seed=seed, **given.model_dump())
    except InvalidInput as error:
        raise renamed(error, WIRE.get(error.field, error.field)) from None


def order(
    asked: Asked, made: Settings, given: Given, name: str, source: Artifact | None, kind: Literal["video", "image"],
    meta: dict[str, str],
) -> Order:  # fmt: skip
    job = Job(
        id=name, task=made.task, prompt=check_prompt("prompt", asked.prompt), visual_tokens=None, source=source,
        seed=made.seed, given=given,
    )  # fmt: skip
    n = getattr(asked, "n", 1)
    return Order(
        job, kind, meta | {"request": digest_of(kind, job.model_dump(exclude={"id", "seed"}), asked.seed, n, meta)}
    )


def submitted(rooms: Rooms, owner: str, wanted: Order, lane: Lane = "interactive") -> JobStatus:
    """The job as it stands; an id that is known is the same job, whoever asks at the same time.

    Raises WireError where the id was made from a key that came with another request, and Busy.
    """
    try:
        status: JobStatus | None = rooms.jobs.submit(wanted.job, owner, lane, wanted.kind, wanted.meta)
    except InvalidInput:
        raise reused() from None
    if status is not None:
        rooms.tell()
        return status
    status = rooms.records.job(wanted.job.id, owner, wanted.kind)
    if status is None:
        raise WireError(404, "Idempotency-Key: what it stands for was deleted; give a new one", "Idempotency-Key")
    if status.meta.get("request") != wanted.meta["request"]:
        raise reused()
    return status


def trouble(status: JobStatus) -> Exception:
    """Why a job that has ended has no result, in words that the wire knows."""
    if status.state == "cancelled":
        return JobCancelled("it was cancelled")
    if status.code == "invalid_input":
        field, _, text = (status.error or "").partition(": ")
        return InvalidInput(field, text)
    return JobFailed(status.code or "internal", status.error or "it could not be drawn")
