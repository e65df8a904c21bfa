"""The errors that a user can cause, as one tree. Programming errors are assertions.

OmniVideoError
  InvalidInput          a value is wrong: the message names the field and the allowed range
    UnusableContent     what a person wrote or attached cannot be used; a chat explains this in words
      UnreadableMedia   a file is not an image or a video, is too large, or is truncated
      ConditionTooLong  a prompt and its visual tokens do not fit the decoder's condition
      TextTooLong       a message has too many characters
  CheckpointError       weights are missing, incomplete or from another model
  PartOutOfMemory       a part of the model has not enough memory for a clip
  TrainingDiverged      the training loss is no longer finite
  MissingDependency     an optional package is not installed
  StoreError            the store or the database cannot read or write
    ArtifactNotFound    the store has no such artifact
  ServiceBusy           the queue, or the caller's share of it, is full: try again later
    DecodingBusy        no process for reading media became free in time
    PoolBusy            all threads for one kind of work are busy
    LimitReached        the caller's key has used up what it may use: requests, clips at a time, or a day's share
  JobFailed             a clip could not be rendered; the code says why
  JobCancelled          a clip was cancelled
  JobLost               a worker's job now belongs to another worker
  ModelUnavailable      the language model's server does not answer
"""

import re
import time

SECONDS_PER_DAY = 86_400
DATABASE_DRIVERS = ("sqlite3", "psycopg", "psycopg_pool")
# As SQLite and PostgreSQL say it; SQLite's I/O error is that of a log that cannot grow.
FULL_DISK = re.compile("disk is full|disk I/O error|No space left on device")
LIMIT_CODE = "rate_limit_exceeded"  # of requests and of clips that a limit of their key has refused


class OmniVideoError(Exception):
    """The base class. The message is one line that can be shown to a user."""


class InvalidInput(OmniVideoError):
    """A value is wrong; `field` is its name in the request, the command or the environment."""

    def __init__(self, field: str, message: str):
        super().__init__(f"{field}: {message}")
        self.field = field


class UnusableContent(InvalidInput):
    """What a person wrote or attached cannot be used; a chat explains this in words."""


class UnreadableMedia(UnusableContent):
    """A file is not an image or a video, is too large, or is truncated."""


class ConditionTooLong(UnusableContent):
    """A prompt and its visual tokens do not fit the decoder's condition."""


class TextTooLong(UnusableContent):
    """A message has too many characters."""


class CheckpointError(OmniVideoError):
    """Weights are missing, incomplete or from another model."""


class PartOutOfMemory(OmniVideoError, MemoryError):
    """A part of the model has not enough memory for what was requested; `part` is its name."""

    def __init__(self, part: str, help_text: str):
        super().__init__(f"the {part} ran out of memory; {help_text}")
        self.part = part


class TrainingDiverged(OmniVideoError):
    """The training loss is no longer finite."""


class MissingDependency(OmniVideoError):
    """An optional package that a command needs is not installed."""


class StoreError(OmniVideoError):
    """The store or the database cannot read or write."""


class ArtifactNotFound(StoreError):
    """The store has no such artifact."""


class ServiceBusy(OmniVideoError):
    """The queue, or the caller's share of it, is full; try again after `retry_after_seconds`."""

    def __init__(self, message: str, retry_after_seconds: float):
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class DecodingBusy(ServiceBusy):
    """No process for reading media became free in time; this is the service's state, not the request's fault."""


class PoolBusy(ServiceBusy):
    """All threads for one kind of work are busy, such as those that use the object store."""


class ServiceStopping(ServiceBusy):
    """This process is stopping; another one, or this one after its restart, answers the same request."""

    def __init__(self) -> None:
        super().__init__("the service is restarting; send the request again in a moment", 5.0)


class LimitReached(ServiceBusy):
    """A key has used up what it may use.

    `limit` is "requests", "open-jobs", "device-seconds" or "stored-bytes", and `quota` what the key may use of it in
    `window_seconds`, or at a time if that is 0. `limit` is empty if a clip was refused that had been accepted before.
    """

    def __init__(
        self, message: str, retry_after_seconds: float, limit: str = "", quota: float = 0, window_seconds: int = 0
    ):
        super().__init__(message, retry_after_seconds)
        self.limit, self.quota, self.window_seconds = limit, quota, window_seconds


class JobFailed(OmniVideoError):
    """A clip could not be rendered; `code` says why."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class JobCancelled(OmniVideoError):
    """A clip was cancelled."""


class JobLost(OmniVideoError):
    """A worker's job now belongs to another worker or has ended; the worker's result is discarded."""


class ModelUnavailable(OmniVideoError):
    """The language model's server does not answer."""


def describe_database_failure(error: BaseException | None) -> str | None:
    """Return what an error of sqlite3 or psycopg means that a retry can fix, and None for every other error."""
    names = {base.__name__ for base in type(error).__mro__ if base.__module__.partition(".")[0] in DATABASE_DRIVERS}
    if not names & {"OperationalError", "InterfaceError"}:
        return None
    return "its disk is full or cannot be written" if FULL_DISK.search(str(error)) else "it does not answer"


def compute_seconds_until_midnight() -> float:
    """Return how long the day (UTC) still lasts."""
    return SECONDS_PER_DAY - time.time() % SECONDS_PER_DAY


def build_job_error(code: str, message: str) -> OmniVideoError:
    """Return the error of a failed clip, from its code and its message."""
    if code == "invalid_input":
        field, _, problem = message.partition(": ")
        return InvalidInput(field, problem)
    if code == LIMIT_CODE:
        return LimitReached(message, compute_seconds_until_midnight())
    return JobFailed(code, f"the clip could not be rendered: {message}")
