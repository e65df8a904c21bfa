"""Build the jobs of a request: what to generate, at which size and length, from which source, and under which id."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from omnivideo.api.dependencies import ServiceContext
from omnivideo.api.generation_requests import (
    ClipRequest,
    GenerationRequest,
    ImageEditRequest,
    ImageRequest,
    VideoEditRequest,
    VideoExtensionRequest,
    VideoRequest,
)
from omnivideo.api.media import EXPIRED_MESSAGE, MediaReference, has_expired, resolve_source
from omnivideo.api.request_body import rename_error_field
from omnivideo.contracts import (
    Artifact,
    Job,
    JobStatus,
    Lane,
    SamplingParams,
    get_editing_task,
    get_generation_task,
    get_source_length,
    resolve_sampling_params,
)
from omnivideo.errors import InvalidInput
from omnivideo.media.masks import read_mask
from omnivideo.presets import Preset, Task, get_animation_task, get_preset, get_sampling_defaults
from omnivideo.presets.shapes import SourceLength

SIZE_PATTERN = re.compile(r"(\d{1,5})x(\d{1,5})")
# Our names of settings -> the names that OpenAI's clients use.
REQUEST_FIELD_NAMES = {"frames": "num_frames", "steps": "num_inference_steps"}


@dataclass(frozen=True)
class JobRequest:
    """A job to submit. `meta` is stored with it: the size and length to report."""

    job: Job
    kind: Literal["video", "image"]
    meta: dict[str, str]


# ---------------------------------------------------------------- clips


def build_video_job(context: ServiceContext, owner: str, request: VideoRequest, job_id: str) -> JobRequest:
    """Build the job of a clip; with an `input_reference`, it begins with the picture, or edits the reference."""
    check_texts(context, request)
    source, field, last_frame = None, "", None
    if (named_reference := request.get_reference()) is not None:
        field, reference = named_reference
        source = resolve_source(context, owner, reference, field)
    task = choose_video_task(require_served_preset(context, request.model), request, source)
    if request.last_image is not None:
        last_frame = resolve_source(context, owner, request.last_image, "last_image")
        if last_frame.medium != "image":
            raise InvalidInput("last_image", "it is a clip; send a picture")
    return build_clip_job(context, request, task, job_id, source, field, last_frame)


def choose_video_task(preset: Preset, request: VideoRequest, source: Artifact | None) -> Task:
    """Return the task of a request with or without a reference. Raises InvalidInput for fields that do not fit it."""
    if request.last_image is not None:
        get_sampling_defaults(preset, "keyframes-to-video", "last_image")
        if source is None or source.medium != "image" or request.task == "video-editing":
            raise InvalidInput("last_image", "a clip that ends with it begins with a picture; send an input_reference")
        return "keyframes-to-video"
    if source is None or source.medium == "video":
        if request.task == "image-to-video":
            raise InvalidInput("task", "there is no picture to animate; send one as input_reference")
        return get_generation_task("video") if source is None else get_editing_task("video")
    if request.task == "image-to-video":
        return get_animation_task(preset)
    return "image-to-video" if request.task is None and "image-to-video" in preset.sampling else "video-editing"


def build_video_extension_job(
    context: ServiceContext, owner: str, request: VideoExtensionRequest, job_id: str
) -> JobRequest:
    """Build the job that continues `video`, whose size and frame rate it keeps."""
    check_texts(context, request)
    source = resolve_source(context, owner, request.video, "video")
    if source.medium != "video":
        raise InvalidInput("video", "it is a picture; send it to /v1/videos as input_reference")
    width, height = source.width - source.width % 2, source.height - source.height % 2
    if resolve_size(request) not in ((None, None), (width, height)):
        field = "size" if request.width is None and request.height is None else "width"
        raise InvalidInput(field, f"an extended clip keeps the size of its source, {width}x{height}; leave it out")
    sized_request = request.model_copy(update={"size": f"{width}x{height}", "width": None, "height": None})
    return build_clip_job(context, sized_request, "video-extension", job_id, source, "video")


def build_video_edit_job(context: ServiceContext, owner: str, request: VideoEditRequest, job_id: str) -> JobRequest:
    """Build the job that edits `video`, whose length it keeps. A video that was generated here also keeps its size."""
    check_texts(context, request)
    source = resolve_source(context, owner, request.video, "video")
    edit_request = inherit_source_size(request, source) if request.video.id else request
    return build_clip_job(context, edit_request, get_editing_task("video"), job_id, source, "video")


def build_remix_job(context: ServiceContext, request: ClipRequest, job_id: str, original: JobStatus) -> JobRequest:
    """Build the job that edits a completed video and keeps its size, length and frame rate."""
    source = original.result
    if source is None:
        raise InvalidInput("id", "that video is not completed")
    if has_expired(context, original):
        raise InvalidInput("id", EXPIRED_MESSAGE)
    remix_request = inherit_source_size(request, source)
    task = get_editing_task("video")
    return build_clip_job(context, remix_request, task, job_id, source, "id", remixed_from=original.id)


def make_video_ids(base_id: str, n: int) -> list[str]:
    return [base_id, *(f"{base_id}_{index}" for index in range(1, n))]


def repeat_video_job(job_request: JobRequest, n: int) -> list[JobRequest]:
    """Return the jobs of `n` videos with consecutive seeds; the first one names the others."""
    job, ids = job_request.job, make_video_ids(job_request.job.id, n)
    repeated = []
    for index, job_id in enumerate(ids):
        params = job.params.model_copy(update={"seed": (job.params.seed + index) % 2**63})
        meta = job_request.meta | ({"n": str(n)} if n > 1 and index == 0 else {})
        repeated.append(replace(job_request, job=job.model_copy(update={"id": job_id, "params": params}), meta=meta))
    return repeated


def build_video_jobs(context: ServiceContext, owner: str, request: VideoRequest, base_id: str) -> list[JobRequest]:
    """Build the jobs of `n` clips."""
    return repeat_video_job(build_video_job(context, owner, request, base_id), request.n)


def inherit_source_size(request: ClipRequest, source: Artifact) -> ClipRequest:
    """Return the request with the source's size where it gives none."""
    if request.width or request.height or request.size not in (None, "auto"):
        return request
    return request.model_copy(update={"size": f"{source.width}x{source.height}"})


def build_clip_job(
    context: ServiceContext,
    request: ClipRequest,
    task: Task,
    job_id: str,
    source: Artifact | None,
    source_field: str,
    last_frame: Artifact | None = None,
    **meta: str,
) -> JobRequest:
    """Build the job of a clip; `source_field` is the request's name for its source."""
    preset = require_served_preset(context, request.model)
    overrides = overrides_from_request(request) | {
        "seconds": request.seconds, "frames": request.num_frames, "fps": request.fps
    }  # fmt: skip
    length, seed = get_source_length(preset, task, source), resolve_seed(request, job_id)
    names = REQUEST_FIELD_NAMES | {"source": source_field}
    params = resolve_request_params(preset, task, overrides, seed, request, length, names)
    is_requested_length = request.seconds is not None and params.new_frames is None
    seconds = request.seconds if is_requested_length else params.delivered_shape.frames / params.fps
    meta = {"size": describe_size(params), "seconds": f"{seconds:.6g}"} | meta
    job_request = build_job_request(context, request, preset, params, job_id, source, "video", meta)
    return replace(job_request, job=job_request.job.model_copy(update={"last_frame": last_frame}))


def describe_size(params: SamplingParams) -> str:
    return f"{params.delivered_shape.width}x{params.delivered_shape.height}"


# ---------------------------------------------------------------- images


def build_image_jobs(context: ServiceContext, owner: str, request: ImageRequest, base_id: str) -> list[JobRequest]:
    """Build one job for each of `n` images, with consecutive seeds."""
    return build_jobs_per_image(context, request, get_generation_task("image"), base_id, None)


def build_image_edit_jobs(
    context: ServiceContext, owner: str, request: ImageEditRequest, base_id: str
) -> list[JobRequest]:
    check_texts(context, request)
    field, reference = request.get_source()
    source = resolve_source(context, owner, reference, field)
    if source.medium != "image":
        raise InvalidInput(field, "it is a clip; use /v1/videos/edits")
    mask = None
    if request.mask is not None:
        mask = store_mask(context, owner, request.mask, source)
        request = apply_mask_rules(request, source)
    return build_jobs_per_image(context, request, get_editing_task("image"), base_id, source, mask)


def apply_mask_rules(request: ImageEditRequest, source: Artifact) -> ImageEditRequest:
    """Return the request with the source's size, which a mask requires. Raises InvalidInput for what loses pixels."""
    size = f"{source.width}x{source.height}"
    given = tuple(side or own for side, own in zip(resolve_size(request), (source.width, source.height), strict=True))
    if given != (source.width, source.height):
        raise InvalidInput("size" if request.size else "width", f"with a mask the result has the image's size, {size}")
    if request.output_format == "jpeg":
        raise InvalidInput("output_format", "a mask keeps pixels exactly, and a jpeg does not; allowed: png, webp")
    if request.output_compression not in (None, 100):
        raise InvalidInput("output_compression", "a mask keeps pixels exactly; allowed: 100")
    return request.model_copy(update={"size": size, "width": None, "height": None})


def store_mask(context: ServiceContext, owner: str, reference: MediaReference, source: Artifact) -> str:
    """Return the object key of a mask that fits the source."""
    mask = resolve_source(context, owner, reference, "mask")
    read_mask(context.store.get(mask.key), source.width, source.height)
    return mask.key


def build_jobs_per_image(
    context: ServiceContext,
    request: ImageRequest,
    task: Task,
    base_id: str,
    source: Artifact | None,
    mask: str | None = None,
) -> list[JobRequest]:
    request.check_compression()
    preset = require_served_preset(context, request.model)
    overrides, seed = overrides_from_request(request), resolve_seed(request, base_id)
    output: dict[str, str] = {"format": request.output_format or "png"}
    if request.output_compression is not None:
        output["compression"] = str(request.output_compression)
    job_requests = []
    for index, job_id in enumerate(make_image_ids(base_id, request.n)):
        params = resolve_request_params(preset, task, overrides, (seed + index) % 2**63, request)
        meta = output | {"size": describe_size(params)}
        job_request = build_job_request(context, request, preset, params, job_id, source, "image", meta)
        job_requests.append(replace(job_request, job=job_request.job.model_copy(update={"mask": mask})))
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


def overrides_from_request(request: GenerationRequest) -> dict[str, Any]:
    width, height = resolve_size(request)
    return {
        "width": width, "height": height, "steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale, "flow_shift": request.flow_shift,
        "negative_prompt": request.negative_prompt,
    }  # fmt: skip


def resolve_request_params(
    preset: Preset,
    task: Task,
    overrides: Mapping[str, Any],
    seed: int,
    request: GenerationRequest,
    source: SourceLength | None = None,
    field_names: Mapping[str, str] = REQUEST_FIELD_NAMES,
) -> SamplingParams:
    """Return the job's settings; raise an InvalidInput that names the request's field if one is invalid."""
    try:
        return resolve_sampling_params(preset, task, source, seed=seed, **overrides)
    except InvalidInput as error:
        if error.field in ("width", "height") and request.width is None and request.height is None:
            message = str(error).removeprefix(f"{error.field}: ")
            raise InvalidInput("size", f"its {error.field} is not possible; {message}") from None
        raise rename_error_field(error, field_names.get(error.field, error.field)) from None


def build_job_request(
    context: ServiceContext,
    request: GenerationRequest,
    preset: Preset,
    params: SamplingParams,
    job_id: str,
    source: Artifact | None,
    kind: Literal["video", "image"],
    meta: dict[str, str],
) -> JobRequest:
    check_texts(context, request, params)
    job = Job(
        id=job_id,
        prompt=request.prompt.strip(),
        visual_tokens=None,
        source=source,
        params=params,
        preset=preset.name,
    )
    return JobRequest(job, kind, meta)


def check_texts(context: ServiceContext, request: GenerationRequest, params: SamplingParams | None = None) -> None:
    """Raise InvalidInput if a text is too long. Without `params` this takes milliseconds, before media are read."""
    context.text_limits.check_prompt("prompt", request.prompt, params)
    context.text_limits.check_negative_prompt("negative_prompt", request.negative_prompt or "")


def submit_job(context: ServiceContext, owner: str, job_request: JobRequest, lane: Lane = "interactive") -> JobStatus:
    """Submit the job, whose id must be new, and return its status. Raises ServiceBusy."""
    status = context.jobs.submit(job_request.job, owner, lane, job_request.kind, job_request.meta)
    assert status is not None, "the id is new"
    context.notify_workers()
    return status


def submit_jobs(context: ServiceContext, owner: str, job_requests: list[JobRequest]) -> list[JobStatus]:
    """Submit all jobs of a request. If one is refused, cancel the others and raise its error."""
    statuses: list[JobStatus] = []
    try:
        for job_request in job_requests:
            statuses.append(submit_job(context, owner, job_request))
    except Exception:
        for status in statuses:
            context.jobs.cancel(status.id)
        raise
    return statuses


def find_live_job(context: ServiceContext, owner: str, kind: str, job_id: str) -> JobStatus | None:
    """Return the owner's job, or None if it does not exist, was cancelled or deleted, or has expired."""
    status = context.jobs.get_owned_job(job_id, owner, kind)
    if status is None or status.state == "cancelled" or has_expired(context, status):
        return None
    is_stopping = status.state in ("queued", "running") and status.cancel_requested
    return None if is_stopping else status
