"""What a user can cause, as one tree.

OmniVideoError
  InvalidInput          a value that cannot be used: names the field and the allowed range
    UnreadableMedia     a source that is no image or video, is too large, or is cut short
    ConditionTooLong    a prompt and its visual tokens that do not fit the decoder's condition
  CheckpointError       weights that are missing, incomplete or of another model
  Diverged              training whose loss is not finite any more
  NotInstalled          an optional package that this command needs
  StoreError            the store cannot take or give what it is asked for
    NotStored           no such artifact
  Busy                  the queue, or the caller's share of it, is full: try again later
  JobFailed             a clip that could not be drawn; its code says why
  JobCancelled          a clip that somebody stopped
  JobLost               a worker's job that another one has by now
  ModelAway             the language model's server does not answer
"""


class OmniVideoError(Exception):
    """The base: its text is one line, fit for a user's eyes."""


class InvalidInput(OmniVideoError):
    """A value that cannot be used: `field` says which."""

    def __init__(self, field: str, message: str):
        super().__init__(f"{field}: {message}")
        self.field = field


class UnreadableMedia(InvalidInput):
    """A source that is no image or video, is too large, or is cut short."""


class ConditionTooLong(InvalidInput):
    """A prompt and its visual tokens that do not fit the decoder's condition."""


class CheckpointError(OmniVideoError):
    """Weights that are missing, incomplete or of another model."""


class TrainingDiverged(OmniVideoError):
    """Training whose loss is not finite any more."""


class MissingDependency(OmniVideoError):
    """An optional package that this command needs."""


class StoreError(OmniVideoError):
    """The store cannot take or give what it is asked for."""


class ArtifactNotFound(StoreError):
    """No such artifact."""


class ServiceBusy(OmniVideoError):
    """The queue, or the caller's share of it, is full; `after` is when to try again, in seconds."""

    def __init__(self, message: str, retry_after_seconds: float):
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class JobFailed(OmniVideoError):
    """A clip that could not be drawn; `code` says why."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class JobCancelled(OmniVideoError):
    """A clip that somebody stopped."""


class JobLost(OmniVideoError):
    """A worker's job that another one has by now, or that has ended: what this one made of it does not count."""


class ModelUnavailable(OmniVideoError):
    """The language model's server does not answer."""
