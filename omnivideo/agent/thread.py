"""One conversation: turns that build on each other, kept by a LangGraph checkpointer after every step."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from langgraph.types import Command, StateSnapshot
from pydantic import ValidationError

from omnivideo.agent.graph import seed_from
from omnivideo.contracts import Artifact, Event, Finished, Question, Turn, TurnOptions, check_prompt, refused
from omnivideo.errors import InvalidInput, OmniVideoError

Attach = Callable[[str | Path, str], Artifact]
THREAD_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def whole(snapshot: StateSnapshot) -> bool:
    """Whether nothing is left to run: the state after a turn's answer, or before the first turn.

    By its tasks: `next` leaves out a step that has run but whose result was not yet taken up.
    """
    return not snapshot.tasks


def options_of(**given: object) -> TurnOptions:
    """Raises InvalidInput that names the field and the allowed range."""
    try:
        return TurnOptions(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        raise refused(error) from None


class Thread:
    """`attach` stores a user's file.  Several threads may run at once, one turn of each at a time."""

    def __init__(self, graph: Any, name: str, attach: Attach):
        if not THREAD_ID.fullmatch(name):
            raise InvalidInput("thread", f"{name!r} is no thread id: 1 to 64 letters, digits, dots, dashes")
        self.graph = graph
        self.id = name
        self.attach = attach
        self.config = {"configurable": {"thread_id": name}}

    # ------------------------------------------------------------ beginning and branching

    def exists(self) -> bool:
        return bool(self.graph.get_state(self.config).values)

    def begin(self, values: dict[str, Any] | None = None) -> "Thread":
        """The first checkpoint: empty, or a copy of another thread's state."""
        empty = {"seed": seed_from(self.id), "turns": [], "artifacts": [], "current": None, "descriptions": {}}
        self.graph.update_state(self.config, values or empty, as_node="answer")
        return self

    def opened(self) -> "Thread":
        if not self.exists():
            raise InvalidInput("thread", f"there is no thread {self.id!r}")
        return self

    def fork(self, turn: int, name: str) -> "Thread":
        """A new thread that begins with this one's first `turn` turns (0 to all of them)."""
        branch = Thread(self.graph, name, self.attach)
        if branch.exists():
            raise InvalidInput("thread", f"there is a thread {name!r} already")
        past = self.after(turn)
        if past is None:
            raise InvalidInput("turn", f"{turn} is not a turn of this thread: 0 to {len(self.history())}")
        return branch.begin(past.values)

    def after(self, turns: int) -> StateSnapshot | None:
        """The state after so many turns; None where there never was one."""
        history = self.graph.get_state_history(self.config)
        return next((past for past in history if whole(past) and len(past.values["turns"]) == turns), None)

    # ------------------------------------------------------------ a turn

    def send(self, text: str, attachments: Sequence[str | Path | Artifact] = (), **options: object) -> Iterator[Event]:
        """Runs a turn and gives its events as they happen; the last one is Finished, or a Question.

        After a Question the next text sent is the reply.  A turn that a killed process left is finished first.
        `options` may hold think ("auto", "on", "off"), check (number of tries), seed, steps and guidance_scale.
        Raises InvalidInput before anything is changed, and OmniVideoError for a turn that failed, which leaves the
        thread as it was before the turn.
        """
        chosen = options_of(**options)
        text = check_prompt("text", text)
        made = [self.taken(one) for one in attachments]
        state = self.graph.get_state(self.config)
        if state.interrupts:
            if made:
                raise InvalidInput("attachments", "a question is open; reply to it in words first")
            yield from self.run(Command(resume=text), state)
            return
        if not whole(state):
            yield from self.run(None, state)
            state = self.graph.get_state(self.config)
        shown = [one.model_dump() for one in made]
        yield from self.run({"text": text, "attachments": shown, "options": chosen.model_dump()}, state)

    def taken(self, one: str | Path | Artifact) -> Artifact:
        return one if isinstance(one, Artifact) else self.attach(one, f"{self.id}/attached")

    def resume(self) -> Iterator[Event]:
        """Goes on with a turn that was cut short, if there is one."""
        state = self.graph.get_state(self.config)
        if not whole(state) and not state.interrupts:
            yield from self.run(None, state)

    def run(self, given: Any, state: StateSnapshot) -> Iterator[Event]:
        finished = False
        try:
            for event in self.graph.stream(given, self.config, stream_mode="custom", durability="sync"):
                finished = isinstance(event, Finished)
                yield event
        except OmniVideoError:
            self.abandon(len(state.values["turns"]))
            raise
        if not finished and (question := self.question()):
            yield Question(text=question)

    def abandon(self, turns: int) -> None:
        """Back to the state after so many turns; what the failed turn wrote stays in the past."""
        past = self.after(turns)
        assert past is not None, "a turn begins from a whole state"
        kept = {"current": past.values["current"], "failures": past.values.get("failures", 0) + 1}
        self.graph.update_state(past.config, kept, as_node="answer")

    async def asend(
        self, text: str, attachments: Sequence[str | Path | Artifact] = (), **options: object
    ) -> AsyncIterator[Event]:
        """`send` for an event loop: the same turn, run in a thread of its own."""
        loop = asyncio.get_running_loop()
        running = self.send(text, attachments, **options)
        with ThreadPoolExecutor(1, thread_name_prefix="turn") as pool:
            while (event := await loop.run_in_executor(pool, next, running, None)) is not None:
                yield event

    # ------------------------------------------------------------ what was said and made

    def question(self) -> str | None:
        """What the thread waits for an answer to."""
        waiting = self.graph.get_state(self.config).interrupts
        return str(waiting[0].value) if waiting else None

    def history(self) -> list[Turn]:
        return [Turn(**one) for one in self.graph.get_state(self.config).values.get("turns", [])]

    def artifacts(self) -> list[Artifact]:
        """All that was attached or made, in order."""
        return [Artifact(**one) for one in self.graph.get_state(self.config).values.get("artifacts", [])]

    def lineage(self, key: str | None = None) -> list[Artifact]:
        """An artifact (the last one) and what it was made from, newest first."""
        artifacts = self.artifacts()
        by_key = {one.key: one for one in artifacts}
        if key is not None and key not in by_key:
            raise InvalidInput("artifact", "this thread made no such artifact")
        line: list[Artifact] = []
        at = by_key[key] if key else artifacts[-1] if artifacts else None
        while at is not None and at not in line:
            line.append(at)
            at = by_key.get(at.source) if at.source else None
        return line
