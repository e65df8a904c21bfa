"""The frozen messages of conversations: a turn's plan, its results, and its events."""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from omnivideo.contracts import (
    MAX_ANSWER_TOKENS,
    MAX_SEED,
    Artifact,
    FrozenModel,
    Medium,
    Preview,
    Route,
    StepProgress,
    build_omitted_field,
)

MAX_PROCESS_LOSSES = 3  # the number of lost processes after which a turn fails
Think = Literal["off", "on", "auto"]
MAX_BACKGROUND_CHARS = 24_000
Goal = Literal["understand", "generate", "edit", "decline", "command"]
CommandName = Literal["undo", "restart", "help", "recap", "resend", "vary", "save", "list", "cancel", "export"]
ActionDetail = Literal["task", "last_frame", "seconds", "joined"]
CommandArgument = Literal["which", "count", "format", "file"]


class ThinkTrace(FrozenModel):
    """The reasoning of think mode and the prompt that resulted from it."""

    request: str
    reasoning: str
    rewrite: str
    seconds: float


class Action(FrozenModel):
    """One request of a turn, and the key of the artifact that it refers to.

    `details` are what its words say of a clip that begins with given frames or is made of several, if it is one: the
    task, the seconds that are added, and the numbers of the last picture and of the clips.
    """

    text: str
    source: str | None = None
    details: dict[ActionDetail, str | int | float | list[int]] | None = build_omitted_field()


class Plan(FrozenModel):
    actions: tuple[Action, ...]


class Candidate(FrozenModel):
    """The result of one seed. `agreement`, 0 to 1, is the MLLM's judgement of whether it shows what was requested."""

    seed: int
    artifact: Artifact
    agreement: float | None = None


class ExecutedCommand(FrozenModel):
    """A command about the conversation: `which` is the number of a result, `count` that of the variations."""

    name: CommandName
    arguments: dict[CommandArgument, int | str] = Field(default_factory=dict)


class ActionResult(FrozenModel):
    """The result of an action: a clip and its candidates, or an answer; a refusal is an answer too.

    A command has its own message, and the result that it returns to, sends again or saves.
    """

    action: Action
    goal: Goal
    route: Route
    trace: ThinkTrace | None
    candidates: tuple[Candidate, ...] = ()
    artifact: Artifact | None = None
    answer: str | None = None
    command: ExecutedCommand | None = None


class Turn(FrozenModel):
    """A completed turn of a thread. `clarifications` are the planner's questions to the user, with the replies."""

    number: int
    text: str
    attachments: tuple[Artifact, ...]
    clarifications: tuple[tuple[str, str], ...]
    results: tuple[ActionResult, ...]


class TurnOptions(FrozenModel):
    """The options of a turn. `check` is the maximum number of candidates to render for an action.

    `background` is what an MLLM that follows instructions is told besides the turn's text: a client's own instructions,
    documents, and what was said before.
    `max_tokens`, `temperature`, `top_p` and `stop` apply to answers in words.
    """

    think: Think = "auto"
    check: int = Field(default=1, ge=1, le=16)
    seed: int | None = Field(default=None, ge=-1, le=MAX_SEED)  # -1 means any seed
    steps: int | None = Field(default=None, ge=1, le=200)
    guidance_scale: float | None = Field(default=None, ge=0, le=30, allow_inf_nan=False)
    background: str = Field(default="", max_length=MAX_BACKGROUND_CHARS)
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_ANSWER_TOKENS)
    temperature: float = Field(default=0.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)
    stop: tuple[str, ...] = ()


# ---------------------------------------------------------------- events of a turn


class PlanReady(FrozenModel):
    kind: Literal["plan"] = "plan"
    plan: Plan


class ActionStarted(FrozenModel):
    """An action of the plan begins: `prompt` is what is generated, or the request that is answered in words.

    A turn that continues after an interruption begins its action again, and repeats the events that follow.
    """

    kind: Literal["action"] = "action"
    index: int
    goal: Goal
    medium: Medium | None
    prompt: str


class ThinkingDelta(FrozenModel):
    """A piece of the reasoning."""

    kind: Literal["thinking"] = "thinking"
    delta: str


class PromptRewritten(FrozenModel):
    kind: Literal["rewritten"] = "rewritten"
    trace: ThinkTrace


class TextDelta(FrozenModel):
    """A piece of an answer."""

    kind: Literal["text"] = "text"
    delta: str


class ArtifactReady(FrozenModel):
    """An artifact is stored; `final` is False for a candidate that may be replaced by a better one."""

    kind: Literal["artifact"] = "artifact"
    artifact: Artifact
    final: bool = True


class WaitingNotice(FrozenModel):
    """The turn waits for a server that is unavailable or starting, and continues when the server is available."""

    kind: Literal["waiting"] = "waiting"
    text: str


class QuestionAsked(FrozenModel):
    """The turn waits for the user's reply to a question."""

    kind: Literal["question"] = "question"
    text: str


class TurnCompleted(FrozenModel):
    kind: Literal["done"] = "done"
    turn: Turn


TurnEvent = (
    PlanReady
    | ActionStarted
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


# ---------------------------------------------------------------- turns as the service stores them


@dataclass(frozen=True)
class ThreadProgress:
    """How far a thread has got, which can be known without reading its turns."""

    num_turns: int  # the complete ones
    has_unfinished_turn: bool  # whether steps of a turn remain to be run, other than a reply's
    question: str | None  # which waits for a reply
    question_id: str | None = None  # another one for each time that a question is asked


class ThreadRecord(FrozenModel):
    """A thread as the service stores it; it may begin with the first `forked_after` turns of `forked_from`.

    `public_id` is the id under which its owner knows it, `id` that of its checkpoints, turns and jobs.
    """

    id: str
    public_id: str
    created_at: float  # in seconds since 1970
    forked_from: str | None = None
    forked_after: int | None = None


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
    cancel_requested: bool = False

    def has_asked(self, progress: ThreadProgress, has_started: bool) -> bool:
        """Return whether the open question is one that this turn has asked, and not the one that it replies to.

        A process may have ended after a reply's first events and before the checkpoint that follows the question.
        """
        if not self.body["is_reply"]:
            return True
        question_id = self.body.get("question_id")  # a turn of an older version has none
        return has_started if question_id is None else progress.question_id != question_id


class TurnEvents(FrozenModel):
    """Numbered events of a turn; `is_open` says whether more may follow."""

    is_open: bool
    events: tuple[tuple[int, dict[str, Any]], ...]


class StoredPreview(FrozenModel):
    """A preview as the service records it: `key` is the PNG's key in the object store."""

    kind: Literal["preview"] = "preview"
    key: str
