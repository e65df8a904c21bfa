"""The ports: what one package needs from another, as protocols. omnivideo/wiring.py chooses their implementations."""

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, BinaryIO, Literal, Protocol, TypeVar

from omnivideo.contracts import (
    Artifact,
    Change,
    FramePosition,
    Job,
    JobStatus,
    Lane,
    Medium,
    MLLMRequest,
    Preview,
    Route,
    SamplingParams,
    StepProgress,
    check_prompt,
)
from omnivideo.records import JobDurations
from omnivideo.turns import ThreadRecord, TurnEvents, TurnRecord

Latents = TypeVar("Latents")
LatentsOut = TypeVar("LatentsOut", covariant=True)
State = TypeVar("State")
StateOut = TypeVar("StateOut", covariant=True)
Clip = TypeVar("Clip")


class ObjectStore(Protocol):
    """Files by content: a key is `<sha256>.<suffix>`, so the same bytes always have the same key.

    Raises StoreError if the bytes cannot be written, and ArtifactNotFound for an unknown key.
    """

    def put(self, data: bytes, suffix: str) -> str: ...

    def get(self, key: str) -> bytes: ...

    def has(self, key: str) -> bool: ...

    def delete(self, key: str) -> None:
        """Remove a file that nothing else can refer to; nothing happens if there is none."""
        ...


class SweepableObjectStore(ObjectStore, Protocol):
    """An object store whose files can be listed and removed, and read and written in parts."""

    def get_size(self, key: str) -> int: ...

    def check_writable(self) -> None:
        """Raise StoreError if nothing can be written."""
        ...

    def read_range(self, key: str, first_byte: int, last_byte: int) -> bytes:
        """Return the bytes from `first_byte` to `last_byte`, both included, or fewer if the file ends before."""
        ...

    def put_stream(self, file: BinaryIO, suffix: str) -> str:
        """Store a file that can be read several times, with only a part of it in memory."""
        ...

    def iter_keys(self) -> Iterator[str]: ...

    def sweep(
        self, referenced_keys: Collection[str], lifetime_seconds: float, candidates: Collection[str] | None = None
    ) -> list[str]:
        """Remove the unreferenced files that were not written within `lifetime_seconds`. Return their keys.

        If `candidates` is given, only these are removed.
        """
        ...


class MLLM(Protocol):
    """The multimodal language model with its text head and vision head. Equal requests get equal answers."""

    def route(self, request: MLLMRequest) -> Route:
        """Return the medium that the first token of the answer stands for, with its probability."""
        ...

    def stream_text(self, request: MLLMRequest) -> Iterator[str]:
        """Yield the text head's answer in pieces, including the marks around the reasoning."""
        ...

    def score_agreement(self, request: MLLMRequest) -> float:
        """Return the probability, 0 to 1, that the answer is "yes" rather than "no"."""
        ...

    def count_tokens(self, text: str) -> int:
        """Return the number of the text's tokens, which clients are told as usage."""
        ...

    def predict_visual_tokens(self, request: MLLMRequest, medium: Medium) -> str:
        """Return a reference to the vision head's tokens for the request.

        The reference is the object key of the tokens' file. The file is in the store only if a job may outlive this
        process or be rendered in another one.
        """
        ...


class MediaTools(Protocol):
    """Makes media of stored media, without a model. Raises LimitReached if the owner may not store more."""

    def extract_frame(self, clip: Artifact, position: FramePosition, created_by: str) -> Artifact:
        """Make a still of a clip."""
        ...

    def join_clips(self, clips: Sequence[Artifact], created_by: str, on_clip: Callable[[int], None] = ...) -> Artifact:
        """Make one clip of several, at the size and rate of the first. Raises InvalidInput if it would be too long.

        `on_clip` receives the number of clips that have been read; what it raises ends the work.
        """
        ...

    def convert_artifact(self, artifact: Artifact, suffix: str) -> Artifact:
        """Write an artifact of ours in another file format: mp4, gif or png."""
        ...


class TextLimits(Protocol):
    """The bounds of the models for the texts of requests. Each method raises InvalidInput with both numbers."""

    def check_prompt(self, field: str, text: str, params: SamplingParams | None) -> str:
        """Return a prompt or an instruction of a clip, whose settings may be unknown, without blanks around it."""
        ...

    def check_negative_prompt(self, field: str, text: str) -> None: ...

    def check_message(self, field: str, text: str) -> str:
        """Return a text for the MLLM, without surrounding whitespace."""
        ...


class CharacterLimits:
    """The in-memory twin of TextLimits: it bounds only the characters."""

    def check_prompt(self, field: str, text: str, params: SamplingParams | None) -> str:
        return check_prompt(field, text)

    def check_negative_prompt(self, field: str, text: str) -> None:
        """Accept every text that SamplingParams accepts."""

    def check_message(self, field: str, text: str) -> str:
        return check_prompt(field, text)


CHARACTER_LIMITS = CharacterLimits()


class RenderProgress(Protocol[LatentsOut, StateOut]):
    """The state of a clip after a denoising step: its predicted clean latents, and what is needed to continue."""

    @property
    def step(self) -> StepProgress: ...

    @property
    def clean_latents(self) -> LatentsOut: ...

    @property
    def state(self) -> StateOut: ...


class Decoder(Protocol[Latents, State, Clip]):
    """Renders jobs in this process. Each implementation has its own types of latents, denoising states and clips."""

    def prepare_job(self, job: Job) -> tuple[Job, SamplingParams]:
        """Return the job with its visual tokens, and its settings. Raises InvalidInput if it cannot be rendered."""
        ...

    def compute_batch_key(self, job: Job) -> Hashable | None:
        """Return what jobs must share to be rendered in one pass, or None if the job is rendered alone."""
        ...

    def render_job(
        self, job: Job, params: SamplingParams, initial_state: State | None = None
    ) -> Iterator[RenderProgress[Latents, State] | Clip]:
        """Yield the progress after each denoising step, and the clip at the end."""
        ...

    def render_batch(
        self, prepared_jobs: Sequence[tuple[Job, SamplingParams]], initial_state: State | None = None
    ) -> Iterator[RenderProgress[Latents, State] | list[Clip]]:
        """Render several jobs with the same batch key in one pass."""
        ...

    def render_preview(self, clean_latents: Latents, /) -> Preview: ...

    def store_result(self, job: Job, params: SamplingParams, clip: Clip) -> Artifact: ...


class JobQueue(Protocol):
    """Renders the planner's clips."""

    def run(self, job: Job) -> Iterator[StepProgress | Preview | Artifact]:
        """Submit a job and follow it: yield steps and previews as they happen, and the stored artifact at the end.

        A job whose id is already known is followed, not rendered again. Raises JobCancelled or another OmniVideoError.
        """
        ...

    def cancel(self, job_id: str) -> None:
        """Cancel a job within one denoising step."""
        ...


class ChangeWatch(Protocol):
    """The notifications of one follower."""

    async def receive(self, timeout_seconds: float | None = None) -> Change | None:
        """Return the next change, or None if the store must be read: on a timeout, or if changes were missed."""
        ...


class JobStore(Protocol):
    """The jobs of all owners: submitting, following, listing and counting them.

    The in-memory twin is `JobRepository(create_memory_database())`, of omnivideo/storage/database/.
    """

    def submit(
        self,
        job: Job,
        owner: str = "local",
        lane: Lane = "interactive",
        kind: str = "turn",
        meta: dict[str, str] | None = None,
    ) -> JobStatus | None:
        """Submit a job. Return None if the same job was submitted before.

        Raises ServiceBusy if a limit is reached, and InvalidInput if the id belongs to a different job.
        """
        ...

    def get_status(self, job_id: str) -> JobStatus | None: ...

    def list_statuses(self, job_ids: Collection[str]) -> list[JobStatus]: ...

    def watch_ends(self, job_ids: Collection[str]) -> AbstractContextManager[ChangeWatch]:
        """Watch for the ends of jobs, in the running event loop."""
        ...

    def cancel(self, job_id: str) -> None: ...

    def cancel_by_prefix(self, owner: str, id_prefix: str) -> None: ...

    def stop_followers(self) -> None:
        """Let all threads that follow a job raise ServiceStopping, now and later."""
        ...

    def get_owned_job(self, job_id: str, owner: str, kind: str) -> JobStatus | None: ...

    def list_owned_jobs(
        self, owner: str, kind: str, after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[JobStatus], bool]:
        """Return a page of an owner's jobs, and whether there are more."""
        ...

    def delete_owned_job(self, job_id: str, owner: str, kind: str) -> bool:
        """Delete a job. Return whether there was one."""
        ...

    def count_queued(self) -> int: ...

    def count_by_lane_and_state(self) -> list[tuple[str, str, int]]: ...

    def get_oldest_wait_seconds(self) -> float: ...

    def measure_durations(self) -> list[JobDurations]:
        """Return the times of completed jobs of each lane, counted up to each of JOB_SECONDS."""
        ...


class TurnStore(Protocol):
    """The service's threads, the turns that run in them, and the events of each turn.

    The in-memory twin is `TurnRepository(create_memory_database())`, of omnivideo/storage/database/.
    """

    def create_thread(
        self,
        thread_id: str,
        owner: str,
        forked_from: str | None = None,
        forked_after: int | None = None,
        client_id: str | None = None,
    ) -> ThreadRecord:
        """Create a thread, which may begin with the turns of another one; `client_id` is what its owner calls it.

        Raises InvalidInput if the owner has a thread with that id.
        """
        ...

    def has_thread(self, thread_id: str, owner: str) -> bool: ...

    def get_thread(self, owner: str, thread_id: str) -> ThreadRecord | None:
        """Return the owner's thread that has this id, the owner's or its own."""
        ...

    def list_threads(
        self, owner: str, after: str | None = None, limit: int = 20, newest_first: bool = True
    ) -> tuple[list[ThreadRecord], bool]:
        """Return a page of an owner's threads, and whether there are more."""
        ...

    def delete_thread(self, thread_id: str) -> list[TurnRecord]:
        """Delete a thread, by its own id, and return its open turns."""
        ...

    def create_turn(
        self,
        turn_id: str,
        thread_id: str,
        owner: str,
        number: int,
        body: dict[str, Any],
        error: dict[str, Any] | None = None,
    ) -> TurnRecord | None:
        """Create a turn, which has failed if `error` is given.

        Return None if the id is known or another turn of the thread is open.
        """
        ...

    def follow_new_turns(self, deliver: Callable[[], None]) -> AbstractContextManager[None]:
        """Call `deliver` when any process has created a turn, until the context ends."""
        ...

    def get_turn(self, turn_id: str, owner: str) -> TurnRecord | None: ...

    def list_turns(self, thread_id: str) -> list[TurnRecord]:
        """Return the turns of a thread, the oldest first."""
        ...

    def begin_deletion(self, turn: TurnRecord) -> bool:
        """Keep other turns out of the thread while an ended turn is deleted. Return False if one is open."""
        ...

    def discard_turn(self, turn: TurnRecord) -> None:
        """Take a turn out of its thread, for the sweep to remove, and mark its jobs as deleted."""
        ...

    def has_open_turn(self, owner: str, exclude_lane: Lane) -> bool:
        """Return whether a turn of the owner is queued or running in another lane than this one."""
        ...

    def claim_next_turn(
        self,
        heartbeat_timeout_seconds: float,
        excluded_owners: Collection[str] = (),
        running_ids: Collection[str] = (),
    ) -> TurnRecord | None:
        """Claim a queued turn, or one whose process is lost, of the owner with the fewest running turns.

        The caller runs those with `running_ids` itself.
        """
        ...

    def fail_poisonous_turns(self, heartbeat_timeout_seconds: float, error: dict[str, Any]) -> list[str]:
        """End the lost turns that have stopped too many processes, and return their ids."""
        ...

    def release_turn(self, turn: TurnRecord) -> None:
        """Put the turn of a process that stops back into the queue."""
        ...

    def heartbeat(self, turn: TurnRecord) -> Literal["wanted", "cancelled", "lost"]: ...

    def cancel_turn(self, turn_id: str) -> None: ...

    def end_turn(self, turn: TurnRecord, state: str, error: dict[str, Any] | None = None) -> bool: ...

    def append_event(self, turn: TurnRecord, event: dict[str, Any]) -> bool:
        """Append an event under the turn's next number. Return False if another process has taken over the turn."""
        ...

    def list_events(self, turn_id: str, after_number: int = 0) -> list[tuple[int, dict[str, Any]]]: ...

    def read_events(self, turn_id: str, after_number: int = 0) -> TurnEvents:
        """Return the events with a number above `after_number`, and whether more may follow."""
        ...

    def watch_events(self, turn_id: str) -> AbstractContextManager[ChangeWatch]:
        """Watch a turn in the running event loop; its events are delivered with their numbers."""
        ...

    def wait_for_end(self, turn_id: str, owner: str) -> None:
        """Wait until the turn is no longer open."""
        ...

    def find_chat_thread(self, owner: str, digest: str) -> tuple[str, int] | None: ...

    def save_chat_thread(self, owner: str, digest: str, thread_id: str, turn_count: int) -> None: ...
