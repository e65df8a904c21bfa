"""A batch while it is worked on: its lines, and what is open of them."""

import hashlib
import tempfile
from collections.abc import Collection, Iterator, Mapping
from typing import IO, Any, Protocol

from omnivideo.contracts import JobStatus

CHAT = "/v1/chat/completions"
Outcome = tuple[int, bool, dict[str, Any]]  # a line's number, whether it went well, and its line of a file


class Wire(Protocol):
    """How the API reads a line and what it says of its jobs.  An order has a job, a kind and meta."""

    def read(self, data: bytes, endpoint: str) -> tuple[str, str, dict[str, Any]]:
        """A line's custom_id, url and body; raises InvalidInput."""
        ...

    def names(self, url: str, fields: Mapping[str, Any], name: str) -> list[str]:
        """The ids of a line's jobs."""
        ...

    def orders(self, owner: str, url: str, fields: Mapping[str, Any], name: str) -> Collection[Any]:
        """A line's jobs.  Raises an OmniVideoError."""
        ...

    def answer(self, url: str, statuses: list[JobStatus]) -> dict[str, Any]:
        """What a line's jobs, all done, come to."""
        ...

    def trouble(self, statuses: Collection[JobStatus]) -> Exception:
        """Why a line's jobs did not all come to something."""
        ...

    def refusal(self, error: Exception) -> tuple[int, dict[str, Any]]:
        """An error as its status and body."""
        ...


class Held:
    """A batch that this runner works on: its input on disk, the jobs that are open, and where it is.

    `done` says of each line that has an outcome whether it went well.
    """

    def __init__(self, row: Any, data: bytes, done: dict[int, bool]):
        self.id, self.owner, self.endpoint = row.id, row.owner, row.endpoint
        self.file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed when the batch is let go)
        self.file.write(data)
        self.done = done
        self.open: dict[int, tuple[str, list[str]]] = {}  # of a line: custom_id and jobs
        self.left = self.lines()
        self.waits: tuple[int, bytes] | None = None  # a line that found no room
        self.stopping: str | None = None  # why: "batch_cancelled" or "batch_expired"
        self.faults = 0

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Number and bytes of each line that is not empty, from 1."""
        self.file.seek(0)
        for number, data in enumerate(self.file, start=1):
            if data.strip():
                yield number, data

    def next(self) -> tuple[int, bytes] | None:
        """The next line without an outcome."""
        line, self.waits = self.waits, None
        while line is None and (line := next(self.left, None)) is not None and line[0] in self.done:
            line = None
        return line

    def close(self) -> None:
        self.file.close()

    def name(self, number: int) -> str:
        """What a line's jobs are called after."""
        return hashlib.sha256(f"{self.id} {number}".encode()).hexdigest()[:32]

    def jobs(self) -> list[str]:
        return [name for _, names in self.open.values() for name in names]

    def counts(self, total: int) -> dict[str, int]:
        completed = sum(self.done.values())
        return {"total": total, "completed": completed, "failed": len(self.done) - completed}

    # ------------------------------------------------------------ lines of the output and error files

    def answered(self, number: int, custom_id: str, status: int, said: dict[str, Any]) -> Outcome:
        name = self.name(number)
        response = {"status_code": status, "request_id": name, "body": said}
        line = {"id": f"batch_req_{name}", "custom_id": custom_id, "response": response, "error": None}
        return number, status == 200, line

    def stopped(self, number: int, custom_id: str) -> Outcome:
        """Of a line that was not done before the batch came to its end."""
        assert self.stopping
        error = {"code": self.stopping, "message": f"this line was not done when the batch was {self.stopping[6:]}"}
        name = self.name(number)
        return number, False, {"id": f"batch_req_{name}", "custom_id": custom_id, "response": None, "error": error}
