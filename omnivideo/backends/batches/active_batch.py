"""A batch that a runner is processing: its input lines, its open jobs and the lines of its result files."""

import tempfile
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future
from typing import IO, Any, NamedTuple, Protocol

from omnivideo.contracts import Job, JobStatus
from omnivideo.ports import SweepableObjectStore
from omnivideo.records import BatchRecord
from omnivideo.storage.database.batches import LineOutcome, derive_line_key

COPY_BYTES = 4 * 2**20  # of an input file, in memory at a time
CHAT_ENDPOINT = "/v1/chat/completions"


class LineJob(Protocol):
    """A job to submit for a line, with its kind and metadata."""

    @property
    def job(self) -> Job: ...

    @property
    def kind(self) -> str: ...

    @property
    def meta(self) -> dict[str, str]: ...


class BatchLinePort(Protocol):
    """Translates between the lines of a batch, in the API's wire format, and jobs."""

    def parse_line(self, data: bytes, endpoint: str) -> tuple[str, str, dict[str, Any]]:
        """Return the custom_id, URL and body of a line. Raises InvalidInput."""
        ...

    def list_job_ids(self, url: str, fields: Mapping[str, Any], name: str) -> list[str]:
        """Return the ids of a line's jobs."""
        ...

    def build_job_requests(self, owner: str, url: str, fields: Mapping[str, Any], name: str) -> Collection[LineJob]:
        """Return a line's jobs. Raises an OmniVideoError."""
        ...

    def build_response_body(self, url: str, statuses: list[JobStatus]) -> dict[str, Any]:
        """Return the response to a line whose jobs are all done."""
        ...

    def error_from_statuses(self, statuses: Collection[JobStatus]) -> Exception:
        """Return the error of a line with a job that failed or was cancelled."""
        ...

    def to_error_response(self, error: Exception) -> tuple[int, dict[str, Any]]:
        """Return the HTTP status and body of an error."""
        ...


class OpenChatLine(NamedTuple):
    """A line of a chat batch, and the future response to it."""

    data: bytes
    custom_id: str
    response: Future[dict[str, Any]]


def copy_to_temporary_file(store: SweepableObjectStore, key: str) -> IO[bytes]:
    """Return a temporary file with the bytes of an object, which is read in parts. The caller closes it."""
    file = tempfile.TemporaryFile()  # noqa: SIM115
    size = store.get_size(key)
    for position in range(0, size, COPY_BYTES):
        file.write(store.read_range(key, position, position + COPY_BYTES - 1))
    return file


class ActiveBatch:
    """A batch that a runner is processing. Its input is kept on disk.

    `succeeded_by_line` has the lines with an outcome, and `open_lines` has the custom_id and job ids of each line whose
    jobs are open, `open_chat_lines` the chat lines that are being answered. `deferred_lines` were read but could not be
    submitted yet. `stop_reason` is set once the batch is cancelled or has expired: "batch_cancelled" or
    "batch_expired".
    """

    def __init__(self, record: BatchRecord, input_file: IO[bytes], succeeded_by_line: dict[int, bool]):
        self.id, self.owner, self.endpoint = record.id, record.owner, record.endpoint
        self.input_file = input_file
        self.succeeded_by_line = succeeded_by_line
        self.open_lines: dict[int, tuple[str, list[str]]] = {}
        self.unread_lines = self.read_lines()
        self.deferred_lines: list[tuple[int, bytes]] = []
        self.open_chat_lines: dict[int, OpenChatLine] = {}
        self.chat_retry_at = 0.0
        self.stop_reason: str | None = None
        self.consecutive_faults = 0

    def read_lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield the number, from 1, and the bytes of each line that is not empty."""
        self.input_file.seek(0)
        for number, data in enumerate(self.input_file, start=1):
            if data.strip():
                yield number, data

    def next_line(self) -> tuple[int, bytes] | None:
        """Return the number and bytes of the next line without an outcome, or None after the last one."""
        if self.deferred_lines:
            return self.deferred_lines.pop()
        return next((line for line in self.unread_lines if line[0] not in self.succeeded_by_line), None)

    def close(self) -> None:
        self.input_file.close()

    def derive_line_key(self, number: int) -> str:
        """Return the key from which the ids of a line's jobs are derived."""
        return derive_line_key(self.id, number)

    @property
    def has_no_open_lines(self) -> bool:
        return not (self.open_lines or self.open_chat_lines)

    def list_open_job_ids(self) -> list[str]:
        return [job_id for _, job_ids in self.open_lines.values() for job_id in job_ids]

    def count_lines(self, total: int) -> dict[str, int]:
        completed = sum(self.succeeded_by_line.values())
        return {"total": total, "completed": completed, "failed": len(self.succeeded_by_line) - completed}

    # ------------------------------------------------------------ lines of the output and error files

    def build_response_outcome(
        self, number: int, custom_id: str, status_code: int, body: dict[str, Any]
    ) -> LineOutcome:
        line_key = self.derive_line_key(number)
        response = {"status_code": status_code, "request_id": line_key, "body": body}
        line = {"id": f"batch_req_{line_key}", "custom_id": custom_id, "response": response, "error": None}
        return LineOutcome(number, status_code == 200, line)

    def build_stopped_outcome(self, number: int, custom_id: str) -> LineOutcome:
        """Return the outcome of a line that was not done when the batch was cancelled or expired."""
        assert self.stop_reason
        error = {
            "code": self.stop_reason,
            "message": f"this line was not done when the batch was {self.stop_reason[6:]}",
        }
        line_key = self.derive_line_key(number)
        line = {"id": f"batch_req_{line_key}", "custom_id": custom_id, "response": None, "error": error}
        return LineOutcome(number, False, line)
