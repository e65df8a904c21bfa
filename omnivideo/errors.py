"""What a user can cause, as one tree.

OmniVideoError
  InvalidInput          a value that cannot be used: names the field and the allowed range
    UnreadableMedia     a source that is no image or video, is too large, or is cut short
    ConditionTooLong    a prompt and its visual tokens that do not fit the decoder's condition
  CheckpointError       weights that are missing, incomplete or of another model
  NotInstalled          an optional package that this command needs
  StoreError            the store cannot take or give what it is asked for
    NotStored           no such artifact
  JobCancelled          a clip that somebody stopped
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


class NotInstalled(OmniVideoError):
    """An optional package that this command needs."""


class StoreError(OmniVideoError):
    """The store cannot take or give what it is asked for."""


class NotStored(StoreError):
    """No such artifact."""


class JobCancelled(OmniVideoError):
    """A clip that somebody stopped."""
