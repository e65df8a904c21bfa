"""The frozen messages that cross packages, and the one place where a request's settings are resolved.

The messages of conversations are in omnivideo/turns.py, the records of files, batches and webhooks in
omnivideo/records.py, the manifests of results in omnivideo/manifests.py.
"""

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from omnivideo.errors import InvalidInput, TextTooLong
from omnivideo.presets import Preset, StandardTask, Task, get_sampling_defaults, shapes
from omnivideo.validation import check_characters, check_texts, describe_errors

MAX_SEED = 2**63 - 1


class FrozenModel(BaseModel):
    """A message without unknown fields, unless another version may have stored it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse_stored(cls, document: Mapping[str, Any] | bytes | str) -> Self:
        """Return a message from stored fields or JSON; those that a later version has added are left out.

        This also holds for the messages within it, and for what a later service sends to the SDK.
        """
        if isinstance(document, bytes | str):
            return cls.model_validate_json(document, extra="ignore")
        return cls.model_validate(document, extra="ignore")


class RequestModel(BaseModel):
    """What a client sends: null means that the field is absent."""

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}

    @field_validator("*", mode="after")
    @classmethod
    def check_field(cls, value: Any) -> Any:
        """Refuse characters that cannot be stored, in every field; nested requests check theirs."""
        return check_texts(value)


def build_omitted_field() -> Any:
    """Return a field that is None by default, and is left out of what is stored then, as before it existed."""
    return Field(default=None, exclude_if=lambda value: value is None)


class SamplingParams(FrozenModel):
    """The complete settings of one clip. Sizes are in px; the seed determines every byte of the result.

    `width`, `height` and `frames` are what is generated; `delivery` is what the file has, if that is something else.
    `seconds` is the requested time that the frame rate was chosen to fill, if it was. A continuation has
    `given_frames`, the first ones of its `frames`; an extension adds `new_frames` to its source, in as many passes as
    it takes.
    """

    task: Task
    width: int = Field(ge=16, le=1280)
    height: int = Field(ge=16, le=1280)
    frames: Annotated[int, Field(ge=1, le=241)]
    fps: Annotated[int | float, Field(ge=shapes.MIN_FPS, le=shapes.MAX_FPS)]
    steps: int = Field(ge=1, le=200)
    guidance_scale: float = Field(ge=0, le=30, allow_inf_nan=False)
    flow_shift: float = Field(ge=0.01, le=100, allow_inf_nan=False)
    negative_prompt: str = Field(max_length=4000)
    seed: int = Field(ge=0, le=MAX_SEED)
    delivery: shapes.Delivery | None = build_omitted_field()
    seconds: float | None = build_omitted_field()
    given_frames: int = Field(default=0, ge=0, exclude_if=lambda frames: frames == 0)
    new_frames: int | None = build_omitted_field()

    @property
    def passes(self) -> int:
        """The number of times that the model generates `frames` frames, one after the other."""
        return 1 if self.new_frames is None else -(-self.new_frames // (self.frames - self.given_frames))

    @property
    def delivered_shape(self) -> shapes.Delivery:
        return self.delivery or shapes.Delivery(width=self.width, height=self.height, frames=self.frames)


class StepProgress(FrozenModel):
    """Denoising step `step` of `steps` is done; the last step is expected in `eta_seconds`."""

    kind: Literal["step"] = "step"
    step: int
    steps: int
    eta_seconds: float


class Preview(FrozenModel):
    """A frame of the unfinished clip, as a PNG in base64."""

    kind: Literal["preview"] = "preview"
    png: str


# ---------------------------------------------------------------- tasks

Medium = Literal["image", "video"]
FramePosition = Literal["first", "middle", "last"]  # of a still in its clip
# A preset has sampling defaults for the tasks that its weights can do; training data has the standard ones and more.
TrainingTask = Literal["image-understanding", "video-understanding", StandardTask]
TASKS: tuple[StandardTask, ...] = get_args(StandardTask)
TRAINING_TASKS: tuple[TrainingTask, ...] = get_args(TrainingTask)


def get_task_medium(task: TrainingTask | Task) -> Medium:
    """Return the medium that a task generates, edits or answers questions about."""
    return "image" if task in ("image-understanding", "text-to-image", "image-editing") else "video"


def is_editing_task(task: TrainingTask | Task) -> bool:
    return task in ("image-editing", "video-editing")


def get_generation_task(medium: Medium) -> StandardTask:
    return "text-to-video" if medium == "video" else "text-to-image"


def get_editing_task(medium: Medium) -> StandardTask:
    return "video-editing" if medium == "video" else "image-editing"


# ---------------------------------------------------------------- requests to the MLLM, and jobs

THINK_START, THINK_END = "<think>", "</think>"  # around the reasoning in an answer


class Artifact(FrozenModel):
    """A stored image or clip. `source` is the key of the artifact that it was edited from.

    `preview` is the key of a clip's animated picture, for programs that show pictures only.
    """

    key: str
    medium: Medium
    width: int
    height: int
    frames: int
    fps: float
    caption: str
    manifest: str | None = None
    latents: str | None = None
    source: str | None = None
    preview: str | None = build_omitted_field()
    created_by: str


MAX_ANSWER_TOKENS = 32_768


class TextSampling(FrozenModel):
    """How an answer in words is sampled; greedily at temperature 0. The same seed gives the same answer."""

    max_tokens: int | None = Field(default=None, ge=1, le=MAX_ANSWER_TOKENS)  # None: the implementation's limit
    temperature: float = Field(default=0.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int = Field(default=0, ge=0, lt=2**31)


class MLLMRequest(FrozenModel):
    """A request to the MLLM: text, the artifacts shown with it, and the system prompt of a mode.

    With a `json_schema`, the answer is valid JSON of that schema.
    """

    text: str
    artifacts: tuple[Artifact, ...] = ()
    system: str | None = None
    json_schema: str | None = None
    sampling: TextSampling = TextSampling()


class Route(FrozenModel):
    """What the MLLM takes a request for, with its probability: words, a medium, a question back, or a refusal."""

    kind: Literal["text", "image", "video", "ask", "decline"]
    probability: float


class ModelIdentity(FrozenModel):
    """What a process renders with. Processes of the same identity give the same clip and can resume each other's.

    `weights` is the digest of the weights (models/weights/digests.py), `precision` says in which types they compute.
    """

    preset: str
    weights: str
    precision: str


class Job(FrozenModel):
    """One clip to render. The client may choose the id; requests with the same id and content are the same job.

    `visual_tokens` is the object key of the vision head's tokens; if it is None, the worker predicts them. `mask` is
    the object key of a picture of the source's size; only where its alpha is 0 may the source's pixels change. A
    continuation begins with its `source`, and with `last_frame`, a picture, it also ends with that.
    `preset` is the one that the settings were resolved for; a job of version 0.2 does not state it, and any worker may
    render it.
    """

    id: str
    prompt: str
    visual_tokens: str | None
    source: Artifact | None
    params: SamplingParams
    mask: str | None = build_omitted_field()
    last_frame: Artifact | None = build_omitted_field()
    preset: str | None = None

    @property
    def task(self) -> Task:
        return self.params.task

    @property
    def seed(self) -> int:
        return self.params.seed


JobState = Literal["queued", "running", "done", "failed", "cancelled"]
OPEN_STATES: tuple[JobState, ...] = ("queued", "running")  # of jobs and of turns
Lane = Literal["interactive", "batch"]


class JobStatus(FrozenModel):
    """The state of a job. Times are in seconds since 1970 by the database's clock.

    `attempt` counts the claims; `preview` is the object key of a PNG; `code` and `error` say why the job failed.
    """

    id: str
    owner: str
    lane: Lane
    state: JobState
    attempt: int
    worker_losses: int
    step: int
    steps: int
    eta_seconds: float
    preview: str | None
    result: Artifact | None
    code: str | None
    error: str | None
    created_at: float
    started_at: float | None
    ended_at: float | None
    kind: str
    meta: dict[str, str]
    job: Job
    turn_id: str | None = None
    cancel_requested: bool = False


class Claim(FrozenModel):
    """A job that a worker has claimed. `attempt` is the fencing number of everything that the worker writes.

    `resume_key` is the object key of a resume point, saved by a worker of the same model. `batch_job_ids` are the jobs
    that are rendered in one pass, in order, or empty for a job that is rendered alone. `traceparent` is the W3C trace
    context of the request.
    """

    job: Job
    attempt: int
    resume_key: str | None
    lane: Lane = "interactive"
    batch_job_ids: tuple[str, ...] = ()
    traceparent: str | None = None


class Change(FrozenModel):
    """A change of a turn or a job. An event of a turn has its number, and its body if the body is small."""

    topic: str
    number: int | None = None
    body: dict[str, Any] | None = None


def invalid_input_from_validation(
    error: ValidationError, fields: Mapping[str, FieldInfo] | None = None
) -> InvalidInput:
    """Return an error that names the first invalid one of the `fields` and its allowed range."""
    errors = error.errors()
    given = {str(part): None for details in errors for part in details["loc"][:1]}
    return InvalidInput(*describe_errors(errors, given, fields))


def get_source_length(preset: Preset, task: Task, source: Artifact | None) -> shapes.SourceLength | None:
    """Return the length of a source that decides that of the result, or None for the task's default length."""
    if source is None:
        return None
    # The latents of a clip that was generated here are read, and of others the frames that the preset chooses.
    if source.medium == "video" and (source.latents is not None or task == "video-extension"):
        return shapes.SourceLength(source.frames, source.fps)
    return shapes.get_file_length(preset, source.frames, None if source.medium == "image" else source.fps)


def resolve_sampling_params(
    preset: Preset, task: Task, source: shapes.SourceLength | None = None, /, **overrides: object
) -> SamplingParams:
    """Return the preset's settings for a task, with the `overrides` that are not None applied.

    A request's settings are resolved here, once, when it becomes a job. The overrides `width`, `height`, `frames`,
    `fps` and `seconds` are what is to be delivered; the model's own size and length follow from them. `source` is the
    length of an edit's clip, or of the clip that is extended: its frames and seconds are then those that are added.
    Raises an InvalidInput that names the field and the allowed range.
    """
    defaults = get_sampling_defaults(preset, task)
    given = {name: value for name, value in overrides.items() if value is not None}
    shape_fields, is_video = shapes.RequestedShape.model_fields, get_task_medium(task) == "video"
    try:
        requested = shapes.RequestedShape.model_validate({name: given.pop(name, None) for name in shape_fields})
        shape = shapes.resolve_shape(preset, task, defaults, requested, source, is_video)
        if given.get("seed") == -1:  # any seed, as many clients send it
            given["seed"] = secrets.randbelow(2**31)
        settings = defaults.model_dump() | {"negative_prompt": preset.null.negative_prompt, "seed": 0} | given | shape
        params = SamplingParams(task=task, **settings)
    except ValidationError as error:
        problem = invalid_input_from_validation(error, SamplingParams.model_fields | shape_fields)
        if problem.field == "frames":  # the field's bounds are those of every preset, and this one has its own
            problem = InvalidInput("frames", f"allowed: {shapes.describe_frames(preset, task, defaults)}")
        raise problem from None
    shapes.check_flow_shift(preset, task, defaults, params.flow_shift)
    check_sampling_params(preset, params)
    return params


def check_sampling_params(preset: Preset, params: SamplingParams) -> None:
    """Raise InvalidInput if a model of this preset cannot render with these settings."""
    get_sampling_defaults(preset, params.task)
    compute_latent_grid(params.width, params.height, params.frames)
    if params.width * params.height * params.frames > shapes.MAX_CLIP_PIXELS:
        raise InvalidInput("size", f"width x height x frames is above {shapes.MAX_CLIP_PIXELS}")
    if (params.frames == 1) != (get_task_medium(params.task) == "image"):
        raise InvalidInput("frames", f"{params.frames} does not fit {params.task}: an image has 1, a video 5 or more")
    if params.negative_prompt and preset.null.kind == "context-file":
        raise InvalidInput("negative_prompt", f"{preset.name} has a null condition of its own; leave this out")
    check_model_limits(preset, params.width, params.height, params.frames, count_source_tokens(preset, params))


def check_prompt(field: str, text: str) -> str:
    """Return the text without surrounding whitespace. Raises InvalidInput unless it has 1 to 4000 characters."""
    text = text.strip()
    if not text:
        raise InvalidInput(field, "it is empty; give 1 to 4000 characters")
    if len(text) > 4000:
        raise TextTooLong(field, f"it has {len(text)} characters; give 1 to 4000")
    try:
        return check_characters(text)
    except ValueError as error:
        raise InvalidInput(field, str(error)) from None


# ---------------------------------------------------------------- the tokens of a clip

VAE_SPATIAL_STRIDE, VAE_TEMPORAL_STRIDE = 8, 4
MIN_TEXT_TOKENS = 64  # of the prompt and the markers that an edit keeps, if its condition cuts the text


def compute_latent_grid(width: int, height: int, frames: int) -> tuple[int, int, int]:
    """Return the latent frames, height and width of a clip; raises InvalidInput for sizes that cannot be patched."""
    for field, value in (("width", width), ("height", height)):
        if value < 16 or value % 16:
            raise InvalidInput(field, f"{value} is not a positive multiple of 16")
    if frames < 1 or frames % VAE_TEMPORAL_STRIDE != 1:
        raise InvalidInput("frames", f"{frames} is not of the form 4k + 1 (1, 5, 9, 13 ...)")
    return (frames - 1) // VAE_TEMPORAL_STRIDE + 1, height // VAE_SPATIAL_STRIDE, width // VAE_SPATIAL_STRIDE


def count_decoder_tokens(preset: Preset, grid: tuple[int, int, int]) -> int:
    """Return the number of the decoder's tokens for a latent grid."""
    t, y, x = map(int, preset.decoder["patch_size"])
    return (grid[0] // t) * (grid[1] // y) * (grid[2] // x)


def count_visual_context_tokens(preset: Preset, grid: tuple[int, int, int]) -> int:
    """Return the number of the visual context's tokens for a source's latent grid."""
    kernel = preset.visual_context.kernel_size
    return grid[0] * (grid[1] // kernel) * (grid[2] // kernel)


def count_source_tokens(preset: Preset, params: SamplingParams) -> int:
    """Return the number of the visual context's tokens: of an edit's source, or of the frames that are given."""
    frames = params.frames if is_editing_task(params.task) else params.given_frames
    if not frames:
        return 0
    t, h, w = compute_latent_grid(params.width, params.height, frames)
    return count_visual_context_tokens(preset, (t + (params.task == "keyframes-to-video"), h, w))


def count_visual_tokens(preset: Preset, frames: int) -> int:
    """Return the number of the adapter's tokens for a clip, or for an image, which has one visual token."""
    if preset.adapter is None or preset.vision_head is None:
        return 0
    return preset.adapter.num_queries * (preset.vision_head.num_queries if frames > 1 else 1)


def check_model_limits(preset: Preset, width: int, height: int, frames: int, source_tokens: int) -> None:
    """Raise InvalidInput if a clip has more positions, or its source more tokens, than the model allows."""
    grid, max_positions = compute_latent_grid(width, height, frames), preset.decoder["rope_max_seq_len"]
    sizes = (("frames", frames), ("height", height), ("width", width))
    for axis, patch, (field, size) in zip(grid, preset.decoder["patch_size"], sizes, strict=True):
        if axis // patch > max_positions:
            raise InvalidInput(field, f"{size} is more than this model's positions allow")
    max_tokens = preset.condition.max_tokens
    if preset.condition.overflow == "text":  # the prompt is what would be lost
        max_tokens -= count_visual_tokens(preset, frames)
        max_tokens -= min(MIN_TEXT_TOKENS, max_tokens // 2)
    if source_tokens and source_tokens > max_tokens:
        text = f"an edit at this size and length has {source_tokens} tokens of source; allowed: {max_tokens}"
        raise InvalidInput("size", text)
