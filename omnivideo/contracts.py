"""The frozen messages that cross rooms."""

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from omnivideo.errors import InvalidInput
from omnivideo.presets import Preset, Task, compute_latent_grid, count_visual_context_tokens

MAX_SEED = 2**63 - 1
MAX_CLIP_PIXELS = 1280 * 720 * 121  # of a whole clip: above what any preset was made for


class FrozenModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SamplingParams(FrozenModel):
    """How one clip is drawn.  Sizes in px; `seed` fixes every byte of the result."""

    task: Task
    width: int = Field(ge=16, le=1280)
    height: int = Field(ge=16, le=1280)
    frames: Annotated[int, Field(ge=1, le=241)]
    fps: int = Field(ge=1, le=60)
    steps: int = Field(ge=1, le=200)
    guidance_scale: float = Field(ge=0, le=30, allow_inf_nan=False)
    flow_shift: float = Field(ge=0.01, le=100, allow_inf_nan=False)
    negative_prompt: str = Field(max_length=4000)
    seed: int = Field(ge=0, le=MAX_SEED)


class StepProgress(FrozenModel):
    """Denoising step `step` of `steps` is done; `left` is the expected time to the last one, in seconds."""

    kind: Literal["step"] = "step"
    step: int
    steps: int
    eta_seconds: float


class Manifest(FrozenModel):
    """What a file was made from: enough to make the same bytes again.

    `source` is the source's file name, or its artifact key where it comes out of a store; `visual_tokens` and
    `source_latents` are keys of tensors, where they are kept.
    """

    prompt: str
    task: Task
    settings: SamplingParams
    source: str | None
    source_latents: str | None = None
    visual_tokens: str | None = None
    preset: str
    weights: str
    versions: dict[str, str]
    seconds: dict[str, float]


# ---------------------------------------------------------------- tasks

Medium = Literal["image", "video"]
# `Task` is a task that generates: the presets have sampling defaults for each. Training has two more.
TrainingTask = Literal["image-understanding", "video-understanding", Task]
TASKS: tuple[Task, ...] = get_args(Task)
TRAINING_TASKS: tuple[TrainingTask, ...] = get_args(TrainingTask)


def get_task_medium(task: TrainingTask) -> Medium:
    """Return the medium that a task generates, edits or answers questions about."""
    return "video" if task in ("video-understanding", "text-to-video", "video-editing") else "image"


def is_editing_task(task: TrainingTask) -> bool:
    return task in ("image-editing", "video-editing")


def get_generation_task(medium: Medium) -> Task:
    return "text-to-video" if medium == "video" else "text-to-image"


def get_editing_task(medium: Medium) -> Task:
    return "video-editing" if medium == "video" else "image-editing"


# ---------------------------------------------------------------- what a conversation is made of

Think = Literal["off", "on", "auto"]
Goal = Literal["understand", "generate", "edit"]
THINK_START, THINK_END = "<think>", "</think>"  # around the reasoning in an answer


class Artifact(FrozenModel):
    """A stored image or clip.  `about` are the words that it shows; `source` is the artifact that it was made from."""

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
    created_by: str


class MLLMRequest(FrozenModel):
    """What the MLLM is asked: words, the artifacts that are shown with them, and an instruction that names a mode."""

    text: str
    artifacts: tuple[Artifact, ...] = ()
    system: str | None = None


class Route(FrozenModel):
    """What the first token of the MLLM's answer asks for, with its probability."""

    kind: Literal["text", "image", "video"]
    probability: float


class SamplingOverrides(FrozenModel):
    """Settings of a clip that are not to be the preset's."""

    width: int | None = None
    height: int | None = None
    frames: int | None = None
    fps: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    flow_shift: float | None = None
    negative_prompt: str | None = None


class Job(FrozenModel):
    """One clip to draw.  Its id is the client's: the same id twice is the same job.

    `visual_tokens` is the key of the vision head's tokens; a worker reads them itself for a job without.
    """

    id: str
    prompt: str
    visual_tokens: str | None
    source: Artifact | None
    params: SamplingParams

    @property
    def task(self) -> Task:
        return self.params.task

    @property
    def seed(self) -> int:
        return self.params.seed


JobState = Literal["queued", "running", "done", "failed", "cancelled"]
Lane = Literal["interactive", "batch"]


class JobStatus(FrozenModel):
    """What is known of a job.  Times in seconds since 1970 by the database's clock.

    `attempt` counts the claims; `preview` is the key of a PNG; `code` and `error` say why it failed.
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


class Claim(FrozenModel):
    """A job that a worker has taken: `attempt` fences what it writes, `point` is where to go on from; `pack` names the
    jobs that are drawn in one pass with it, in their order (none: it is drawn alone); `trace` is the W3C traceparent of
    who asked."""

    job: Job
    attempt: int
    resume_key: str | None
    lane: Lane = "interactive"
    batch_job_ids: tuple[str, ...] = ()
    traceparent: str | None = None


class ThinkTrace(FrozenModel):
    """Think mode's record: the request, the reasoning, the rewrite, and how long it took."""

    request: str
    reasoning: str
    rewrite: str
    seconds: float


class Action(FrozenModel):
    """One thing to do: the words, and the key of the artifact that they are about."""

    text: str
    source: str | None = None


class Plan(FrozenModel):
    actions: tuple[Action, ...]


class Candidate(FrozenModel):
    """One seed's result; `agreement` is how far the model itself finds what was asked for in it, 0 to 1."""

    seed: int
    artifact: Artifact
    agreement: float | None = None


class ActionResult(FrozenModel):
    """What became of an act."""

    action: Action
    goal: Goal
    route: Route
    trace: ThinkTrace | None
    candidates: tuple[Candidate, ...] = ()
    artifact: Artifact | None = None
    answer: str | None = None


class Turn(FrozenModel):
    """One turn of a thread, whole; `asked` is what had to be asked back, with the reply."""

    number: int
    text: str
    attachments: tuple[Artifact, ...]
    clarifications: tuple[tuple[str, str], ...]
    results: tuple[ActionResult, ...]


class TurnRecord(FrozenModel):
    """A turn as the service stores it; `attempt` counts the processes that have run it."""

    id: str
    thread_id: str
    owner: str
    state: str
    number: int
    body: dict[str, Any]
    attempt: int
    error: dict[str, Any] | None
    created_at: float


class TurnEvents(FrozenModel):
    """Numbered events of a turn; `is_open` tells whether more may follow."""

    is_open: bool
    events: tuple[tuple[int, dict[str, Any]], ...]


class Change(FrozenModel):
    """A change of a turn or a job. An event of a turn comes with its number, and with its body if it is small."""

    topic: str
    number: int | None = None
    body: dict[str, Any] | None = None


class TurnOptions(FrozenModel):
    """How a turn is run: `check` is the number of tries."""

    think: Think = "auto"
    check: int = Field(default=1, ge=1, le=16)
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    steps: int | None = Field(default=None, ge=1, le=200)
    guidance_scale: float | None = Field(default=None, ge=0, le=30, allow_inf_nan=False)


# ---------------------------------------------------------------- what is told while a turn runs


class PlanReady(FrozenModel):
    kind: Literal["plan"] = "plan"
    plan: Plan


class ThinkingDelta(FrozenModel):
    """A piece of the reasoning, as it comes."""

    kind: Literal["thinking"] = "thinking"
    delta: str


class PromptRewritten(FrozenModel):
    kind: Literal["rewritten"] = "rewritten"
    trace: ThinkTrace


class TextDelta(FrozenModel):
    """A piece of an answer, as it comes."""

    kind: Literal["text"] = "text"
    delta: str


class Preview(FrozenModel):
    """A PNG of how the clip looks so far, base64."""

    kind: Literal["preview"] = "preview"
    png: str


class StoredPreview(FrozenModel):
    """A preview as the service records it: `key` is the PNG's key in the object store."""

    kind: Literal["preview"] = "preview"
    key: str


class ArtifactReady(FrozenModel):
    """An artifact is there; `final` is False for a try that may give way to a better one."""

    kind: Literal["artifact"] = "artifact"
    artifact: Artifact
    final: bool = True


class WaitingNotice(FrozenModel):
    """Something that the turn needs is away or starting; it goes on by itself once that is there."""

    kind: Literal["waiting"] = "waiting"
    text: str


class QuestionAsked(FrozenModel):
    """The turn waits for the user's reply."""

    kind: Literal["question"] = "question"
    text: str


class TurnCompleted(FrozenModel):
    kind: Literal["done"] = "done"
    turn: Turn


TurnEvent = (
    PlanReady
    | ThinkingDelta
    | PromptRewritten
    | StepProgress
    | TextDelta
    | Preview
    | ArtifactReady
    | WaitingNotice
    | QuestionAsked
    | TurnCompleted
)


# ---------------------------------------------------------------- what the service stores for its users


class FileRecord(FrozenModel):
    """A stored file. `object_key` is its key in the object store; `artifact` is set if it is an image or a clip."""

    id: str
    owner: str
    name: str
    purpose: str
    size_bytes: int
    object_key: str
    artifact: dict[str, Any] | None
    created_at: float


class BatchRecord(FrozenModel):
    """A batch. `counts` has total, completed and failed lines; `state_times` when each state began (Unix seconds)."""

    id: str
    owner: str
    state: str
    endpoint: str
    input_file_id: str
    output_file_id: str | None
    error_file_id: str | None
    counts: dict[str, int]
    metadata: dict[str, str]
    validation_errors: list[dict[str, Any]] | None
    state_times: dict[str, int]
    runner_name: str | None
    heartbeat_at: float
    created_at: float


class WebhookRecord(FrozenModel):
    """A webhook: where events go (`url`), the key that signs them (`secret`), and the types of event it receives."""

    id: str
    owner: str
    url: str
    secret: str
    name: str
    event_types: list[str]
    created_at: float


def invalid_input_from_validation(error: ValidationError) -> InvalidInput:
    """A message's first wrong field, with the allowed range."""
    first = error.errors()[0]
    return InvalidInput(str(first["loc"][0]), first["msg"][0].lower() + first["msg"][1:])


def resolve_sampling_params(preset: Preset, task: Task, **overrides: object) -> SamplingParams:
    """Return the preset's settings for a task, with the `overrides` that are not None in their place.

    A request's settings are resolved here, once, when it becomes a job. Raises InvalidInput that names the field and
    the allowed range.
    """
    defaults = preset.sampling[task].model_dump() | {"negative_prompt": preset.negative_prompt, "seed": 0}
    given_values = {name: value for name, value in overrides.items() if value is not None}
    try:
        params = SamplingParams(task=task, **(defaults | given_values))
    except ValidationError as error:
        raise invalid_input_from_validation(error) from None
    check_sampling_params(preset, params)
    return params


def check_sampling_params(preset: Preset, params: SamplingParams) -> None:
    """Raise InvalidInput if a model of this preset cannot render with these settings."""
    compute_latent_grid(params.width, params.height, params.frames)
    if params.width * params.height * params.frames > MAX_CLIP_PIXELS:
        raise InvalidInput("size", f"width x height x frames is above {MAX_CLIP_PIXELS}")
    if (params.frames == 1) != (get_task_medium(params.task) == "image"):
        raise InvalidInput("frames", f"{params.frames} does not fit {params.task}: an image has 1, a video 5 or more")
    check_model_limits(preset, params)


def check_model_limits(preset: Preset, params: SamplingParams) -> None:
    """Raise InvalidInput if the clip has more positions, or an edit's source more tokens, than the model allows."""
    grid = compute_latent_grid(params.width, params.height, params.frames)
    max_positions = preset.decoder["rope_max_seq_len"]
    for axis, patch, field in zip(grid, preset.decoder["patch_size"], ("frames", "height", "width"), strict=True):
        if axis // patch > max_positions:
            raise InvalidInput(field, f"{getattr(params, field)} is more than this model has positions for")
    tokens = count_visual_context_tokens(preset, grid) if is_editing_task(params.task) else 0
    if tokens > preset.max_condition_tokens:
        text = f"an edit at this size and length has {tokens} tokens of source; allowed: {preset.max_condition_tokens}"
        raise InvalidInput("size", text)


def check_prompt(field: str, text: str) -> str:
    """The text without outer blanks; raises InvalidInput where nothing or too much is left."""
    text = text.strip()
    if not text:
        raise InvalidInput(field, "it is empty; give 1 to 4000 characters")
    if len(text) > 4000:
        raise InvalidInput(field, f"it has {len(text)} characters; give 1 to 4000")
    return text
