"""Runs the turns of the service's threads, independently of the requests that started them."""

import logging
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from omnivideo.agent.conversations import Conversations
from omnivideo.agent.thread import Thread, is_turn_complete, parse_turn_options
from omnivideo.api.errors import APIError, build_not_found_error, log_if_internal, to_api_error
from omnivideo.contracts import Artifact, Lane
from omnivideo.errors import ArtifactNotFound, InvalidInput, JobCancelled, ModelUnavailable, OmniVideoError, StoreError
from omnivideo.ports import JobStore, TurnStore
from omnivideo.turns import QuestionAsked, TurnCompleted, TurnEvent, TurnRecord, WaitingNotice

log = logging.getLogger("omnivideo.api")
RETRY_TIMEOUT_SECONDS = 600.0  # how long a turn waits for an unavailable server: an MLLM takes minutes to load
ATTENDED_RETRY_TIMEOUT_SECONDS = 52.0  # the same, for a turn whose client waits for the answer
BEGINNING_EVENTS = ("plan", "action")  # of an attempt: they are repeated without any progress
RETRY_INTERVAL_SECONDS = 1.0
OPEN_TURN_STATES = ("queued", "running")
MAX_YIELD_SECONDS, YIELD_POLL_SECONDS = 60.0, 0.1  # how long a request about a conversation lets turns go first


class TurnRunner:
    """Runs turns in threads of this process, and takes over the turns of processes that have stopped responding.

    A turn belongs to one process at a time, which sends heartbeats for it. A turn whose heartbeat is older than
    `heartbeat_timeout_seconds` is continued by another process from the last checkpoint of its thread.
    """

    def __init__(
        self,
        turns: TurnStore,
        jobs: JobStore,
        conversations: Conversations,
        heartbeat_timeout_seconds: float,
        max_concurrent_turns: int = 16,
    ):
        self.turns = turns
        self.jobs = jobs
        self.conversations = conversations
        self.heartbeat_timeout_seconds = heartbeat_timeout_seconds
        self.pool = ThreadPoolExecutor(max_concurrent_turns, thread_name_prefix="turn")
        self.running_turns: dict[str, TurnRecord] = {}  # by id
        self.interrupt_reasons: dict[str, str] = {}  # turn id -> "cancelled", or "lost" to another process
        self.last_event_times: dict[str, float] = {}  # turn id -> when its attempt last had an event
        self.stop_event = threading.Event()
        self.heartbeat_thread = threading.Thread(target=self.keep_turns_alive, daemon=True, name="turns")

    def start(self) -> "TurnRunner":
        self.heartbeat_thread.start()
        return self

    def stop(self) -> None:
        """Stop without ending the running turns; another process will continue them."""
        self.stop_event.set()
        self.heartbeat_thread.join()
        self.pool.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------ starting and cancelling

    def start_turn(
        self,
        turn_id: str,
        owner: str,
        thread_id: str,
        text: str,
        attachments: Sequence[Artifact] = (),
        *,
        lane: Lane = "interactive",
        retry_timeout_seconds: float = RETRY_TIMEOUT_SECONDS,
        client_fields: dict[str, Any] | None = None,
        **options: Any,
    ) -> TurnRecord:
        """Create a turn, start it, and return it. If the id exists, return the turn that has it.

        Its clips are rendered in the lane. `client_fields` are stored with the turn, for the route that has started it.
        Raises InvalidInput before anything is stored, and APIError if the thread does not exist (404) or another turn
        is running in it (409).
        """
        text = self.conversations.text_limits.check_message("text", text)
        turn_options = parse_turn_options(**options)
        thread = self.get_thread(owner, thread_id)
        is_reply = thread.get_open_question() is not None
        if attachments and is_reply:
            raise InvalidInput("attachments", "a question is open; reply to it without attachments first")
        turn_body = {
            "text": text,
            "attachments": [attachment.model_dump() for attachment in attachments],
            "options": turn_options.model_dump(),
            "is_reply": is_reply,
            "lane": lane,
            "retry_timeout_seconds": retry_timeout_seconds,
            "client_fields": client_fields or {},
        }
        turn, is_new = self.create_turn(turn_id, owner, thread, turn_body)
        if is_new:
            self.pool.submit(self.claim_and_run, turn.id)
        return turn

    def refuse_turn(
        self, turn_id: str, owner: str, thread_id: str, error: InvalidInput, client_fields: dict[str, Any] | None = None
    ) -> TurnRecord:
        """Create a turn that has failed because a person's words or files cannot be used, and return it.

        The thread is unchanged. Raises APIError (409) if another turn is running in it.
        """
        thread = self.get_thread(owner, thread_id)
        turn, is_new = self.create_turn(turn_id, owner, thread, {"client_fields": client_fields or {}})
        if is_new and (claimed := self.turns.claim_turn(turn.id)) is not None:
            self.turns.end_turn(claimed, "failed", to_api_error(error).to_record())
        return turn

    def create_turn(self, turn_id: str, owner: str, thread: Thread, body: dict[str, Any]) -> tuple[TurnRecord, bool]:
        """Create a turn. Return it, or the turn that has the id, and whether it is new."""
        turn = self.turns.create_turn(turn_id, thread.id, owner, len(thread.get_turns()) + 1, body)
        existing_turn = turn or self.turns.get_turn(turn_id, owner)
        if existing_turn is None:
            raise APIError(409, "thread: a turn is running; wait until it ends, or cancel it", "thread", "busy")
        return existing_turn, turn is not None

    def get_thread(self, owner: str, thread_id: str, lane: Lane = "interactive") -> Thread:
        """Return the owner's thread; raise APIError (404) if there is none."""
        if not self.turns.has_thread(thread_id, owner):
            raise build_not_found_error("thread", thread_id)
        return self.conversations.open_thread(thread_id, create=True, owner=owner, lane=lane)

    def find_live_turn(self, owner: str, turn_id: str) -> TurnRecord | None:
        """Return the owner's turn, or None if it was cancelled or deleted; wait until a cancelled one ends."""
        turn = self.turns.get_turn(turn_id, owner)
        if turn is not None and turn.cancel_requested:
            self.turns.wait_for_end(turn_id, owner)
        is_live = turn is not None and not (turn.cancel_requested or turn.state == "cancelled")
        return turn if turn is not None and is_live and self.turns.has_thread(turn.thread_id, owner) else None

    def cancel_turn(self, turn: TurnRecord) -> None:
        """Cancel a turn. One that has ended is left alone, because the thread's open jobs belong to a later turn."""
        if turn.state not in OPEN_TURN_STATES:
            return
        self.turns.cancel_turn(turn.id)
        self.jobs.cancel_by_prefix(turn.owner, f"{turn.thread_id}/")

    def wait_until_idle(self, owner: str, timeout_seconds: float = MAX_YIELD_SECONDS) -> None:
        """Wait while an interactive turn of the owner is open, but not longer than the timeout."""
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline and self.turns.has_open_turn(owner, exclude_lane="batch"):
            if self.stop_event.wait(YIELD_POLL_SECONDS):
                return

    # ------------------------------------------------------------ running

    def claim_and_run(self, turn_id: str) -> None:
        if (turn := self.turns.claim_turn(turn_id)) is not None:
            self.run_to_end(turn)

    def run_to_end(self, turn: TurnRecord) -> None:
        """Run a claimed turn and store its end state."""
        self.running_turns[turn.id] = turn
        state, error = "failed", None
        try:
            state = self.retry_while_unavailable(turn)
        except (JobCancelled, TurnInterrupted):
            state = "cancelled"
        except Exception as raised:
            log_if_internal(raised, f"turn {turn.id}")
            error = to_api_error(raised).to_record()
        finally:
            self.running_turns.pop(turn.id, None)
            self.interrupt_reasons.pop(turn.id, None)
            self.last_event_times.pop(turn.id, None)
        if not self.stop_event.is_set():
            # If the store is unavailable, the turn is taken over later and found to be complete.
            with suppress(StoreError):
                self.turns.end_turn(turn, state, error)

    def retry_while_unavailable(self, turn: TurnRecord) -> str:
        """Run the turn, and continue it from the thread's last checkpoint after a server was unavailable.

        Returns the turn's end state. Raises the last error if another attempt could end later than the turn's
        `retry_timeout_seconds` after the last sign of life.
        """
        timeout_seconds = turn.body.get("retry_timeout_seconds", RETRY_TIMEOUT_SECONDS)
        outage_started_at = None
        while True:
            self.last_event_times[turn.id] = time.monotonic()
            try:
                return self.run_turn(turn)
            except Exception as error:
                now = time.monotonic()
                silent_seconds = now - self.last_event_times[turn.id]
                if outage_started_at is None or self.has_progressed(turn):
                    outage_started_at = now - silent_seconds
                if not is_transient(error) or now + silent_seconds > outage_started_at + timeout_seconds:
                    raise
                if self.stop_event.wait(RETRY_INTERVAL_SECONDS):
                    raise
                log.warning("turn %s waits: %s", turn.id, type(error).__name__)
                with suppress(StoreError):  # the unavailable server may be the database
                    self.emit_waiting(turn, error)

    def has_progressed(self, turn: TurnRecord) -> bool:
        """Return whether the last attempt got further than all earlier ones, each of which begins with a plan."""
        counts = [0]
        with suppress(StoreError):
            for _, event in self.turns.list_events(turn.id):
                if event["kind"] == "plan":
                    counts.append(0)
                counts[-1] += event["kind"] not in (*BEGINNING_EVENTS, "waiting")
        return counts[-1] > max(counts[:-1], default=0)

    def emit_waiting(self, turn: TurnRecord, error: Exception) -> None:
        """Notify the turn's followers that it waits, unless the last event already said so."""
        event_kinds = [event["kind"] for _, event in self.turns.list_events(turn.id)]
        if [kind for kind in event_kinds if kind not in BEGINNING_EVENTS][-1:] == ["waiting"]:
            return
        text = str(error) if isinstance(error, ModelUnavailable) else "a server is unavailable; the turn will continue"
        self.turns.append_event(turn, WaitingNotice(text=text).model_dump())

    def run_turn(self, turn: TurnRecord) -> str:
        """Run the turn once and store its events. Returns "done" or "asks"; raises TurnInterrupted."""
        thread = self.get_thread(turn.owner, turn.thread_id, turn.body.get("lane", "interactive"))
        previous_events, state = self.turns.list_events(turn.id), "asks"
        has_started = any(event["kind"] != "waiting" for _, event in previous_events)
        events = self.iterate_events(turn, thread, has_started)
        for event in events:
            self.turns.append_event(turn, event.model_dump())
            self.last_event_times[turn.id] = time.monotonic()
            state = "done" if isinstance(event, TurnCompleted) else state
            if reason := self.interrupt_reasons.get(turn.id):
                events.close()
                if reason == "cancelled":
                    thread.roll_back(turn.number - 1)
                raise TurnInterrupted
        return state

    def iterate_events(self, turn: TurnRecord, thread: Thread, has_started: bool) -> Generator[TurnEvent]:
        """Yield the rest of the turn's events. The thread's checkpoint shows how far an earlier attempt got."""
        completed_turns = thread.get_turns()
        if len(completed_turns) >= turn.number:
            yield TurnCompleted(turn=completed_turns[turn.number - 1])
            return
        state = thread.graph.get_state(thread.config)
        if state.interrupts and (has_started or not turn.body["is_reply"]):
            yield QuestionAsked(text=str(thread.get_open_question()))
        elif not is_turn_complete(state) and not state.interrupts:
            yield from thread.resume()
        else:
            attachments = [Artifact(**attachment) for attachment in turn.body["attachments"]]
            yield from thread.send(turn.body["text"], attachments, **turn.body["options"])

    # ------------------------------------------------------------ heartbeats

    def keep_turns_alive(self) -> None:
        """Send heartbeats and take over lost turns, until the runner stops."""
        while not self.stop_event.wait(min(1.0, self.heartbeat_timeout_seconds / 4)):
            try:
                self.send_heartbeats()
                self.take_over_lost_turns()
            except OmniVideoError as error:
                log.warning("%s", error)

    def send_heartbeats(self) -> None:
        for turn in list(self.running_turns.values()):
            turn_state = self.turns.heartbeat(turn)
            if turn_state != "wanted":
                self.interrupt_reasons[turn.id] = turn_state
            if turn_state == "cancelled":  # the turn may have submitted a job after cancel_turn was called
                self.jobs.cancel_by_prefix(turn.owner, f"{turn.thread_id}/")

    def take_over_lost_turns(self) -> None:
        while (turn := self.turns.claim_lost_turn(self.heartbeat_timeout_seconds)) is not None:
            log.warning("turn %s: its process has stopped responding; it continues here", turn.id)
            self.pool.submit(self.run_to_end, turn)


def is_transient(error: Exception) -> bool:
    """Return whether the error means that the store, the MLLM or the database (also LangGraph's) is unavailable."""
    if isinstance(error, ArtifactNotFound):
        return False
    is_database_error = type(error).__module__.partition(".")[0].startswith("psycopg")
    return isinstance(error, StoreError | ModelUnavailable) or is_database_error


class TurnInterrupted(Exception):
    """The turn was cancelled, or another process runs it now."""
