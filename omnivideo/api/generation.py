"""Build the jobs of a request: what to generate, at which size and length, from which source, and under which id."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from omnivideo.api.dependencies import ServiceContext
from omnivideo.api.media import EXPIRED_MESSAGE, MediaReference, has_expired, resolve_source
from omnivideo.api.request_body import CleanText, Seed, Unsupported, rename_error_field
from omnivideo.contracts import (
    Artifact,
    Job,
    JobStatus,
    Lane,
    RequestModel,
    SamplingParams,
    check_prompt,
    get_editing_task,
    get_generation_task,
    resolve_sampling_params,
)
from omnivideo.errors import InvalidInput
from omnivideo.presets import Preset, Task, get_preset, get_sampling_defaults

SIZE_PATTERN = re.compile(r"(\d{1,5})x(\d{1,5})")
# Our names of settings -> the names that OpenAI's clients use.
REQUEST_FIELD_NAMES = {"width": "size", "height": "size", "frames": "num_frames", "steps": "num_inference_steps"}


def get_constraints(field: str) -> list[Any]:
    """Return the bounds of a setting, which contracts.SamplingParams defines."""
    return SamplingParams.model_fields[field].metadata


class GenerationRequest(RequestModel):
    """The fields that requests for images and clips share. A size is WIDTHxHEIGHT in pixels, both multiples of 16.

    `width` and `height` are the same size as two numbers.
    """

    prompt: CleanText = Field(min_length=1, max_length=4000)
    model: CleanText | None = None
    size: str | None = Field(
        default=None,
        pattern=r"^(\d{1,5}x\d{1,5}|auto)$",
        description="a width and a height in pixels, such as 640x384, or auto",
    )
    width: Annotated[int | None, *get_constraints("width")] = None
    height: Annotated[int | None, *get_constraints("height")] = None
    num_inference_steps: Annotated[int | None, *get_constraints("steps")] = None
    guidance_scale: Annotated[float | None, *get_constraints("guidance_scale")] = None
    flow_shift: Annotated[float | None, *get_constraints("flow_shift")] = None
    seed: Seed = None
    negative_prompt: Annotated[CleanText | None, *get_constraints("negative_prompt")] = None
    lora: Unsupported = None
    lora_path: Unsupported = None
    lora_scale: Unsupported = None
    guidance_scale_2: Unsupported = None
    true_cfg_scale: Unsupported = None
    strength: Unsupported = None


class VideoRequest(GenerationRequest):
    """A clip has `num_frames` frames (4k + 1), or the number of that form nearest to `seconds` at `fps`.

    `image_reference`, `video_reference` and `reference_url` are other servers' names of `input_reference`.
    """

    seconds: float | None = Field(default=None, gt=0, le=3600, allow_inf_nan=False)
    num_frames: Annotated[int | None, *get_constraints("frames")] = None
    fps: Annotated[int | None, *get_constraints("fps")] = None
    input_reference: MediaReference | None = None
    image_reference: MediaReference | None = None
    video_reference: MediaReference | None = None
    reference_url: CleanText | None = None
    n: int = Field(default=1, ge=1, le=1)
    last_image: Unsupported = None

    def get_reference(self) -> tuple[str, MediaReference] | None:
        """Return the reference and the name of its field, or None. Raises InvalidInput if there are several."""
        url_reference = None if self.reference_url is None else MediaReference(image_url=self.reference_url)
        references = {
            "input_reference": self.input_reference, "image_reference": self.image_reference,
            "video_reference": self.video_reference, "reference_url": url_reference,
        }  # fmt: skip
        given = [(field, reference) for field, reference in references.items() if reference is not None]
        if len(given) > 1:
            raise InvalidInput(given[1][0], f"{given[0][0]} is given too; give one of them")
        return given[0] if given else None


class VideoEditRequest(VideoRequest):
    video: MediaReference


class ImageRequest(GenerationRequest):
    n: int = Field(default=1, ge=1, le=8)
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png"] | None = None
    stream: Literal[False] | None = None
    background: Literal["auto", "opaque"] | None = None
    mask: Unsupported = None


def wrap_in_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


class ImageEditRequest(ImageRequest):
    image: Annotated[list[MediaReference], BeforeValidator(wrap_in_list)] = Field(min_length=1, max_length=1)


@dataclass(frozen=True)
class JobRequest:
    """A job to submit. `meta` is stored with it: the size and length to report."""

    job: Job
    kind: Literal["video", "image"]
    meta: dict[str, str]


# ---------------------------------------------------------------- clips


def build_video_job(context: ServiceContext, owner: str, request: VideoRequest, job_id: str) -> JobRequest:
    """Build the job of a clip; with an `input_reference`, it edits the reference as the prompt says.

    The model has no first-frame mode: an image is edited as a still clip, which the prompt may set in motion.
    """
    source = None
    if (named_reference := request.get_reference()) is not None:
        field, reference = named_reference
        source = resolve_source(context, owner, reference, field)
    task = get_generation_task("video") if source is None else get_editing_task("video")
    return build_clip_job(context, request, task, job_id, source)


def build_video_edit_job(context: ServiceContext, owner: str, request: VideoEditRequest, job_id: str) -> JobRequest:
    """Build the job that edits `video`. A video that was generated here keeps its size, length and frame rate."""
    source = resolve_source(context, owner, request.video, "video")
    edit_request = inherit_source_format(request, source) if request.video.id else request
    return build_clip_job(context, edit_request, get_editing_task("video"), job_id, source)


def build_remix_job(context: ServiceContext, request: VideoRequest, job_id: str, original: JobStatus) -> JobRequest:
    """Build the job that edits a completed video and keeps its size, length and frame rate."""
    source = original.result
    if source is None:
        raise InvalidInput("id", "that video is not completed")
    if has_expired(context, original):
        raise InvalidInput("id", EXPIRED_MESSAGE)
    remix_request = inherit_source_format(request, source)
    task = get_editing_task("video")
    return build_clip_job(context, remix_request, task, job_id, source, remixed_from=original.id)


def inherit_source_format(request: VideoRequest, source: Artifact) -> VideoRequest:
    """Return the request with the source's size, frame rate and length where it gives none."""
    updates: dict[str, Any] = {
        "size": request.size or (None if request.width or request.height else f"{source.width}x{source.height}"),
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
    params = resolve_request_params(preset, task, overrides, resolve_seed(request, job_id), request.width is None)
    seconds = params.frames / params.fps if request.seconds is None else request.seconds
    meta = {"size": f"{params.width}x{params.height}", "seconds": f"{seconds:.6g}"} | meta
    return build_job_request(request, preset, params, job_id, source, "video", meta)


def resolve_num_frames(preset: Preset, task: Task, request: VideoRequest) -> int | None:
    """Return the clip's number of frames, or None for the preset's default."""
    if request.seconds is None:
        return request.num_frames
    fps = request.fps or get_sampling_defaults(preset, task).fps
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


def build_image_jobs(context: ServiceContext, owner: str, request: ImageRequest, base_id: str) -> list[JobRequest]:
    """Build one job for each of `n` images, with consecutive seeds."""
    return build_jobs_per_image(context, request, get_generation_task("image"), base_id, None)


def build_image_edit_jobs(
    context: ServiceContext, owner: str, request: ImageEditRequest, base_id: str
) -> list[JobRequest]:
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
        params = resolve_request_params(preset, task, overrides, (seed + index) % 2**63, request.width is None)
        meta = {"size": f"{params.width}x{params.height}"}
        job_requests.append(build_job_request(request, preset, params, job_id, source, "image", meta))
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


def resolve_size(request: GenerationRequest) -> tuple[int | None, int | None]:
    """Return the requested width and height, from `size` or from `width` and `height`; refuse both if they differ."""
    size = SIZE_PATTERN.fullmatch(request.size or "")
    width, height = map(int, size.groups()) if size else (None, None)
    for field, given, from_size in (("width", request.width, width), ("height", request.height, height)):
        if size and given not in (None, from_size):
            raise InvalidInput(field, f"it is {given}, but size is {request.size}; give one of them")
    return (width, height) if size else (request.width, request.height)


def overrides_from_request(
    request: GenerationRequest, fps: int | None = None, frames: int | None = None
) -> dict[str, int | float | str | None]:
    width, height = resolve_size(request)
    return {
        "width": width, "height": height, "frames": frames, "fps": fps, "steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale, "flow_shift": request.flow_shift,
        "negative_prompt": request.negative_prompt,
    }  # fmt: skip


def resolve_request_params(
    preset: Preset, task: Task, overrides: Mapping[str, int | float | str | None], seed: int, has_size: bool
) -> SamplingParams:
    """Return the job's settings; raise an InvalidInput that names the request's field if one is invalid."""
    try:
        return resolve_sampling_params(preset, task, seed=seed, **overrides)
    except InvalidInput as error:
        if error.field in ("width", "height") and has_size:
            message = str(error).removeprefix(f"{error.field}: ")
            raise InvalidInput("size", f"its {error.field} is not possible; {message}") from None
        raise rename_error_field(error, REQUEST_FIELD_NAMES.get(error.field, error.field)) from None


def build_job_request(
    request: GenerationRequest,
    preset: Preset,
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
        preset=preset.name,
    )
    return JobRequest(job, kind, meta)


def submit_job(context: ServiceContext, owner: str, job_request: JobRequest, lane: Lane = "interactive") -> JobStatus:
    """Submit the job, whose id must be new, and return its status. Raises ServiceBusy."""
    status = context.jobs.submit(job_request.job, owner, lane, job_request.kind, job_request.meta)
    assert status is not None, "the id is new"
    context.notify_workers()
    return status


def find_live_job(context: ServiceContext, owner: str, kind: str, job_id: str) -> JobStatus | None:
    """Return the owner's job, or None if it does not exist, was cancelled or deleted, or has expired."""
    status = context.jobs.get_owned_job(job_id, owner, kind)
    if status is None or status.state == "cancelled" or has_expired(context, status):
        return None
    is_stopping = status.state in ("queued", "running") and status.cancel_requested
    return None if is_stopping else status
