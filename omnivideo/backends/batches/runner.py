"""Process batches: read the input lines, and write exactly one result line for each.

All progress is in the database: the jobs of a line, whose ids are derived from the batch and the line number, and then
its outcome, which is written once. If a runner dies, another one continues: it submits no job twice and skips lines
that have an outcome.
"""

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from omnivideo.backends.batches.active_batch import (
    CHAT_ENDPOINT,
    ActiveBatch,
    BatchLinePort,
    LineJob,
    OpenChatLine,
    copy_to_temporary_file,
)
from omnivideo.backends.fair_executor import FairExecutor
from omnivideo.contracts import JobStatus
from omnivideo.errors import ArtifactNotFound, ModelUnavailable, OmniVideoError, ServiceBusy, StoreError
from omnivideo.ports import SweepableObjectStore
from omnivideo.records import BatchRecord
from omnivideo.storage.database.batches import MAX_RUNNER_LOSSES, BatchRepository, LineOutcome
from omnivideo.storage.database.files import FileRepository
from omnivideo.storage.database.jobs import JobRepository
from omnivideo.storage.database.notifications import Watch

log = logging.getLogger("omnivideo.batches")
MAX_BATCH_LINES = 50_000
MAX_REPORTED_ERRORS = 100  # invalid lines that are reported before validation stops
COMPLETION_WINDOW_SECONDS = 86_400.0  # the age at which a batch expires
MAX_ACTIVE_BATCHES = 64  # batches that one runner processes at a time
MAX_ACTIVE_BATCHES_PER_OWNER = 4
MAX_CHAT_LINES, MAX_CHAT_LINES_PER_OWNER = 8, 5  # that are answered at a time
MAX_CHAT_LINES_PER_BATCH = 2
CHAT_RETRY_SECONDS = 1.0  # the pause after a line that was refused for the moment
SUBMIT_SLICE_SECONDS = 0.25  # how long a batch may submit jobs before the next batch gets its turn
MIN_ROUND_SECONDS = 0.02  # so that jobs that end together are collected in one round
OUTCOME_CHUNK_SIZE = 500  # outcomes written or read at a time
RETRYABLE_ERRORS = (ServiceBusy, StoreError, ModelUnavailable)  # the line did not cause these, so it is tried again
INTERNAL_ERROR = {"code": "internal", "message": "an internal error occurred"}
POISON_ERROR = {
    "code": "poison",
    "message": f"it stopped {MAX_RUNNER_LOSSES} processes in a row and will not be tried again",
}
ChatResponder = Callable[[str, dict[str, Any], str], dict[str, Any]]  # of an owner, a body and the line's key


class BatchRunner:
    """Processes batches in a thread of this process. Several processes may do so at once.

    `answer_chat` returns the response to a line of a chat batch. A runner counts as lost after
    `heartbeat_timeout_seconds` without a heartbeat. `max_open_jobs` limits the open jobs of one batch.
    """

    def __init__(
        self, batches: BatchRepository, files: FileRepository, jobs: JobRepository, store: SweepableObjectStore,
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
        self.activating_id: str | None = None  # of the batch whose input is being read
        self.chat_executor = FairExecutor("chat-lines", MAX_CHAT_LINES, MAX_CHAT_LINES_PER_OWNER)
        self.job_ends: Watch | None = None
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
        """Stop the threads and release all batches, so that another runner can claim them."""
        self.stop_event.set()
        self.wake()
        for thread in self.threads:
            thread.join()
        self.batches.release_batches(self.runner_name)
        for batch_id in list(self.active_batches):
            self.release_batch(batch_id)

    def wake(self) -> None:
        """Let the runner advance its batches now."""
        if self.job_ends is not None:
            self.job_ends.deliver()

    def send_heartbeats(self) -> None:
        """Keep the batches claimed, even if one line takes long."""
        while not self.stop_event.wait(self.heartbeat_timeout_seconds / 4):
            try:
                claimed_ids = [*self.active_batches, *filter(None, [self.activating_id])]
                self.batches.heartbeat_batches(self.runner_name, claimed_ids)
            except OmniVideoError as error:
                log.warning("%s", error)

    def run(self) -> None:
        """Advance the batches: at once when a job ends, otherwise when new batches and lines are due."""
        with self.jobs.watch_any_end() as self.job_ends:
            while not self.stop_event.wait(MIN_ROUND_SECONDS):
                has_lines_to_submit = any(batch.has_no_open_lines for batch in self.active_batches.values())
                self.job_ends.wait(self.poll_seconds if has_lines_to_submit else 5 * self.poll_seconds)
                if self.stop_event.is_set():
                    return
                try:
                    self.run_once()
                except OmniVideoError as error:
                    log.warning("%s", error)
                    self.stop_event.wait(1.0)
                except Exception:
                    log.exception("batches")
                    self.stop_event.wait(1.0)

    # ------------------------------------------------------------ rounds

    def run_once(self) -> None:
        """Claim batches that no runner has, and advance each active batch."""
        for batch_id in self.batches.fail_poisonous_batches(self.heartbeat_timeout_seconds, POISON_ERROR):
            log.error("batch %s has stopped several processes and will not be tried again", batch_id)
        self.claim_batches()
        for batch in list(self.active_batches.values()):
            try:
                self.advance_batch(batch)
                batch.consecutive_faults = 0
            except RETRYABLE_ERRORS:
                raise
            except Exception:
                log.exception("batch %s", batch.id)
                self.record_fault(batch)

    def claim_batches(self) -> None:
        while len(self.active_batches) < MAX_ACTIVE_BATCHES:
            counts = Counter(batch.owner for batch in self.active_batches.values())
            full_owners = [owner for owner, count in counts.items() if count >= MAX_ACTIVE_BATCHES_PER_OWNER]
            record = self.batches.claim_batch(self.runner_name, self.heartbeat_timeout_seconds, full_owners)
            if record is None:
                return
            self.activating_id = record.id
            try:
                self.activate_batch(record)
            except StoreError:
                self.batches.release_batches(self.runner_name, [record.id])  # it is no loss
                raise
            finally:
                self.activating_id = None

    def activate_batch(self, record: BatchRecord) -> None:
        try:
            input_file = copy_to_temporary_file(self.store, self.batches.get_batch_input_key(record.id))
        except ArtifactNotFound:
            self.reject_batch(record, [{"code": "not_found", "message": "the input file no longer exists"}])
            return
        log.info("batch %s: %s", record.id, record.state)
        # If our heartbeats stopped for a while, another runner may have advanced a batch that is still active here.
        self.release_batch(record.id)
        self.active_batches[record.id] = ActiveBatch(record, input_file, self.batches.load_line_results(record.id))

    def record_fault(self, batch: ActiveBatch) -> None:
        """Count an unexpected error. The third one in a row fails the batch, so that it does not delay the others."""
        batch.consecutive_faults += 1
        if batch.consecutive_faults == 3 and (record := self.batches.get_claimed_batch(batch.id, self.runner_name)):
            self.reject_batch(record, [INTERNAL_ERROR])

    def advance_batch(self, batch: ActiveBatch) -> None:
        """Take the next step of a batch, depending on its state in the database."""
        record = self.batches.get_claimed_batch(batch.id, self.runner_name)
        if record is None:
            self.release_batch(batch.id)
        elif record.state == "validating":
            self.validate_lines(batch, record)
        elif record.state == "cancelling" and not record.counts["total"]:
            self.close_batch(batch, record, "cancelled")
        else:
            self.process_lines(batch, record)

    def process_lines(self, batch: ActiveBatch, record: BatchRecord) -> None:
        if record.state == "cancelling":
            batch.stop_reason = "batch_cancelled"
        elif record.state == "in_progress" and time.time() > record.created_at + COMPLETION_WINDOW_SECONDS:
            batch.stop_reason = "batch_expired"
        total = record.counts["total"]
        self.submit_lines(batch, total)
        self.collect_outcomes(batch, total)
        if len(batch.succeeded_by_line) == total:
            self.finish_batch(batch, record)

    def release_batch(self, batch_id: str) -> None:
        if (batch := self.active_batches.pop(batch_id, None)) is not None:
            batch.close()

    # ------------------------------------------------------------ validating

    def validate_lines(self, batch: ActiveBatch, record: BatchRecord) -> None:
        """Check every line before any is processed, and reject the batch with an error for each invalid line."""
        line_errors: list[dict[str, Any]] = []
        seen_custom_ids: set[str] = set()
        total, number = 0, 0
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
            self.reject_batch(record, line_errors)
        else:
            columns = {"counts": batch.count_lines(total), "last_line": number}
            self.batches.transition_batch(record, "in_progress", self.runner_name, **columns)

    def find_line_error(
        self, number: int, data: bytes, endpoint: str, seen_custom_ids: set[str]
    ) -> dict[str, Any] | None:
        try:
            custom_id, _, _ = self.line_port.parse_line(data, endpoint)
        except OmniVideoError as error:
            field = getattr(error, "field", None)
            return {"code": "invalid_line", "message": str(error), "line": number, "param": field}
        if custom_id in seen_custom_ids:
            text = f"custom_id: {custom_id[:100]!r} is already used by an earlier line"
            return {"code": "duplicate_custom_id", "message": text, "line": number, "param": "custom_id"}
        seen_custom_ids.add(custom_id)
        return None

    def reject_batch(self, record: BatchRecord, line_errors: list[dict[str, Any]]) -> None:
        self.batches.transition_batch(record, "failed", self.runner_name, validation_errors=line_errors)
        self.release_batch(record.id)

    # ------------------------------------------------------------ submitting

    def submit_lines(self, batch: ActiveBatch, total: int) -> None:
        """Submit the jobs of lines until a limit is reached: of open jobs, time, or outcomes to write."""
        if time.monotonic() < batch.chat_retry_at:
            return
        deadline, outcomes = time.monotonic() + SUBMIT_SLICE_SECONDS, list[LineOutcome]()
        remaining_jobs = self.max_open_jobs - len(batch.list_open_job_ids())
        while (
            remaining_jobs > 0
            and len(batch.open_chat_lines) < MAX_CHAT_LINES_PER_BATCH
            and time.monotonic() < deadline
            and len(outcomes) < OUTCOME_CHUNK_SIZE
            and (line := batch.next_line())
        ):
            try:
                outcome = self.submit_line(batch, *line)
            except RETRYABLE_ERRORS as error:
                batch.deferred_lines.append(line)
                if isinstance(error, ServiceBusy):
                    break
                raise
            if outcome is not None:
                outcomes.append(outcome)
            remaining_jobs -= len(batch.open_lines.get(line[0], ("", []))[1])
        self.save_outcomes(batch, total, outcomes)

    def submit_line(self, batch: ActiveBatch, number: int, data: bytes) -> LineOutcome | None:
        """Submit the jobs of a line, or answer a chat line. Return its outcome if that is known at once."""
        custom_id, url, fields = self.line_port.parse_line(data, batch.endpoint)
        try:
            if batch.endpoint == CHAT_ENDPOINT:
                if batch.stop_reason:
                    return batch.build_stopped_outcome(number, custom_id)
                call = partial(self.answer_chat, batch.owner, fields, batch.derive_line_key(number))
                response = self.chat_executor.submit(batch.owner, call)
                response.add_done_callback(lambda _: self.wake())
                batch.open_chat_lines[number] = OpenChatLine(data, custom_id, response)
                return None
            line_key = batch.derive_line_key(number)
            job_ids = self.line_port.list_job_ids(url, fields, line_key)
            existing_ids = {status.id for status in self.jobs.list_statuses(job_ids)}
            if len(existing_ids) < len(job_ids):
                if batch.stop_reason:
                    self.cancel_jobs(existing_ids)
                    return batch.build_stopped_outcome(number, custom_id)
                line_jobs = self.line_port.build_job_requests(batch.owner, url, fields, line_key)
                self.submit_jobs(batch, line_jobs, existing_ids)
            batch.open_lines[number] = (custom_id, job_ids)
            return None
        except RETRYABLE_ERRORS:
            raise
        except Exception as error:
            return self.build_error_outcome(batch, number, custom_id, error)

    def submit_jobs(self, batch: ActiveBatch, line_jobs: Collection[LineJob], existing_ids: set[str]) -> None:
        for line_job in line_jobs:
            if line_job.job.id not in existing_ids and self.jobs.submit(
                line_job.job, batch.owner, "batch", line_job.kind, line_job.meta
            ):
                self.notify_workers()

    def cancel_jobs(self, job_ids: Collection[str]) -> None:
        for job_id in job_ids:
            self.jobs.cancel(job_id)

    # ------------------------------------------------------------ collecting

    def collect_outcomes(self, batch: ActiveBatch, total: int) -> None:
        """Save the outcomes of the chat lines that were answered, and of the lines whose jobs have all ended."""
        self.save_outcomes(batch, total, self.collect_chat_outcomes(batch))
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

    def collect_chat_outcomes(self, batch: ActiveBatch) -> list[LineOutcome]:
        outcomes = []
        for number, line in list(batch.open_chat_lines.items()):
            if not line.response.done():
                continue
            error = line.response.exception()
            if isinstance(error, RETRYABLE_ERRORS):
                del batch.open_chat_lines[number]
                batch.deferred_lines.append((number, line.data))
                batch.chat_retry_at = time.monotonic() + CHAT_RETRY_SECONDS
            elif isinstance(error, Exception):
                outcomes.append(self.build_error_outcome(batch, number, line.custom_id, error))
            else:
                response = line.response.result()
                outcomes.append(batch.build_response_outcome(number, line.custom_id, 200, response))
        return outcomes

    def build_error_outcome(self, batch: ActiveBatch, number: int, custom_id: str, error: Exception) -> LineOutcome:
        if not isinstance(error, OmniVideoError):
            log.error("batch %s, line %d", batch.id, number, exc_info=error)
        return batch.build_response_outcome(number, custom_id, *self.line_port.to_error_response(error))

    def build_outcome(self, batch: ActiveBatch, number: int, statuses: list[JobStatus]) -> LineOutcome:
        custom_id = batch.open_lines[number][0]
        if all(status.state == "done" for status in statuses):
            body = self.line_port.build_response_body(batch.endpoint, statuses)
            return batch.build_response_outcome(number, custom_id, 200, body)
        if batch.stop_reason and any(status.state == "cancelled" for status in statuses):
            return batch.build_stopped_outcome(number, custom_id)
        error = self.line_port.error_from_statuses(statuses)
        return batch.build_response_outcome(number, custom_id, *self.line_port.to_error_response(error))

    def save_outcomes(self, batch: ActiveBatch, total: int, outcomes: list[LineOutcome]) -> None:
        if not outcomes:
            return
        succeeded_by_line = batch.succeeded_by_line | {number: ok for number, ok, _ in outcomes}
        self.batches.save_line_outcomes(batch.id, outcomes)
        batch.succeeded_by_line = succeeded_by_line
        self.batches.update_batch_counts(batch.id, batch.count_lines(total))
        for number, _, _ in outcomes:
            batch.open_lines.pop(number, None)
            batch.open_chat_lines.pop(number, None)

    # ------------------------------------------------------------ finishing

    def finish_batch(self, batch: ActiveBatch, record: BatchRecord) -> None:
        """Write the result files and close the batch. A superseded runner writes the same files and changes nothing."""
        if record.state == "in_progress" and not batch.stop_reason:
            self.batches.transition_batch(record, "finalizing", self.runner_name)
            return  # the next round writes the files
        final_state = {"finalizing": "completed", "cancelling": "cancelled", "in_progress": "expired"}[record.state]
        self.close_batch(
            batch,
            record,
            final_state,
            output_file_id=self.write_result_file(batch, True),
            error_file_id=self.write_result_file(batch, False),
        )

    def close_batch(self, batch: ActiveBatch, record: BatchRecord, state: str, **columns: str | None) -> None:
        # A runner may have died after it saved the last outcomes and before it counted them.
        counts = batch.count_lines(record.counts["total"])
        if self.batches.transition_batch(record, state, self.runner_name, counts=counts, **columns):
            self.batches.delete_line_outcomes(batch.id)
            self.release_batch(batch.id)

    def write_result_file(self, batch: ActiveBatch, succeeded: bool) -> str | None:
        """Write the file of the lines that succeeded, or that failed. Return its id, or None if there are none."""
        data, last_number = bytearray(), 0
        while outcomes := self.batches.list_line_outcomes(batch.id, last_number, OUTCOME_CHUNK_SIZE):
            last_number = outcomes[-1].line_number
            for outcome in outcomes:
                data += json.dumps(outcome.output_line).encode() + b"\n" if outcome.succeeded == succeeded else b""
        if not data:
            return None
        name = "output" if succeeded else "errors"
        self.jobs.add_usage(batch.owner, stored_bytes=len(data))
        file = self.files.create_file(
            batch.owner, file_id=f"file-{batch.derive_line_key(0)}-{name}", name=f"{batch.id}_{name}.jsonl",
            purpose="batch_output", size_bytes=len(data), object_key=self.store.put(bytes(data), "jsonl"),
            artifact=None,
        )  # fmt: skip
        return file.id
