"""A conversation: turns that build on each other, saved by a LangGraph checkpointer after every step."""

import asyncio
import re
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from langgraph.types import Command, StateSnapshot
from langsmith import tracing_context
from pydantic import ValidationError

from omnivideo.agent.rendering import CANCEL_REQUESTED, derive_seed
from omnivideo.contracts import Artifact, invalid_input_from_validation
from omnivideo.errors import InvalidInput, ServiceStopping
from omnivideo.ports import CHARACTER_LIMITS, TextLimits
from omnivideo.turns import QuestionAsked, ThreadProgress, Turn, TurnCompleted, TurnEvent, TurnOptions

AttachFile = Callable[[str | Path, str], Artifact]
THREAD_ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@runtime_checkable
class ThreadIndex(Protocol):
    """A checkpointer that finds its threads without reading checkpoints, which are as long as the conversations."""

    def list_thread_ids(self) -> Iterator[str]: ...

    def has_thread(self, thread_id: str) -> bool: ...

    def read_progress(self, thread_id: str) -> ThreadProgress | None:
        """Return how far a thread has got; None if only its newest checkpoint itself says it."""
        ...


@dataclass(frozen=True)
class ThreadContents:
    """What a thread has. `question` waits for a reply."""

    turns: tuple[Turn, ...]
    artifacts: tuple[Artifact, ...]
    question: str | None


def is_turn_complete(snapshot: StateSnapshot) -> bool:
    """Return whether a state lies between two turns, so that no step remains to be run.

    The tasks decide this, because `next` omits a step that has run but whose result has not been applied yet.
    """
    return not snapshot.tasks


def progress_from_state(snapshot: StateSnapshot) -> ThreadProgress:
    num_turns = len(snapshot.values.get("turns", []))
    if snapshot.interrupts:
        return ThreadProgress(num_turns, False, str(snapshot.interrupts[0].value), snapshot.interrupts[0].id)
    return ThreadProgress(num_turns, not is_turn_complete(snapshot), None)


def parse_turn_options(**options: object) -> TurnOptions:
    """Return the options of a turn. Raises an InvalidInput that names the field and the allowed range."""
    try:
        return TurnOptions(**options)  # type: ignore[arg-type]
    except ValidationError as error:
        raise invalid_input_from_validation(error, TurnOptions.model_fields) from None


def iterate_untraced(items: Generator[Any, None, None]) -> Iterator[Any]:
    """Yield the items of a generator, which runs with LangSmith's tracing off.

    LANGSMITH_TRACING, set for other work, would send the words of our users to that server. Between two items, the
    caller's own tracing is as it was.
    """
    context, untraced = copy_context(), tracing_context(enabled=False)
    context.run(untraced.__enter__)
    try:
        while (item := context.run(lambda: next(items, None))) is not None:
            yield item
    finally:
        context.run(items.close)


class Thread:
    """A conversation by its id. Several threads may run at once, but only one turn of each at a time.

    `attach_file` stores a user's file.
    """

    def __init__(self, graph: Any, name: str, attach_file: AttachFile, text_limits: TextLimits = CHARACTER_LIMITS):
        if not THREAD_ID_PATTERN.fullmatch(name):
            allowed = "1 to 64 letters, digits, dots, dashes or underscores, the first a letter or digit"
            raise InvalidInput("thread", f"{name!r} is not a thread id; give {allowed}")
        self.graph = graph
        self.id = name
        self.attach_file = attach_file
        self.text_limits = text_limits
        self.config = {"configurable": {"thread_id": name}}
        self.cancel_requested = threading.Event()

    # ------------------------------------------------------------ creating and forking

    def exists(self) -> bool:
        checkpointer = self.graph.checkpointer
        if isinstance(checkpointer, ThreadIndex):
            return checkpointer.has_thread(self.id)
        return bool(self.graph.get_state(self.config).values)

    def initialize_state(self, values: dict[str, Any] | None = None) -> "Thread":
        """Write the first checkpoint: empty, or a copy of another thread's state."""
        initial = {"seed": derive_seed(self.id), "turns": [], "artifacts": [], "current_key": None, "descriptions": {}}
        self.update_state(self.config, values or initial)
        return self

    def ensure_state(self) -> "Thread":
        """Write the first checkpoint, unless the thread has one."""
        return self if self.exists() else self.initialize_state()

    def update_state(self, config: Any, updates: dict[str, Any]) -> None:
        """Write a checkpoint with the updates, as after a turn."""
        with tracing_context(enabled=False):
            self.graph.update_state(config, updates, as_node="answer")

    def require_existing(self) -> "Thread":
        if not self.exists():
            raise InvalidInput("thread", f"there is no thread {self.id!r}")
        return self

    def fork(self, turn: int, name: str | None = None) -> "Thread":
        """Return a new thread that starts with the first `turn` turns of this one; without a name it gets a new one."""
        branch = Thread(self.graph, name or uuid.uuid4().hex[:12], self.attach_file, self.text_limits)
        if branch.exists():
            raise InvalidInput("thread", f"there is already a thread {name!r}")
        self.ensure_state()
        snapshot = self.find_snapshot_after(turn)
        if snapshot is None:
            raise InvalidInput("turn", f"{turn} is not a turn of this thread: 0 to {self.get_progress().num_turns}")
        return branch.initialize_state(snapshot.values)

    def add_artifacts(self, artifacts: Sequence[Artifact]) -> None:
        """Add artifacts between two turns, as if they had been attached; the last one becomes what "it" refers to."""
        if artifacts:
            updates = {"artifacts": [artifact.model_dump() for artifact in artifacts], "current_key": artifacts[-1].key}
            self.update_state(self.config, updates)

    def find_snapshot_after(self, num_turns: int) -> StateSnapshot | None:
        """Return the state after `num_turns` turns, or None if the thread has fewer."""
        # Checkpoints of older versions do not state their number of turns.
        snapshot: StateSnapshot
        for criteria in ({"num_turns": num_turns}, None):
            for snapshot in self.graph.get_state_history(self.config, filter=criteria):
                if is_turn_complete(snapshot) and len(snapshot.values["turns"]) == num_turns:
                    return snapshot
        return None

    # ------------------------------------------------------------ a turn

    def send(
        self, text: str, attachments: Sequence[str | Path | Artifact] = (), **options: object
    ) -> Iterator[TurnEvent]:
        """Run a turn and yield its events as they happen; the last one is TurnCompleted or QuestionAsked.

        The text sent after a QuestionAsked is the reply. A turn that a killed process left open is completed first.
        `options` are the fields of TurnOptions. Raises InvalidInput before anything is changed, and another
        error if the turn fails, which leaves the thread as it was before the turn.
        """
        turn_options = parse_turn_options(**options)
        text = self.text_limits.check_message("text", text)
        artifacts = [self.to_artifact(attachment) for attachment in attachments]
        progress = self.get_progress()
        if progress.question is not None:
            if artifacts:
                raise InvalidInput("attachments", "a question is open; reply to it in words first")
            yield from self.run_graph(Command(resume=text), progress.num_turns)
            return
        if progress.has_unfinished_turn:
            yield from self.run_graph(None, progress.num_turns)
            progress = self.get_progress()
        self.ensure_state()  # to which a turn that fails returns
        turn_input = {
            "text": text,
            "attachments": [artifact.model_dump() for artifact in artifacts],
            "options": turn_options.model_dump(),
        }
        yield from self.run_graph(turn_input, progress.num_turns)

    def to_artifact(self, attachment: str | Path | Artifact) -> Artifact:
        return attachment if isinstance(attachment, Artifact) else self.attach_file(attachment, f"{self.id}/attached")

    def resume(self) -> Iterator[TurnEvent]:
        """Continue a turn that was interrupted by the end of its process, if there is one."""
        progress = self.get_progress()
        if progress.has_unfinished_turn:
            yield from self.run_graph(None, progress.num_turns)

    def cancel(self) -> None:
        """Cancel the turn that `send` runs: it raises JobCancelled at its next event, and the thread is as before it.

        Any operating system thread, and a signal handler, may call this.
        """
        self.cancel_requested.set()

    def run_graph(self, graph_input: Any, num_turns: int) -> Iterator[TurnEvent]:
        """Run steps until the turn ends or asks. If it fails, return to the state after `num_turns` turns."""
        finished = False
        self.cancel_requested.clear()
        config = {"configurable": self.config["configurable"] | {CANCEL_REQUESTED: self.cancel_requested}}
        try:
            stream = self.graph.stream(graph_input, config, stream_mode="custom", durability="sync")
            for event in iterate_untraced(stream):
                finished = isinstance(event, TurnCompleted)
                yield event
        except ServiceStopping:  # another process continues the turn
            raise
        except Exception:  # whatever went wrong, the next turn must not continue this one
            self.roll_back(num_turns)
            raise
        if not finished and (question := self.get_open_question()):
            yield QuestionAsked(text=question)

    def has_unfinished_turn(self) -> bool:
        """Return whether steps of a turn remain to be run, other than a reply's."""
        return self.get_progress().has_unfinished_turn

    def roll_back(self, num_turns: int) -> None:
        """Return to the state after `num_turns` turns; the failed turn's checkpoints remain in the history."""
        snapshot = self.find_snapshot_after(num_turns)
        assert snapshot is not None, "a turn starts from a complete state"
        updates = {
            "current_key": snapshot.values["current_key"],
            "failed_turns": snapshot.values.get("failed_turns", 0) + 1,
        }
        self.update_state(snapshot.config, updates)

    def remove_turns_after(self, num_turns: int) -> None:
        """Return to the state after `num_turns` turns, and remove what later checkpoints have."""
        saver, snapshot = self.graph.checkpointer, self.find_snapshot_after(num_turns)
        assert snapshot is not None, "a thread keeps the states between its turns"
        first_id = snapshot.config["configurable"]["checkpoint_id"]
        saver.restore_values(self.id, first_id)
        self.roll_back(num_turns)
        newest_id = self.graph.get_state(self.config).config["configurable"]["checkpoint_id"]
        saver.delete_branch(self.id, first_id, newest_id)

    async def asend(
        self, text: str, attachments: Sequence[str | Path | Artifact] = (), **options: object
    ) -> AsyncIterator[TurnEvent]:
        """Run a turn as `send` does, from an event loop; the turn runs in an operating system thread."""
        loop = asyncio.get_running_loop()
        events = self.send(text, attachments, **options)
        with ThreadPoolExecutor(1, thread_name_prefix="turn") as pool:
            while (event := await loop.run_in_executor(pool, next, events, None)) is not None:
                yield event

    # ------------------------------------------------------------ reading

    def get_progress(self) -> ThreadProgress:
        """Return how far the thread has got, without reading its turns where the checkpointer can tell."""
        checkpointer = self.graph.checkpointer
        known = checkpointer.read_progress(self.id) if isinstance(checkpointer, ThreadIndex) else None
        return known or progress_from_state(self.graph.get_state(self.config))

    def get_open_question(self) -> str | None:
        """Return the question that waits for a reply, or None."""
        return self.get_progress().question

    def get_changed_at(self) -> str:
        """Return the time of the last change, in ISO 8601."""
        return self.graph.get_state(self.config).created_at or ""

    def get_contents(self) -> ThreadContents:
        """Return the turns, the artifacts and the open question, all of one checkpoint."""
        snapshot = self.graph.get_state(self.config)
        turns = tuple(Turn.parse_stored(turn) for turn in snapshot.values.get("turns", []))
        artifacts = tuple(Artifact.parse_stored(artifact) for artifact in snapshot.values.get("artifacts", []))
        return ThreadContents(turns, artifacts, progress_from_state(snapshot).question)

    def get_turns(self) -> list[Turn]:
        return list(self.get_contents().turns)

    def get_turn(self, number: int) -> Turn:
        """Return the turn with this number; the first one has number 1."""
        return Turn.parse_stored(self.graph.get_state(self.config).values["turns"][number - 1])

    def get_artifacts(self) -> list[Artifact]:
        """Return every attached or generated artifact, in order."""
        return list(self.get_contents().artifacts)

    def has_file(self, key: str) -> bool:
        """Return whether a key is that of an artifact of this thread, of its manifest, or of a file that was saved."""
        values = self.graph.get_state(self.config).values
        results = [result for turn in values.get("turns", []) for result in turn["results"]]
        saved = [result["artifact"] for result in results if result.get("command") and result["artifact"]]
        artifacts = [*values.get("artifacts", []), *saved]
        return any(key in (artifact["key"], artifact.get("manifest")) for artifact in artifacts)

    def get_current_key(self) -> str | None:
        """Return the key of the artifact that "it" refers to, or None."""
        key: str | None = self.graph.get_state(self.config).values.get("current_key")
        return key

    def get_lineage(self, key: str | None = None) -> list[Artifact]:
        """Return an artifact, by default the last one, and the artifacts that it was edited from, newest first."""
        artifacts = self.get_artifacts()
        by_key = {artifact.key: artifact for artifact in artifacts}
        if key is not None and key not in by_key:
            raise InvalidInput("artifact", "this thread has no such artifact")
        ancestors: list[Artifact] = []
        artifact = by_key[key] if key else artifacts[-1] if artifacts else None
        while artifact is not None and artifact not in ancestors:
            ancestors.append(artifact)
            artifact = by_key.get(artifact.source) if artifact.source else None
        return ancestors
