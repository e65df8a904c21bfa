"""A batch while it is worked on: its lines, and what is open of them."""

import hashlib
import tempfile
from collections.abc import Collection, Iterator, Mapping
from typing import IO, Any, Protocol

from omnivideo.contracts import JobStatus
from omnivideo.storage.database.batches import LineOutcome

CHAT_ENDPOINT = "/v1/chat/completions"


class BatchLinePort(Protocol):
    """How the API reads a line and what it says of its jobs.  An order has a job, a kind and meta."""

    def parse_line(self, data: bytes, endpoint: str) -> tuple[str, str, dict[str, Any]]:
        """A line's custom_id, url and body; raises InvalidInput."""
        ...

    def list_job_ids(self, url: str, fields: Mapping[str, Any], name: str) -> list[str]:
        """The ids of a line's jobs."""
        ...

    def build_job_requests(self, owner: str, url: str, fields: Mapping[str, Any], name: str) -> Collection[Any]:
        """A line's jobs.  Raises an OmniVideoError."""
        ...

    def build_response_body(self, url: str, statuses: list[JobStatus]) -> dict[str, Any]:
        """What a line's jobs, all done, come to."""
        ...

    def error_from_statuses(self, statuses: Collection[JobStatus]) -> Exception:
        """Why a line's jobs did not all come to something."""
        ...

    def to_error_response(self, error: Exception) -> tuple[int, dict[str, Any]]:
        """An error as its status and body."""
        ...


class ActiveBatch:
    """A batch that this runner works on: its input on disk, the jobs that are open, and where it is.

    `succeeded_by_line` says of each line that has an outcome whether it went well.
    """

    def __init__(self, row: Any, data: bytes, succeeded_by_line: dict[int, bool]):
        self.id, self.owner, self.endpoint = row.id, row.owner, row.endpoint
        self.input_file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed when the batch is let go)
        self.input_file.write(data)
        self.succeeded_by_line = succeeded_by_line
        self.open_lines: dict[int, tuple[str, list[str]]] = {}  # of a line: custom_id and jobs
        self.unread_lines = self.read_lines()
        self.deferred_line: tuple[int, bytes] | None = None  # a line that found no room
        self.stop_reason: str | None = None  # why: "batch_cancelled" or "batch_expired"
        self.consecutive_faults = 0

    def read_lines(self) -> Iterator[tuple[int, bytes]]:
        """Number and bytes of each line that is not empty, from 1."""
        self.input_file.seek(0)
        for number, data in enumerate(self.input_file, start=1):
            if data.strip():
                yield number, data

    def next_line(self) -> tuple[int, bytes] | None:
        """The next line without an outcome."""
        line, self.deferred_line = self.deferred_line, None
        while (
            line is None and (line := next(self.unread_lines, None)) is not None and line[0] in self.succeeded_by_line
        ):
            line = None
        return line

    def close(self) -> None:
        self.input_file.close()

    def derive_line_key(self, number: int) -> str:
        """What a line's jobs are called after."""
        return hashlib.sha256(f"{self.id} {number}".encode()).hexdigest()[:32]

    def list_open_job_ids(self) -> list[str]:
        return [name for _, names in self.open_lines.values() for name in names]

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
        """Of a line that was not done before the batch came to its end."""
        assert self.stop_reason
        error = {
            "code": self.stop_reason,
            "message": f"this line was not done when the batch was {self.stop_reason[6:]}",
        }
        line_key = self.derive_line_key(number)
        line = {"id": f"batch_req_{line_key}", "custom_id": custom_id, "response": None, "error": error}
        return LineOutcome(number, False, line)
