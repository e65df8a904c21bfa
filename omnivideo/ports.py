"""The seams: what the planner needs of the world.  Each has an in-process wiring and, in tests, an in-memory twin."""

from collections.abc import Collection, Iterator
from typing import Protocol

from omnivideo.contracts import Artifact, Job, Medium, MLLMRequest, Preview, Route, StepProgress


class ObjectStore(Protocol):
    """Bytes under the digest of what they are.  A key is `<sha256>.<suffix>`; the same bytes are the same key.

    Raises StoreError where bytes cannot be written, and NotStored where a key is not there.
    """

    def put(self, data: bytes, suffix: str) -> str: ...

    def get(self, key: str) -> bytes: ...

    def has(self, key: str) -> bool: ...


class SweepableObjectStore(ObjectStore, Protocol):
    """A store that can be looked through and cleaned."""

    def iter_keys(self) -> Iterator[str]: ...

    def sweep(self, referenced_keys: Collection[str], lifetime_seconds: float) -> list[str]:
        """Removes what nothing refers to and nobody has put for `lifetime` seconds; returns the removed keys."""
        ...


class MLLM(Protocol):
    """The multimodal language model with its two heads.  Everything it returns is the same for the same ask."""

    def route(self, request: MLLMRequest) -> Route:
        """By the first token of the answer."""
        ...

    def stream_text(self, request: MLLMRequest) -> Iterator[str]:
        """The text head's answer, piece by piece, think marks included."""
        ...

    def score_agreement(self, request: MLLMRequest) -> float:
        """The probability of "yes" against "no" as the answer, 0 to 1."""
        ...

    def predict_visual_tokens(self, request: MLLMRequest, medium: Medium) -> str:
        """Return a reference to the vision head's tokens for the request.

        It is the object key of the tokens' file. The file is in the store only if a job may outlive this process or is
        rendered in another one.
        """
        ...


class JobQueue(Protocol):
    """Where clips are drawn."""

    def run(self, job: Job) -> Iterator[StepProgress | Preview | Artifact]:
        """Submits the job and follows it: steps and previews as they come, the stored artifact at the end.

        A job that is known by its id is followed, not drawn again.  Raises JobCancelled, or an OmniVideoError.
        """
        ...

    def cancel(self, job_id: str) -> None:
        """Takes effect within one denoising step."""
        ...
