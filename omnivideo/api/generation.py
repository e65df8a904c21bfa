"""Build the jobs of a request: what to generate, at which size and length, from which source, and under which id."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from omnivideo.api.dependencies import ServiceContext
from omnivideo.api.errors import APIError, build_key_reused_error
from omnivideo.api.media import MediaReference, resolve_source
from omnivideo.api.request_body import CleanText, digest_request, rename_error_field, validate_fields
from omnivideo.contracts import (
    Artifact,
    Job,
    JobStatus,
    Lane,
    SamplingParams,
    check_prompt,
    get_editing_task,
    get_generation_task,
    resolve_sampling_params,
)
from omnivideo.errors import InvalidInput
from omnivideo.presets import Preset, Task, get_preset

SIZE_PATTERN = re.compile(r"(\d{1,5})x(\d{1,5})")
# Our names of settings -> the names that OpenAI's clients use.
REQUEST_FIELD_NAMES = {"width": "size", "height": "size", "frames": "num_frames", "steps": "num_inference_steps"}


def get_constraints(field: str) -> list[Any]:
    """Return the bounds of a setting, which contracts.SamplingParams defines."""
    return SamplingParams.model_fields[field].metadata


class GenerationRequest(BaseModel):
    """The fields that requests for images and clips share. A size is WIDTHxHEIGHT in pixels, both multiples of 16."""

    prompt: CleanText = Field(min_length=1, max_length=4000)
    model: CleanText | None = None
    size: str | None = Field(default=None, pattern=r"^(\d{1,5}x\d{1,5}|auto)$")
    num_inference_steps: Annotated[int | None, *get_constraints("steps")] = None
    guidance_scale: Annotated[float | None, *get_constraints("guidance_scale")] = None
    flow_shift: Annotated[float | None, *get_constraints("flow_shift")] = None
    seed: Annotated[int | None, *get_constraints("seed")] = None
    negative_prompt: Annotated[CleanText | None, *get_constraints("negative_prompt")] = None


class VideoRequest(GenerationRequest):
    """A clip has `num_frames` frames (4k + 1), or the number of that form nearest to `seconds` at `fps`."""

    seconds: float | None = Field(default=None, gt=0, le=3600, allow_inf_nan=False)
    num_frames: Annotated[int | None, *get_constraints("frames")] = None
    fps: Annotated[int | None, *get_constraints("fps")] = None
    input_reference: MediaReference | None = None


class VideoEditRequest(VideoRequest):
    video: MediaReference


class ImageRequest(GenerationRequest):
    n: int = Field(default=1, ge=1, le=8)
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png"] | None = None
    stream: Literal[False] | None = None
    mask: None = None


def wrap_in_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


class ImageEditRequest(ImageRequest):
    image: Annotated[list[MediaReference], BeforeValidator(wrap_in_list)] = Field(min_length=1, max_length=1)


@dataclass(frozen=True)
class JobRequest:
    """A job to submit. `meta` is stored with it: the size and length to report, and a digest of the request."""

    job: Job
    kind: Literal["video", "image"]
    meta: dict[str, str]


# ---------------------------------------------------------------- clips


def build_video_job(context: ServiceContext, owner: str, fields: Mapping[str, Any], job_id: str) -> JobRequest:
    """Build the job of a clip; with an `input_reference`, it edits the reference as the prompt says.

    The model has no first-frame mode: an image is edited as a still clip, which the prompt may set in motion.
    """
    request = validate_fields(VideoRequest, fields)
    source = None
    if request.input_reference is not None:
        source = resolve_source(context, owner, request.input_reference, "input_reference")
    task = get_generation_task("video") if source is None else get_editing_task("video")
    return build_clip_job(context, request, task, job_id, source)


def build_video_edit_job(context: ServiceContext, owner: str, fields: Mapping[str, Any], job_id: str) -> JobRequest:
    """Build the job that edits `video`. A video that was generated here keeps its size, length and frame rate."""
    request = validate_fields(VideoEditRequest, fields)
    source = resolve_source(context, owner, request.video, "video")
    edit_request = inherit_source_format(request, source) if request.video.id else request
    return build_clip_job(context, edit_request, get_editing_task("video"), job_id, source)


def build_remix_job(context: ServiceContext, fields: Mapping[str, Any], job_id: str, original: JobStatus) -> JobRequest:
    """Build the job that edits a completed video and keeps its size, length and frame rate."""
    request = validate_fields(VideoRequest, fields)
    source = original.result
    if source is None:
        raise InvalidInput("id", "that video is not completed")
    remix_request = inherit_source_format(request, source)
    task = get_editing_task("video")
    return build_clip_job(context, remix_request, task, job_id, source, remixed_from=original.id)


def inherit_source_format(request: VideoRequest, source: Artifact) -> VideoRequest:
    """Return the request with the source's size, frame rate and length where it gives none."""
    updates: dict[str, Any] = {
        "size": request.size or f"{source.width}x{source.height}",
        "fps": request.fps or round(source.fps),
    }
    if request.seconds is None:
        updates["num_frames"] = request.num_frames or source.frames
    return request.model_copy(update=updates)


def build_clip_job(
    context: ServiceContext, request: VideoRequest, task: Task, job_id: str, source: Artifact | None, **meta: str
) -> JobRequest:
    preset = require_served_preset(context, request.model)
    overrides = overrides_from_request(request, fps=request.fps, frames=resolve_num_frames(preset, task, request))
    params = resolve_request_params(preset, task, overrides, resolve_seed(request, job_id))
    seconds = params.frames / params.fps if request.seconds is None else request.seconds
    meta = {"size": f"{params.width}x{params.height}", "seconds": f"{seconds:.6g}"} | meta
    return build_job_request(request, params, job_id, source, "video", meta)


def resolve_num_frames(preset: Preset, task: Task, request: VideoRequest) -> int | None:
    """Return the clip's number of frames, or None for the preset's default."""
    if request.seconds is None:
        return request.num_frames
    fps = request.fps or preset.sampling[task].fps
    frames = 4 * round((request.seconds * fps - 1) / 4) + 1
    if request.num_frames not in (None, frames):
        text = f"{request.seconds:g} s at {fps} fps are {frames} frames, which is not num_frames; give only one of them"
        raise InvalidInput("seconds", text)
    max_frames = next(bound.le for bound in get_constraints("frames") if hasattr(bound, "le"))
    if not 5 <= frames <= max_frames:
        text = f"{request.seconds:g} s at {fps} fps are {max(0, frames)} frames"
        allowed = f"5 to {max_frames} frames, which are {5 / fps:.2g} to {max_frames / fps:.3g} s"
        raise InvalidInput("seconds", f"{text}; allowed: {allowed}")
    return frames


# ---------------------------------------------------------------- images


def build_image_jobs(context: ServiceContext, owner: str, fields: Mapping[str, Any], base_id: str) -> list[JobRequest]:
    """Build one job for each of `n` images, with consecutive seeds."""
    request = validate_fields(ImageRequest, fields)
    return build_jobs_per_image(context, request, get_generation_task("image"), base_id, None)


def build_image_edit_jobs(
    context: ServiceContext, owner: str, fields: Mapping[str, Any], base_id: str
) -> list[JobRequest]:
    request = validate_fields(ImageEditRequest, fields)
    source = resolve_source(context, owner, request.image[0], "image")
    if source.medium != "image":
        raise InvalidInput("image", "it is a clip; use /v1/videos/edits")
    return build_jobs_per_image(context, request, get_editing_task("image"), base_id, source)


def build_jobs_per_image(
    context: ServiceContext, request: ImageRequest, task: Task, base_id: str, source: Artifact | None
) -> list[JobRequest]:
    preset = require_served_preset(context, request.model)
    overrides, seed = overrides_from_request(request), resolve_seed(request, base_id)
    job_requests = []
    for index, job_id in enumerate(make_image_ids(base_id, request.n)):
        params = resolve_request_params(preset, task, overrides, (seed + index) % 2**63)
        meta = {"size": f"{params.width}x{params.height}"}
        job_requests.append(build_job_request(request, params, job_id, source, "image", meta))
    return job_requests


def make_image_ids(base_id: str, n: int) -> list[str]:
    return [f"{base_id}_{index}" for index in range(n)]


# ---------------------------------------------------------------- jobs


def require_served_preset(context: ServiceContext, name: str | None) -> Preset:
    served_preset = context.settings.preset
    if name not in (None, served_preset):
        raise InvalidInput("model", f"there is no {str(name)[:100]!r} here; allowed: {served_preset}")
    return get_preset(served_preset)


def resolve_seed(request: GenerationRequest, job_id: str) -> int:
    """Return the request's seed, or one derived from the job's id, so that a repeated request is the same job."""
    derived_seed = int.from_bytes(hashlib.sha256(job_id.encode()).digest()[:4])
    return derived_seed if request.seed is None else request.seed


def overrides_from_request(
    request: GenerationRequest, fps: int | None = None, frames: int | None = None
) -> dict[str, int | float | str | None]:
    size = SIZE_PATTERN.fullmatch(request.size or "")
    width, height = map(int, size.groups()) if size else (None, None)
    return {
        "width": width, "height": height, "frames": frames, "fps": fps, "steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale, "flow_shift": request.flow_shift,
        "negative_prompt": request.negative_prompt,
    }  # fmt: skip


def resolve_request_params(
    preset: Preset, task: Task, overrides: Mapping[str, int | float | str | None], seed: int
) -> SamplingParams:
    """Return the job's settings; raise an InvalidInput that names the request's field if one is invalid."""
    try:
        return resolve_sampling_params(preset, task, seed=seed, **overrides)
    except InvalidInput as error:
        raise rename_error_field(error, REQUEST_FIELD_NAMES.get(error.field, error.field)) from None


def build_job_request(
    request: GenerationRequest,
    params: SamplingParams,
    job_id: str,
    source: Artifact | None,
    kind: Literal["video", "image"],
    meta: dict[str, str],
) -> JobRequest:
    job = Job(
        id=job_id,
        prompt=check_prompt("prompt", request.prompt),
        visual_tokens=None,
        source=source,
        params=params,
    )
    n = request.n if isinstance(request, ImageRequest) else 1
    digest = digest_request(kind, job.model_dump(exclude={"id": True, "params": {"seed"}}), request.seed, n, meta)
    return JobRequest(job, kind, meta | {"request": digest})


def submit_job(context: ServiceContext, owner: str, job_request: JobRequest, lane: Lane = "interactive") -> JobStatus:
    """Submit the job and return its status. A job that was submitted before is not changed.

    Raises ServiceBusy, and APIError if the id comes from an idempotency key that was used for a different request.
    """
    job = job_request.job
    try:
        new_status = context.jobs.submit(job, owner, lane, job_request.kind, job_request.meta)
    except InvalidInput:
        raise build_key_reused_error() from None
    if new_status is not None:
        context.notify_workers()
        return new_status
    status = context.jobs.get_owned_job(job.id, owner, job_request.kind)
    if status is None:
        message = "Idempotency-Key: the job of its first request was deleted; use a new one"
        raise APIError(404, message, "Idempotency-Key")
    # Jobs of version 0.1 have no digest; `submit` has compared their content.
    if status.meta.get("request", job_request.meta["request"]) != job_request.meta["request"]:
        raise build_key_reused_error()
    return status
