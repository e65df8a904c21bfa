"""Turns that outlive the request that began them, and the process that runs them."""

import logging
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from omnivideo.agent.conversations import Conversations
from omnivideo.agent.thread import Thread, is_turn_complete, parse_turn_options
from omnivideo.api.errors import INTERNAL_ERROR, APIError, build_error_body, build_not_found_error, to_api_error
from omnivideo.contracts import Artifact, QuestionAsked, TurnCompleted, TurnEvent, WaitingNotice, check_prompt
from omnivideo.errors import ArtifactNotFound, InvalidInput, JobCancelled, ModelUnavailable, OmniVideoError, StoreError

log = logging.getLogger("omnivideo.api")
RETRY_TIMEOUT_SECONDS = (
    600.0  # seconds that a turn waits for a server of ours: a large language model is loaded for minutes
)


class TurnRunner:
    """Runs turns in threads of this process, and takes over those of processes that fell silent."""

    def __init__(
        self,
        turns: Any,
        jobs: Any,
        conversations: Conversations,
        heartbeat_timeout_seconds: float,
        max_concurrent_turns: int = 16,
    ):
        self.turns = turns
        self.jobs = jobs
        self.conversations = conversations
        self.heartbeat_timeout_seconds = heartbeat_timeout_seconds
        self.pool = ThreadPoolExecutor(max_concurrent_turns, thread_name_prefix="turn")
        self.running_rows: dict[str, Any] = {}  # rows of the turns that run here
        self.interrupt_reasons: dict[str, str] = {}  # why: "cancelled", or "lost" to another process
        self.stop_event = threading.Event()
        self.watch_thread = threading.Thread(target=self.poll_turns, daemon=True, name="turns")

    def start(self) -> "TurnRunner":
        self.watch_thread.start()
        return self

    def stop(self) -> None:
        """Leaves what runs to the next process."""
        self.stop_event.set()
        self.watch_thread.join()
        self.pool.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------ beginning

    def start_turn(
        self, turn_id: str, owner: str, thread_id: str, text: str, attachments: Sequence[Artifact] = (), **options: Any
    ) -> Any:
        """The new turn's row; what is wrong with it is said before anything is kept."""
        text, turn_options = check_prompt("text", text), parse_turn_options(**options)
        thread = self.get_thread(owner, thread_id)
        if attachments and thread.get_open_question():
            raise InvalidInput("attachments", "a question is open; reply to it in words first")
        turn_body = {
            "text": text,
            "attachments": [attachment.model_dump() for attachment in attachments],
            "options": turn_options.model_dump(),
            "is_reply": thread.get_open_question() is not None,
        }
        row = self.turns.create_turn(turn_id, thread_id, owner, len(thread.get_turns()) + 1, turn_body)
        if row is None and (row := self.turns.get_turn(turn_id, owner)) is not None:
            return row  # a twin of this request came first
        if row is None:
            raise APIError(409, "thread: a turn is running; wait for its end or cancel it", "thread", "busy")
        self.pool.submit(self.claim_and_run, row.id)
        return row

    def get_thread(self, owner: str, thread_id: str) -> Thread:
        if not self.turns.has_thread(thread_id, owner):
            raise build_not_found_error("thread", thread_id)
        thread: Thread = self.conversations.open_thread(thread_id, create=True, owner=owner)
        return thread

    # ------------------------------------------------------------ running

    def claim_and_run(self, turn_id: str) -> None:
        if (row := self.turns.claim_turn(turn_id)) is not None:
            self.run_to_end(row)

    def run_to_end(self, row: Any) -> None:
        """Runs the turn to its end and keeps all that it tells."""
        self.running_rows[row.id] = row
        try:
            state, error = self.retry_while_unavailable(row), None
        except (JobCancelled, TurnInterrupted):
            state, error = "cancelled", None
        except OmniVideoError as raised:
            api_error = to_api_error(raised)
            state, error = (
                "failed",
                build_error_body(api_error.status_code, api_error.message, api_error.param, api_error.code)["error"],
            )
        except Exception:
            log.exception("turn %s", row.id)
            state, error = "failed", build_error_body(500, INTERNAL_ERROR, None, "internal")["error"]
        finally:
            self.running_rows.pop(row.id, None)
            self.interrupt_reasons.pop(row.id, None)
        if not self.stop_event.is_set():
            with suppress(StoreError):  # silent then: another look takes it over and finds that it is done
                self.turns.end_turn(row, state, error)

    def retry_while_unavailable(self, row: Any) -> str:
        """Begins again where the thread stands, while what it needs is away for a moment."""
        deadline = time.monotonic() + RETRY_TIMEOUT_SECONDS
        while True:
            try:
                return self.run_turn(row)
            except Exception as error:
                if not is_transient(error) or time.monotonic() > deadline or self.stop_event.wait(1.0):
                    raise
                log.warning("turn %s waits: %s", row.id, type(error).__name__)
                with suppress(StoreError):  # where that can be told at all
                    self.emit_waiting(row, error)

    def emit_waiting(self, row: Any, error: Exception) -> None:
        """Tells who follows that the turn waits, unless nothing has come since that was told last."""
        event_kinds = [event["kind"] for _, event in self.turns.list_events(row.id)]
        if [kind for kind in event_kinds if kind != "plan"][-1:] == ["waiting"]:  # each attempt begins with the plan
            return
        text = (
            str(error)
            if isinstance(error, ModelUnavailable)
            else "something is away for a moment; this goes on by itself"
        )
        self.turns.append_event(row, WaitingNotice(text=text).model_dump())

    def run_turn(self, row: Any) -> str:
        thread = self.get_thread(row.owner, row.thread_id)
        previous_events, state = self.turns.list_events(row.id), "asks"
        events = self.iterate_events(
            row, thread, has_events=any(event["kind"] != "waiting" for _, event in previous_events)
        )
        for event in events:
            self.turns.append_event(row, event.model_dump())
            state = "done" if isinstance(event, TurnCompleted) else state
            if reason := self.interrupt_reasons.get(row.id):
                events.close()
                if reason == "cancelled":
                    thread.roll_back(row.number - 1)
                raise TurnInterrupted
        return state

    def iterate_events(self, row: Any, thread: Thread, has_events: bool) -> Generator[TurnEvent]:
        """Where the thread stands says what is left of the turn, whoever began it."""
        history = thread.get_turns()
        if len(history) >= row.number:
            yield TurnCompleted(turn=history[row.number - 1])
            return
        state = thread.graph.get_state(thread.config)
        if state.interrupts and (has_events or not row.body["is_reply"]):
            yield QuestionAsked(text=str(thread.get_open_question()))
        elif not is_turn_complete(state) and not state.interrupts:
            yield from thread.resume()
        else:
            attachments = [Artifact(**attachment) for attachment in row.body["attachments"]]
            yield from thread.send(row.body["text"], attachments, **row.body["options"])

    def cancel_turn(self, row: Any) -> None:
        self.turns.cancel_turn(row.id)
        self.jobs.cancel_by_prefix(row.owner, f"{row.thread_id}/")

    # ------------------------------------------------------------ looking after

    def poll_turns(self) -> None:
        while not self.stop_event.wait(min(1.0, self.heartbeat_timeout_seconds / 4)):
            try:
                self.send_heartbeats()
                self.take_over_lost_turns()
            except OmniVideoError as error:
                log.warning("%s", error)

    def send_heartbeats(self) -> None:
        for row in list(self.running_rows.values()):
            turn_state = self.turns.heartbeat(row)
            if turn_state != "wanted":
                self.interrupt_reasons[row.id] = turn_state
            if turn_state == "cancelled":  # the job that it waits for may be younger than the cancel
                self.jobs.cancel_by_prefix(row.owner, f"{row.thread_id}/")

    def take_over_lost_turns(self) -> None:
        while (row := self.turns.claim_lost_turn(self.heartbeat_timeout_seconds)) is not None:
            log.warning("turn %s: its process fell silent; it goes on here", row.id)
            self.pool.submit(self.run_to_end, row)


def is_transient(error: Exception) -> bool:
    """Whether it is a server of ours that is away: the store, the database (also under LangGraph), the MLLM."""
    if isinstance(error, ArtifactNotFound):
        return False
    return isinstance(error, StoreError | ModelUnavailable) or type(error).__module__.partition(".")[0].startswith(
        "psycopg"
    )


class TurnInterrupted(Exception):
    """The turn was cancelled, or another process has it by now."""
