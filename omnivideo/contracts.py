"""The frozen messages that cross rooms."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from omnivideo.errors import InvalidInput
from omnivideo.presets import Preset, Task, latent_grid, visual_context_tokens

MOST_SEED = 2**63 - 1
MOST_PIXELS = 1280 * 720 * 121  # of a whole clip: above what any preset was made for


class Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Settings(Message):
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
    seed: int = Field(ge=0, le=MOST_SEED)


class Step(Message):
    """Denoising step `step` of `steps` is done; `left` is the expected time to the last one, in seconds."""

    kind: Literal["step"] = "step"
    step: int
    steps: int
    left: float


class Manifest(Message):
    """What a file was made from: enough to make the same bytes again.

    `source` is the source's file name, or its artifact key where it comes out of a store; `visual_tokens` and
    `source_latents` are keys of tensors, where they are kept.
    """

    prompt: str
    task: Task
    settings: Settings
    source: str | None
    source_latents: str | None = None
    visual_tokens: str | None = None
    preset: str
    weights: str
    versions: dict[str, str]
    seconds: dict[str, float]


# ---------------------------------------------------------------- what a conversation is made of

Medium = Literal["image", "video"]
Think = Literal["off", "on", "auto"]
Goal = Literal["understand", "generate", "edit"]
THINK, END_THINK = "<think>", "</think>"  # around the reasoning in an answer


class Artifact(Message):
    """A stored image or clip.  `about` are the words that it shows; `source` is the artifact that it was made from."""

    key: str
    medium: Medium
    width: int
    height: int
    frames: int
    fps: float
    about: str
    manifest: str | None = None
    latents: str | None = None
    source: str | None = None
    made_by: str


class Ask(Message):
    """What the MLLM is asked: words, the artifacts that are shown with them, and an instruction that names a mode."""

    text: str
    shown: tuple[Artifact, ...] = ()
    system: str | None = None


class Routed(Message):
    """What the first token of the MLLM's answer asks for, with its probability."""

    kind: Literal["text", "image", "video"]
    probability: float


class Given(Message):
    """Settings of a clip that are not to be the preset's."""

    width: int | None = None
    height: int | None = None
    frames: int | None = None
    fps: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    flow_shift: float | None = None
    negative_prompt: str | None = None


class Job(Message):
    """One clip to draw.  Its id is the client's: the same id twice is the same job.

    `visual_tokens` is the key of the vision head's tokens; a worker reads them itself for a job without.
    """

    id: str
    task: Task
    prompt: str
    visual_tokens: str | None
    source: Artifact | None
    seed: int = Field(ge=0, le=MOST_SEED)
    given: Given = Given()


JobState = Literal["queued", "running", "done", "failed", "cancelled"]
Lane = Literal["interactive", "batch"]


class JobStatus(Message):
    """What is known of a job.  Times in seconds since 1970 by the database's clock.

    `attempt` counts the claims; `preview` is the key of a PNG; `code` and `error` say why it failed.
    """

    id: str
    owner: str
    lane: Lane
    state: JobState
    attempt: int
    losses: int
    step: int
    steps: int
    left: float
    preview: str | None
    result: Artifact | None
    code: str | None
    error: str | None
    made: float
    started: float | None
    ended: float | None
    kind: str
    meta: dict[str, str]
    job: Job


class Claim(Message):
    """A job that a worker has taken: `attempt` fences what it writes, `point` is where to go on from; `pack` names the
    jobs that are drawn in one pass with it, in their order (none: it is drawn alone); `trace` is the W3C traceparent of
    who asked."""

    job: Job
    attempt: int
    point: str | None
    lane: Lane = "interactive"
    pack: tuple[str, ...] = ()
    trace: str | None = None


class Trace(Message):
    """Think mode's record: the request, the reasoning, the rewrite, and how long it took."""

    request: str
    reasoning: str
    rewrite: str
    seconds: float


class Act(Message):
    """One thing to do: the words, and the key of the artifact that they are about."""

    text: str
    source: str | None = None


class Plan(Message):
    acts: tuple[Act, ...]


class Try(Message):
    """One seed's result; `agreement` is how far the model itself finds what was asked for in it, 0 to 1."""

    seed: int
    artifact: Artifact
    agreement: float | None = None


class Done(Message):
    """What became of an act."""

    act: Act
    goal: Goal
    routed: Routed
    trace: Trace | None
    tries: tuple[Try, ...] = ()
    artifact: Artifact | None = None
    answer: str | None = None


class Turn(Message):
    """One turn of a thread, whole; `asked` is what had to be asked back, with the reply."""

    number: int
    text: str
    attachments: tuple[Artifact, ...]
    asked: tuple[tuple[str, str], ...]
    done: tuple[Done, ...]


class TurnOptions(Message):
    """How a turn is run: `check` is the number of tries."""

    think: Think = "auto"
    check: int = Field(default=1, ge=1, le=16)
    seed: int | None = Field(default=None, ge=0, le=MOST_SEED)
    steps: int | None = Field(default=None, ge=1, le=200)
    guidance_scale: float | None = Field(default=None, ge=0, le=30, allow_inf_nan=False)


# ---------------------------------------------------------------- what is told while a turn runs


class Planned(Message):
    kind: Literal["plan"] = "plan"
    plan: Plan


class Thinking(Message):
    """A piece of the reasoning, as it comes."""

    kind: Literal["thinking"] = "thinking"
    piece: str


class Rewritten(Message):
    kind: Literal["rewritten"] = "rewritten"
    trace: Trace


class Text(Message):
    """A piece of an answer, as it comes."""

    kind: Literal["text"] = "text"
    piece: str


class Preview(Message):
    """A PNG of how the clip looks so far, base64."""

    kind: Literal["preview"] = "preview"
    png: str


class Made(Message):
    """An artifact is there; `final` is False for a try that may give way to a better one."""

    kind: Literal["artifact"] = "artifact"
    artifact: Artifact
    final: bool = True


class Waiting(Message):
    """Something that the turn needs is away or starting; it goes on by itself once that is there."""

    kind: Literal["waiting"] = "waiting"
    text: str


class Question(Message):
    """The turn waits for the user's reply."""

    kind: Literal["question"] = "question"
    text: str


class Finished(Message):
    kind: Literal["done"] = "done"
    turn: Turn


Event = Planned | Thinking | Rewritten | Step | Text | Preview | Made | Waiting | Question | Finished


def refused(error: ValidationError) -> InvalidInput:
    """A message's first wrong field, with the allowed range."""
    first = error.errors()[0]
    return InvalidInput(str(first["loc"][0]), first["msg"][0].lower() + first["msg"][1:])


def settings(preset: Preset, task: Task, **given: object) -> Settings:
    """The preset's defaults for a task with what is given in place; None leaves a default.

    Raises InvalidInput that names the field and the allowed range.
    """
    defaults = preset.sampling[task].model_dump() | {"negative_prompt": preset.negative_prompt, "seed": 0}
    wanted = {name: value for name, value in given.items() if value is not None}
    try:
        made = Settings(task=task, **(defaults | wanted))
    except ValidationError as error:
        raise refused(error) from None
    latent_grid(made.width, made.height, made.frames)
    if made.width * made.height * made.frames > MOST_PIXELS:
        raise InvalidInput("size", f"width x height x frames is above {MOST_PIXELS}")
    if (made.frames == 1) != (task in ("text-to-image", "image-editing")):
        raise InvalidInput("frames", f"{made.frames} does not fit {task}: an image has 1, a video 5 or more")
    fits(preset, made)
    return made


def fits(preset: Preset, made: Settings) -> None:
    """Raises InvalidInput where the model has no positions, or no condition, for so much."""
    grid, most = latent_grid(made.width, made.height, made.frames), preset.decoder["rope_max_seq_len"]
    for axis, patch, field in zip(grid, preset.decoder["patch_size"], ("frames", "height", "width"), strict=True):
        if axis // patch > most:
            raise InvalidInput(field, f"{getattr(made, field)} is more than this model has positions for")
    tokens = visual_context_tokens(preset, grid) if made.task.endswith("editing") else 0
    if tokens > preset.condition_most:
        text = f"an edit at this size and length has {tokens} tokens of source; allowed: {preset.condition_most}"
        raise InvalidInput("size", text)


def check_prompt(field: str, text: str) -> str:
    """The text without outer blanks; raises InvalidInput where nothing or too much is left."""
    text = text.strip()
    if not text:
        raise InvalidInput(field, "it is empty; give 1 to 4000 characters")
    if len(text) > 4000:
        raise InvalidInput(field, f"it has {len(text)} characters; give 1 to 4000")
    return text
