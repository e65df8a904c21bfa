"""Turns that outlive the request that began them, and the process that runs them."""

import logging
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from omnivideo.agent.thread import Thread, options_of, whole
from omnivideo.api.errors import OURS, WireError, body, not_found, of
from omnivideo.api.rooms import Rooms
from omnivideo.contracts import Artifact, Event, Finished, Question, Waiting, check_prompt
from omnivideo.errors import InvalidInput, JobCancelled, ModelAway, NotStored, OmniVideoError, StoreError

log = logging.getLogger("omnivideo.api")
PATIENCE = 600.0  # seconds that a turn waits for a server of ours: a large language model is loaded for minutes


class Runner:
    """Runs turns in threads of this process, and takes over those of processes that fell silent."""

    def __init__(self, rooms: Rooms, at_once: int = 16):
        self.rooms = rooms
        self.silent = rooms.settings.lost_after
        self.pool = ThreadPoolExecutor(at_once, thread_name_prefix="turn")
        self.mine: dict[str, Any] = {}  # rows of the turns that run here
        self.unwanted: dict[str, str] = {}  # why: "cancelled", or "lost" to another process
        self.over = threading.Event()
        self.watch = threading.Thread(target=self.look, daemon=True, name="turns")

    def start(self) -> "Runner":
        self.watch.start()
        return self

    def stop(self) -> None:
        """Leaves what runs to the next process."""
        self.over.set()
        self.watch.join()
        self.pool.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------ beginning

    def begin(
        self, turn: str, owner: str, name: str, text: str, attachments: Sequence[Artifact] = (), **options: Any
    ) -> Any:
        """The new turn's row; what is wrong with it is said before anything is kept."""
        text, chosen = check_prompt("text", text), options_of(**options)
        thread = self.thread(owner, name)
        if attachments and thread.question():
            raise InvalidInput("attachments", "a question is open; reply to it in words first")
        made = {
            "text": text,
            "attachments": [one.model_dump() for one in attachments],
            "options": chosen.model_dump(),
            "reply": thread.question() is not None,
        }
        row = self.rooms.turns.add(turn, name, owner, len(thread.history()) + 1, made)
        if row is None and (row := self.rooms.turns.get(turn, owner)) is not None:
            return row  # a twin of this request came first
        if row is None:
            raise WireError(409, "thread: a turn is running; wait for its end or cancel it", "thread", "busy")
        self.pool.submit(self.run, row.id)
        return row

    def thread(self, owner: str, name: str) -> Thread:
        if not self.rooms.turns.has_thread(name, owner):
            raise not_found("thread", name)
        found: Thread = self.rooms.conversations.thread(name, create=True, owner=owner)
        return found

    # ------------------------------------------------------------ running

    def run(self, name: str) -> None:
        if (row := self.rooms.turns.claim(name)) is not None:
            self.play(row)

    def play(self, row: Any) -> None:
        """Runs the turn to its end and keeps all that it tells."""
        self.mine[row.id] = row
        try:
            state, error = self.patiently(row), None
        except (JobCancelled, Unwanted):
            state, error = "cancelled", None
        except OmniVideoError as raised:
            wire = of(raised)
            state, error = "failed", body(wire.status, wire.message, wire.param, wire.code)["error"]
        except Exception:
            log.exception("turn %s", row.id)
            state, error = "failed", body(500, OURS, None, "internal")["error"]
        finally:
            self.mine.pop(row.id, None)
            self.unwanted.pop(row.id, None)
        if not self.over.is_set():
            with suppress(StoreError):  # silent then: another look takes it over and finds that it is done
                self.rooms.turns.end(row, state, error)

    def patiently(self, row: Any) -> str:
        """Begins again where the thread stands, while what it needs is away for a moment."""
        until = time.monotonic() + PATIENCE
        while True:
            try:
                return self.played(row)
            except Exception as error:
                if not passes(error) or time.monotonic() > until or self.over.wait(1.0):
                    raise
                log.warning("turn %s waits: %s", row.id, type(error).__name__)
                with suppress(StoreError):  # where that can be told at all
                    self.waits(row, error)

    def waits(self, row: Any, error: Exception) -> None:
        """Tells who follows that the turn waits, unless nothing has come since that was told last."""
        told = [event["kind"] for _, event in self.rooms.turns.events_of(row.id)]
        if [kind for kind in told if kind != "plan"][-1:] == ["waiting"]:  # each attempt begins with the plan
            return
        text = str(error) if isinstance(error, ModelAway) else "something is away for a moment; this goes on by itself"
        self.rooms.turns.told(row, len(told) + 1, Waiting(text=text).model_dump())

    def played(self, row: Any) -> str:
        thread = self.thread(row.owner, row.thread)
        before, state = self.rooms.turns.events_of(row.id), "asks"
        events = self.events(row, thread, told=any(event["kind"] != "waiting" for _, event in before))
        for number, event in enumerate(events, start=len(before) + 1):
            self.rooms.turns.told(row, number, event.model_dump())
            state = "done" if isinstance(event, Finished) else state
            if why := self.unwanted.get(row.id):
                events.close()
                if why == "cancelled":
                    thread.abandon(row.number - 1)
                raise Unwanted
        return state

    def events(self, row: Any, thread: Thread, told: bool) -> Generator[Event]:
        """Where the thread stands says what is left of the turn, whoever began it."""
        history = thread.history()
        if len(history) >= row.number:
            yield Finished(turn=history[row.number - 1])
            return
        state = thread.graph.get_state(thread.config)
        if state.interrupts and (told or not row.body["reply"]):
            yield Question(text=str(thread.question()))
        elif not whole(state) and not state.interrupts:
            yield from thread.resume()
        else:
            shown = [Artifact(**one) for one in row.body["attachments"]]
            yield from thread.send(row.body["text"], shown, **row.body["options"])

    def cancel(self, row: Any) -> None:
        self.rooms.turns.cancel(row.id)
        self.rooms.jobs.cancel_of(row.owner, f"{row.thread}/")

    # ------------------------------------------------------------ looking after

    def look(self) -> None:
        while not self.over.wait(min(1.0, self.silent / 4)):
            try:
                self.beat()
                self.take_over()
            except OmniVideoError as error:
                log.warning("%s", error)

    def beat(self) -> None:
        for row in list(self.mine.values()):
            found = self.rooms.turns.beat(row)
            if found != "wanted":
                self.unwanted[row.id] = found
            if found == "cancelled":  # the job that it waits for may be younger than the cancel
                self.rooms.jobs.cancel_of(row.owner, f"{row.thread}/")

    def take_over(self) -> None:
        while (row := self.rooms.turns.claim_lost(self.silent)) is not None:
            log.warning("turn %s: its process fell silent; it goes on here", row.id)
            self.pool.submit(self.play, row)


def passes(error: Exception) -> bool:
    """Whether it is a server of ours that is away: the store, the database (also under LangGraph), the MLLM."""
    if isinstance(error, NotStored):
        return False
    return isinstance(error, StoreError | ModelAway) or type(error).__module__.partition(".")[0].startswith("psycopg")


class Unwanted(Exception):
    """The turn was cancelled, or another process has it by now."""
