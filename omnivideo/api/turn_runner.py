"""Runs the turns of the service's threads, independently of the requests that started them."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import suppress
from typing import Any

from opentelemetry import trace
from opentelemetry.propagate import extract, inject

from omnivideo.agent.conversations import Conversations
from omnivideo.agent.thread import Thread, parse_turn_options
from omnivideo.api.errors import (
    APIError,
    build_not_found_error,
    is_transient,
    log_if_internal,
    may_repeat,
    to_api_error,
)
from omnivideo.api.stores import UsageStore
from omnivideo.contracts import OPEN_STATES, Artifact, Lane
from omnivideo.errors import (
    InvalidInput,
    JobCancelled,
    ModelUnavailable,
    OmniVideoError,
    ServiceStopping,
    StoreError,
)
from omnivideo.ports import JobStore, TurnStore
from omnivideo.turns import (
    MAX_PROCESS_LOSSES,
    QuestionAsked,
    TurnCompleted,
    TurnEvent,
    TurnOptions,
    TurnRecord,
    WaitingNotice,
)

log = logging.getLogger("omnivideo.api")
TRACER = trace.get_tracer("omnivideo.api")
RETRY_TIMEOUT_SECONDS = 600.0  # how long a turn waits for an unavailable server: an MLLM takes minutes to load
ATTENDED_RETRY_TIMEOUT_SECONDS = 52.0  # the same, for a turn whose client waits for the answer
BEGINNING_EVENTS = ("plan", "action")  # of an attempt: they are repeated without any progress
RETRY_INTERVAL_SECONDS = 1.0
STOP_TIMEOUT_SECONDS = 5.0  # how long a stopping process waits for its turns to reach a point where they can stop
RESERVED_SLOTS = 2  # slots that the turns of a single owner do not occupy
POISON_ERROR = APIError(
    500, f"it stopped {MAX_PROCESS_LOSSES} processes in a row and will not be tried again", None, "poison"
).to_record()
MAX_YIELD_SECONDS, YIELD_POLL_SECONDS = 60.0, 0.1  # how long a request about a conversation lets turns go first


def capture_trace_context() -> dict[str, str]:
    """Return the trace context of the request that starts a turn, as headers, for the thread that runs the turn."""
    carrier: dict[str, str] = {}
    inject(carrier)
    return carrier


class TurnRunner:
    """Runs turns in threads of this process, and takes over the turns of processes that have stopped responding.

    A turn belongs to one process at a time, which claims it once it has a free slot and then sends heartbeats for it. A
    turn whose heartbeat is older than `heartbeat_timeout_seconds` is continued by another process from the last
    checkpoint of its thread. One owner's turns leave RESERVED_SLOTS slots to others.
    """

    def __init__(
        self,
        turns: TurnStore,
        jobs: JobStore,
        conversations: Conversations,
        heartbeat_timeout_seconds: float,
        max_concurrent_turns: int = 16,
        usage: UsageStore | None = None,
    ):
        self.turns = turns
        self.jobs = jobs
        self.usage = usage
        self.conversations = conversations
        self.heartbeat_timeout_seconds = heartbeat_timeout_seconds
        self.poll_seconds, self.next_poison_check_at = min(1.0, heartbeat_timeout_seconds / 4), 0.0
        self.max_concurrent_turns = max_concurrent_turns
        self.max_turns_per_owner = max(1, max_concurrent_turns - RESERVED_SLOTS)
        self.running_turns: dict[str, TurnRecord] = {}  # by id
        # "cancelled", "stopped", or "lost" to another process, by the turn's id and attempt: this process may claim a
        # turn again whose heartbeats came too late, and a late answer about the earlier attempt must not stop it.
        self.interrupt_reasons: dict[tuple[str, int], str] = {}
        self.last_event_times: dict[str, float] = {}  # turn id -> when its attempt last had an event
        self.stop_event, self.turns_changed = threading.Event(), threading.Event()
        self.threads = [
            threading.Thread(target=self.keep_turns_alive, daemon=True, name="turns-heartbeat"),
            threading.Thread(target=self.claim_turns, daemon=True, name="turns"),
        ]

    def start(self) -> "TurnRunner":
        for thread in self.threads:
            thread.start()
        return self

    def stop(self) -> None:
        """Stop, and put the running turns back into the queue, so that other processes continue them."""
        self.stop_event.set()
        self.turns_changed.set()
        for thread in self.threads:
            if thread.is_alive():
                thread.join()
        unfinished = list(self.running_turns.values())
        for turn in unfinished:
            self.interrupt_reasons[turn.id, turn.attempt] = "stopped"
        self.jobs.stop_followers()
        deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
        while self.running_turns and time.monotonic() < deadline:
            time.sleep(0.02)
        for turn in unfinished:  # those that have ended are left as they are
            with suppress(StoreError):
                self.turns.release_turn(turn)

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
        progress = thread.get_progress()
        is_reply = progress.question is not None
        if attachments and is_reply:
            raise InvalidInput("attachments", "a question is open; reply to it without attachments first")
        turn_body = {
            "text": text,
            "attachments": [attachment.model_dump() for attachment in attachments],
            "options": turn_options.model_dump(),
            "is_reply": is_reply,
            "question_id": progress.question_id,
            "lane": lane,
            "retry_timeout_seconds": retry_timeout_seconds,
            "client_fields": client_fields or {},
            "trace": capture_trace_context(),
        }
        return self.create_turn(turn_id, owner, thread.id, progress.num_turns + 1, turn_body)

    def refuse_turn(
        self, turn_id: str, owner: str, thread_id: str, error: InvalidInput, client_fields: dict[str, Any] | None = None
    ) -> TurnRecord:
        """Create a turn that has failed because a person's words or files cannot be used, and return it.

        The thread is unchanged. Raises APIError (409) if another turn is running in it.
        """
        thread = self.get_thread(owner, thread_id)
        record, body = to_api_error(error).to_record(), {"client_fields": client_fields or {}}
        return self.create_turn(turn_id, owner, thread.id, thread.get_progress().num_turns + 1, body, record)

    def create_turn(
        self, turn_id: str, owner: str, thread_id: str, number: int, body: dict[str, Any],
        error: dict[str, Any] | None = None,
    ) -> TurnRecord:  # fmt: skip
        """Create a turn, which has failed if `error` is given. Return it, or the turn that has the id."""
        turn = self.turns.create_turn(turn_id, thread_id, owner, number, body, error)
        existing_turn = turn or self.turns.get_turn(turn_id, owner)
        if existing_turn is None:
            raise APIError(409, "thread: a turn is running; wait until it ends, or cancel it", "thread", "busy")
        return existing_turn

    def get_thread(self, owner: str, thread_id: str, lane: Lane = "interactive") -> Thread:
        """Return the owner's thread; raise APIError (404) if there is none.

        Its first checkpoint may be missing, unless it is a fork: a killed process may have left a fork without one.
        """
        record = self.turns.get_thread(owner, thread_id)
        if record is None:
            raise build_not_found_error("thread", thread_id)
        if record.forked_from is None or record.forked_after is None:
            return self.conversations.get_thread(record.id, owner, lane)
        return self.conversations.open_fork(record.forked_from, record.forked_after, record.id, owner, lane)

    def delete_thread(self, owner: str, thread_id: str) -> None:
        """Delete the owner's thread and cancel what runs in it. Raises APIError (404) if there is none."""
        thread = self.turns.get_thread(owner, thread_id)
        if thread is None:
            raise build_not_found_error("thread", thread_id)
        for turn in self.turns.delete_thread(thread.id):
            self.cancel_turn(turn)

    def delete_turn(self, turn: TurnRecord) -> None:
        """Delete a turn, which is cancelled if it is open, and all that the thread keeps of it.

        The first turn takes its thread with it. Raises APIError (409) if later turns continue this one.
        """
        self.cancel_turn(turn)
        self.turns.wait_for_end(turn.id, turn.owner)
        others = [other for other in self.turns.list_turns(turn.thread_id) if other.id != turn.id]
        ended_turn = self.turns.get_turn(turn.id, turn.owner)
        if ended_turn is None:
            return
        has_state = ended_turn.state in ("done", "asks")
        is_continued = any(
            other.created_at > turn.created_at and other.state not in ("failed", "cancelled") for other in others
        )
        if (has_state and is_continued) or not self.turns.begin_deletion(turn):
            raise APIError(409, "id: later turns continue this one; delete those first, or the thread", "id", "busy")
        thread = self.get_thread(turn.owner, turn.thread_id)
        # A turn whose deletion was interrupted has failed, although the thread has it.
        if ended_turn.state == "asks" or (not is_continued and thread.get_progress().num_turns == turn.number):
            thread.remove_turns_after(turn.number - 1)
        self.turns.discard_turn(turn)
        if turn.number == 1 and not others:
            self.delete_thread(turn.owner, turn.thread_id)

    def find_live_turn(self, owner: str, turn_id: str) -> TurnRecord | None:
        """Return the owner's turn; wait until a cancelled one ends.

        Returns None if it was cancelled or deleted, or has failed in a way that a repetition may help.
        """
        turn = self.turns.get_turn(turn_id, owner)
        if turn is not None and turn.cancel_requested:
            self.turns.wait_for_end(turn_id, owner)
        is_live = turn is not None and not (turn.cancel_requested or turn.state == "cancelled" or may_repeat(turn))
        return turn if turn is not None and is_live and self.turns.has_thread(turn.thread_id, owner) else None

    def cancel_turn(self, turn: TurnRecord) -> None:
        """Cancel a turn. One that has ended is left alone, because the thread's open jobs belong to a later turn."""
        if turn.state not in OPEN_STATES:
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

    def claim_turns(self) -> None:
        """Claim turns and run them while slots are free, until the runner stops."""
        with self.turns.follow_new_turns(self.turns_changed.set):
            while not self.stop_event.is_set():
                self.turns_changed.clear()
                try:
                    self.claim_turns_once()
                except Exception as error:  # the database may be unavailable for a while
                    log.warning("turns: %s", error if isinstance(error, OmniVideoError) else type(error).__name__)
                self.turns_changed.wait(self.poll_seconds)

    def claim_turns_once(self) -> None:
        if time.monotonic() >= self.next_poison_check_at:  # every turn that begins or ends leads here
            self.next_poison_check_at = time.monotonic() + self.poll_seconds
            for turn_id in self.turns.fail_poisonous_turns(self.heartbeat_timeout_seconds, POISON_ERROR):
                log.error("turn %s has stopped several processes and will not be tried again", turn_id)
        while len(self.running_turns) < self.max_concurrent_turns and not self.stop_event.is_set():
            running_by_owner = Counter(turn.owner for turn in list(self.running_turns.values()))
            full_owners = [owner for owner, count in running_by_owner.items() if count >= self.max_turns_per_owner]
            turn = self.turns.claim_next_turn(self.heartbeat_timeout_seconds, full_owners, list(self.running_turns))
            if turn is None:
                return
            if turn.attempt > 1:
                log.warning("turn %s: its process has stopped; it continues here", turn.id)
            self.running_turns[turn.id] = turn  # from now on, heartbeats are sent for it
            threading.Thread(target=self.run_to_end, args=(turn,), daemon=True, name="turn").start()

    def run_to_end(self, turn: TurnRecord) -> None:
        """Run a claimed turn and store its end state."""
        state, error, started_at = "failed", None, time.monotonic()
        log.info("turn %s: attempt %d begins", turn.id, turn.attempt)
        try:
            with TRACER.start_as_current_span(
                "turn", extract(turn.body.get("trace", {})), attributes={"turn": turn.id}
            ):
                state = self.retry_while_unavailable(turn)
        except (JobCancelled, ServiceStopping, TurnInterrupted):
            state = "cancelled"
        except Exception as raised:
            log_if_internal(raised, f"turn {turn.id}")
            error = to_api_error(raised).to_record()
        seconds = time.monotonic() - started_at
        log.info("turn %s: attempt %d ends as %s after %.1f s", turn.id, turn.attempt, state, seconds)
        try:
            if not self.stop_event.is_set():
                # If the store is unavailable, the turn is taken over later and found to be complete.
                with suppress(StoreError):
                    self.turns.end_turn(turn, state, error)
                with suppress(OmniVideoError):
                    self.record_tokens(turn)
        finally:
            self.interrupt_reasons.pop((turn.id, turn.attempt), None)
            if self.running_turns.get(turn.id) is turn:
                del self.running_turns[turn.id]
                self.last_event_times.pop(turn.id, None)
            self.turns_changed.set()

    def record_tokens(self, turn: TurnRecord) -> None:
        """Count the tokens of the turn's text, and of its answer and reasoning, for the turn's owner."""
        if self.usage is None:
            return
        events = [event for _, event in self.turns.list_events(turn.id)]
        answer = "".join(event["delta"] for event in events if event["kind"] in ("text", "thinking"))
        prompt_tokens, answer_tokens = map(self.conversations.mllm.count_tokens, (turn.body["text"], answer))
        self.usage.add_usage(turn.owner, prompt_tokens=prompt_tokens, answer_tokens=answer_tokens)

    def retry_while_unavailable(self, turn: TurnRecord) -> str:
        """Run the turn, and continue it from the thread's last checkpoint after a server was unavailable.

        Returns the turn's end state. Raises the last error if another attempt could end later than the turn's
        `retry_timeout_seconds` after the last sign of life, and TurnInterrupted.
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
                    self.stop_if_interrupted(turn)

    def stop_if_interrupted(self, turn: TurnRecord, events: Generator[TurnEvent] | None = None) -> None:
        """Raise TurnInterrupted if the turn must stop. A cancelled turn is rolled back first.

        While the database was unavailable, no heartbeats were stored; this process may have claimed the turn again.
        """
        is_superseded = self.running_turns.get(turn.id, turn) is not turn
        if reason := "lost" if is_superseded else self.interrupt_reasons.get((turn.id, turn.attempt)):
            if events is not None:
                events.close()
            if reason == "cancelled":
                with suppress(Exception):  # if the database is unavailable, the thread's next turn does it
                    self.roll_back_unfinished(turn)
            raise TurnInterrupted

    def roll_back_unfinished(self, turn: TurnRecord) -> None:
        """Return the thread to its state before the turn, unless the turn is complete there."""
        thread = self.get_thread(turn.owner, turn.thread_id)
        if thread.exists() and thread.get_progress().num_turns < turn.number:
            thread.roll_back(turn.number - 1)

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
        earlier_kinds, state = {event["kind"] for _, event in self.turns.list_events(turn.id)}, "asks"
        events = self.iterate_events(turn, thread, has_started=bool(earlier_kinds - {"waiting"}))
        for event in events:
            # A process may have ended between the last event and the checkpoint after it.
            if not ("done" in earlier_kinds and isinstance(event, TurnCompleted)):
                self.turns.append_event(turn, event.model_dump())
            self.last_event_times[turn.id] = time.monotonic()
            state = "done" if isinstance(event, TurnCompleted) else state
            self.stop_if_interrupted(turn, events)
        return state

    def iterate_events(self, turn: TurnRecord, thread: Thread, has_started: bool) -> Generator[TurnEvent]:
        """Yield the rest of the turn's events. The thread's checkpoint shows how far an earlier attempt got.

        A turn that ended without being rolled back may have left steps to run. Those of another turn are never run:
        only a turn that has started itself, or that replies to a question, continues them.
        """
        progress = thread.get_progress()
        if progress.num_turns >= turn.number:
            yield TurnCompleted(turn=thread.get_turn(turn.number))
        elif progress.question is not None and turn.has_asked(progress, has_started):
            yield QuestionAsked(text=progress.question)
        elif progress.has_unfinished_turn and (has_started or turn.body["is_reply"]):
            yield from thread.resume()
        else:
            if progress.has_unfinished_turn:
                thread.roll_back(turn.number - 1)
            attachments = [Artifact.parse_stored(attachment) for attachment in turn.body["attachments"]]
            options = TurnOptions.parse_stored(turn.body["options"]).model_dump()
            yield from thread.send(turn.body["text"], attachments, **options)

    # ------------------------------------------------------------ heartbeats

    def keep_turns_alive(self) -> None:
        """Send heartbeats for every claimed turn, until the runner stops."""
        while not self.stop_event.wait(self.poll_seconds):
            try:
                self.send_heartbeats()
            except OmniVideoError as error:
                log.warning("%s", error)

    def send_heartbeats(self) -> None:
        for turn in list(self.running_turns.values()):
            turn_state = self.turns.heartbeat(turn)
            if turn_state != "wanted":
                self.interrupt_reasons[turn.id, turn.attempt] = turn_state
            if turn_state == "cancelled":  # the turn may have submitted a job after cancel_turn was called
                self.jobs.cancel_by_prefix(turn.owner, f"{turn.thread_id}/")


class TurnInterrupted(Exception):
    """The turn was cancelled, or another process runs it now."""
