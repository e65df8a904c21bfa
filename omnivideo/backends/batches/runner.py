"""Batches at work: lines in, one line out for each, whoever dies in between.

What is known of a line is in the database: its jobs, under ids that follow from batch and line, and then its outcome,
which is written once.  A runner holds nothing else that matters, so another one goes on where it was: jobs that are
there are not asked for again, lines that have an outcome are left alone.
"""

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Collection
from typing import Any

from omnivideo.backends.batches.active_batch import CHAT_ENDPOINT, ActiveBatch, BatchLinePort
from omnivideo.contracts import JobStatus
from omnivideo.errors import ArtifactNotFound, ModelUnavailable, OmniVideoError, ServiceBusy, StoreError
from omnivideo.ports import ObjectStore
from omnivideo.storage.database.batches import BatchRepository, LineOutcome
from omnivideo.storage.database.files import FileRepository
from omnivideo.storage.database.jobs import JobRepository

log = logging.getLogger("omnivideo.batches")
MAX_BATCH_LINES = 50_000
MAX_REPORTED_ERRORS = 100  # wrong lines that are named
COMPLETION_WINDOW_SECONDS = 86_400.0  # seconds after which a batch expires
MAX_ACTIVE_BATCHES = 8  # batches that one runner works on at the same time
SUBMIT_SLICE_SECONDS = 1.0  # seconds that a batch may submit before the others have their turn
OUTCOME_CHUNK_SIZE = 500  # outcomes that are written or read at once
RETRYABLE_ERRORS = (ServiceBusy, StoreError, ModelUnavailable)  # no fault of the line: it is tried again
INTERNAL_ERROR = {"code": "internal", "message": "something went wrong on our side"}
ChatResponder = Callable[[str, dict[str, Any]], dict[str, Any]]


class BatchRunner:
    """Works batches off in a thread of this process.  Any number of processes may.

    `answer_chat` answers a chat line; `heartbeat_timeout_seconds` is when another runner counts as lost, in
    seconds; `max_open_jobs` bounds the jobs that one batch has open.
    """

    def __init__(
        self, batches: BatchRepository, files: FileRepository, jobs: JobRepository, store: ObjectStore,
        notify_workers: Callable[[], None], line_port: BatchLinePort, answer_chat: ChatResponder,
        heartbeat_timeout_seconds: float = 15.0, max_open_jobs: int = 200, poll_seconds: float = 0.2,
    ):  # fmt: skip
        self.batches = batches
        self.files = files
        self.jobs = jobs
        self.store = store
        self.notify_workers = notify_workers
        self.line_port = line_port
        self.answer_chat = answer_chat
        self.heartbeat_timeout_seconds = heartbeat_timeout_seconds
        self.max_open_jobs = max_open_jobs
        self.poll_seconds = poll_seconds
        self.runner_name = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self.active_batches: dict[str, ActiveBatch] = {}
        self.stop_event = threading.Event()
        self.threads = [
            threading.Thread(target=self.run, daemon=True, name="batches"),
            threading.Thread(target=self.send_heartbeats, daemon=True, name="batches-beat"),
        ]

    def start(self) -> "BatchRunner":
        for thread in self.threads:
            thread.start()
        return self

    def stop(self) -> None:
        """Leaves what it holds to the next runner."""
        self.stop_event.set()
        for thread in self.threads:
            thread.join()
        self.batches.release_batches(self.runner_name)
        for batch_id in list(self.active_batches):
            self.release_batch(batch_id)

    def send_heartbeats(self) -> None:
        """Lives while a line takes its time."""
        while not self.stop_event.wait(self.heartbeat_timeout_seconds / 4):
            try:
                self.batches.heartbeat_batches(self.runner_name, list(self.active_batches))
            except OmniVideoError as error:
                log.warning("%s", error)

    def run(self) -> None:
        while not self.stop_event.wait(self.poll_seconds if self.active_batches else 5 * self.poll_seconds):
            try:
                self.run_once()
            except OmniVideoError as error:
                log.warning("%s", error)
                self.stop_event.wait(1.0)
            except Exception:
                log.exception("batches")
                self.stop_event.wait(1.0)

    # ------------------------------------------------------------ one round

    def run_once(self) -> None:
        """Takes on what nobody works on, and brings each batch that it holds a little further."""
        while len(self.active_batches) < MAX_ACTIVE_BATCHES and (
            row := self.batches.claim_batch(self.runner_name, self.heartbeat_timeout_seconds)
        ):
            self.activate_batch(row)
        for batch in list(self.active_batches.values()):
            try:
                self.advance_batch(batch)
                batch.consecutive_faults = 0
            except RETRYABLE_ERRORS:
                raise
            except Exception:
                log.exception("batch %s", batch.id)
                self.record_fault(batch)

    def activate_batch(self, row: Any) -> None:
        try:
            data = self.store.get(self.batches.get_batch_input_key(row.id))
        except ArtifactNotFound:
            self.reject_batch(row, [{"code": "not_found", "message": "the input file is not here any more"}])
            return
        log.info("batch %s: %s", row.id, row.state)
        self.release_batch(row.id)  # after a silence of our own somebody else may have had it
        self.active_batches[row.id] = ActiveBatch(row, data, self.batches.load_line_results(row.id))

    def record_fault(self, batch: ActiveBatch) -> None:
        """A batch that we fail at three times in a row fails itself, and no other one has to wait for it."""
        batch.consecutive_faults += 1
        if batch.consecutive_faults == 3 and (row := self.batches.get_claimed_batch(batch.id, self.runner_name)):
            self.reject_batch(row, [INTERNAL_ERROR])

    def advance_batch(self, batch: ActiveBatch) -> None:
        row = self.batches.get_claimed_batch(batch.id, self.runner_name)
        if row is None:
            self.release_batch(batch.id)
        elif row.state == "validating":
            self.validate_lines(batch, row)
        elif row.state == "cancelling" and not row.counts["total"]:
            self.close_batch(batch, row, "cancelled")
        else:
            self.process_lines(batch, row)

    def process_lines(self, batch: ActiveBatch, row: Any) -> None:
        if row.state == "cancelling":
            batch.stop_reason = "batch_cancelled"
        elif row.state == "in_progress" and time.time() > row.created_at + COMPLETION_WINDOW_SECONDS:
            batch.stop_reason = "batch_expired"
        total = row.counts["total"]
        self.submit_lines(batch, total)
        self.collect_outcomes(batch, total)
        if len(batch.succeeded_by_line) == total:
            self.finish_batch(batch, row)

    def release_batch(self, batch_id: str) -> None:
        if (batch := self.active_batches.pop(batch_id, None)) is not None:
            batch.close()

    # ------------------------------------------------------------ validating

    def validate_lines(self, batch: ActiveBatch, row: Any) -> None:
        """Every line is looked at before the first is worked on; what is wrong with them is said by line."""
        line_errors: list[dict[str, Any]] = []
        seen_custom_ids: set[str] = set()
        total = 0
        for total, (number, data) in enumerate(batch.read_lines(), start=1):
            if line_error := self.find_line_error(number, data, batch.endpoint, seen_custom_ids):
                line_errors.append(line_error)
            if len(line_errors) == MAX_REPORTED_ERRORS or total > MAX_BATCH_LINES:
                break
        if not 1 <= total <= MAX_BATCH_LINES:
            line_errors = [
                {"code": "too_many_lines" if total else "empty", "message": f"allowed: 1 to {MAX_BATCH_LINES} lines"}
            ]
        if line_errors:
            self.reject_batch(row, line_errors)
        else:
            self.batches.transition_batch(row, "in_progress", self.runner_name, counts=batch.count_lines(total))

    def find_line_error(
        self, number: int, data: bytes, endpoint: str, seen_custom_ids: set[str]
    ) -> dict[str, Any] | None:
        try:
            custom_id, _, _ = self.line_port.parse_line(data, endpoint)
        except OmniVideoError as error:
            field = getattr(error, "field", None)
            return {"code": "invalid_line", "message": str(error), "line": number, "param": field}
        if custom_id in seen_custom_ids:
            text = f"custom_id: {custom_id[:100]!r} is an earlier line's, too"
            return {"code": "duplicate_custom_id", "message": text, "line": number, "param": "custom_id"}
        seen_custom_ids.add(custom_id)
        return None

    def reject_batch(self, row: Any, line_errors: list[dict[str, Any]]) -> None:
        self.batches.transition_batch(row, "failed", self.runner_name, validation_errors=line_errors)
        self.release_batch(row.id)

    # ------------------------------------------------------------ asking

    def submit_lines(self, batch: ActiveBatch, total: int) -> None:
        """Turns lines into jobs as long as there is room for them."""
        deadline, outcomes = time.monotonic() + SUBMIT_SLICE_SECONDS, list[LineOutcome]()
        room = self.max_open_jobs - len(batch.list_open_job_ids())
        while (
            room > 0
            and time.monotonic() < deadline
            and len(outcomes) < OUTCOME_CHUNK_SIZE
            and (line := batch.next_line())
        ):
            try:
                outcome = self.submit_line(batch, *line)
            except RETRYABLE_ERRORS as error:
                batch.deferred_line = line
                if isinstance(error, ServiceBusy):
                    break
                raise
            if outcome is not None:
                outcomes.append(outcome)
            room -= len(batch.open_lines.get(line[0], ("", []))[1])
            if batch.endpoint == CHAT_ENDPOINT:  # which is not to be said again
                self.save_outcomes(batch, total, outcomes)
                outcomes = []
        self.save_outcomes(batch, total, outcomes)

    def submit_line(self, batch: ActiveBatch, number: int, data: bytes) -> LineOutcome | None:
        """Sees to the line's jobs; what became of it, where that is known at once."""
        custom_id, url, fields = self.line_port.parse_line(data, batch.endpoint)
        try:
            if batch.endpoint == CHAT_ENDPOINT:
                if batch.stop_reason:
                    return batch.build_stopped_outcome(number, custom_id)
                return batch.build_response_outcome(number, custom_id, 200, self.answer_chat(batch.owner, fields))
            job_ids = self.line_port.list_job_ids(url, fields, batch.derive_line_key(number))
            existing_ids = {status.id for status in self.jobs.list_statuses(job_ids)}
            if len(existing_ids) < len(job_ids):
                if batch.stop_reason:
                    self.cancel_jobs(existing_ids)
                    return batch.build_stopped_outcome(number, custom_id)
                self.submit_jobs(
                    batch,
                    self.line_port.build_job_requests(batch.owner, url, fields, batch.derive_line_key(number)),
                    existing_ids,
                )
            batch.open_lines[number] = (custom_id, job_ids)
            return None
        except RETRYABLE_ERRORS:
            raise
        except Exception as error:
            if not isinstance(error, OmniVideoError):
                log.exception("batch %s, line %d", batch.id, number)
            return batch.build_response_outcome(number, custom_id, *self.line_port.to_error_response(error))

    def submit_jobs(self, batch: ActiveBatch, requests: Collection[Any], existing_ids: set[str]) -> None:
        for request in requests:
            if request.job.id not in existing_ids and self.jobs.submit(
                request.job, batch.owner, "batch", request.kind, request.meta
            ):
                self.notify_workers()

    def cancel_jobs(self, job_ids: Collection[str]) -> None:
        for job_id in job_ids:
            self.jobs.cancel(job_id)

    # ------------------------------------------------------------ collecting

    def collect_outcomes(self, batch: ActiveBatch, total: int) -> None:
        """Writes down what became of the lines whose jobs have all ended."""
        if batch.stop_reason:
            self.cancel_jobs(batch.list_open_job_ids())
        ended_statuses = {status.id: status for status in self.jobs.list_ended_jobs(batch.list_open_job_ids())}
        complete_lines = [
            number
            for number, (_, job_ids) in batch.open_lines.items()
            if all(job_id in ended_statuses for job_id in job_ids)
        ]
        outcomes = [
            self.build_outcome(batch, number, [ended_statuses[job_id] for job_id in batch.open_lines[number][1]])
            for number in complete_lines
        ]
        self.save_outcomes(batch, total, outcomes)

    def build_outcome(self, batch: ActiveBatch, number: int, statuses: list[JobStatus]) -> LineOutcome:
        custom_id = batch.open_lines[number][0]
        if all(status.state == "done" for status in statuses):
            return batch.build_response_outcome(
                number, custom_id, 200, self.line_port.build_response_body(batch.endpoint, statuses)
            )
        if batch.stop_reason and any(status.state == "cancelled" for status in statuses):
            return batch.build_stopped_outcome(number, custom_id)
        return batch.build_response_outcome(
            number, custom_id, *self.line_port.to_error_response(self.line_port.error_from_statuses(statuses))
        )

    def save_outcomes(self, batch: ActiveBatch, total: int, outcomes: list[LineOutcome]) -> None:
        if not outcomes:
            return
        succeeded_by_line = batch.succeeded_by_line | {number: ok for number, ok, _ in outcomes}
        self.batches.save_line_outcomes(batch.id, outcomes)
        batch.succeeded_by_line = succeeded_by_line
        self.batches.update_batch_counts(batch.id, batch.count_lines(total))
        for number, _, _ in outcomes:
            batch.open_lines.pop(number, None)

    # ------------------------------------------------------------ finishing

    def finish_batch(self, batch: ActiveBatch, row: Any) -> None:
        """The files, once; a runner that comes late makes the same ones, and changes nothing."""
        if row.state == "in_progress" and not batch.stop_reason:
            self.batches.transition_batch(row, "finalizing", self.runner_name)
            return  # the next round goes on
        final_state = {"finalizing": "completed", "cancelling": "cancelled", "in_progress": "expired"}[row.state]
        self.close_batch(
            batch,
            row,
            final_state,
            output_file_id=self.write_result_file(batch, True),
            error_file_id=self.write_result_file(batch, False),
        )

    def close_batch(self, batch: ActiveBatch, row: Any, state: str, **values: Any) -> None:
        # Counted anew: whoever wrote the last lines down may have died before it had counted them.
        if self.batches.transition_batch(
            row, state, self.runner_name, counts=batch.count_lines(row.counts["total"]), **values
        ):
            self.batches.delete_line_outcomes(batch.id)
            self.release_batch(batch.id)

    def write_result_file(self, batch: ActiveBatch, succeeded: bool) -> str | None:
        """The id of the file of the lines that went well, or of the others; None where there are none."""
        data, last_number = bytearray(), 0
        while rows := self.batches.list_line_outcomes(batch.id, last_number, OUTCOME_CHUNK_SIZE):
            last_number = rows[-1].line_number
            for line in rows:
                data += json.dumps(line.output_line).encode() + b"\n" if line.succeeded == succeeded else b""
        if not data:
            return None
        name = "output" if succeeded else "errors"
        row = self.files.create_file(
            batch.owner, file_id=f"file-{batch.derive_line_key(0)}-{name}", name=f"{batch.id}_{name}.jsonl",
            purpose="batch_output", size_bytes=len(data), object_key=self.store.put(bytes(data), "jsonl"),
            artifact=None,
        )  # fmt: skip
        return str(row.id)
