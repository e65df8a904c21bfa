"""What the service stores, as frozen records: users' files, batches, webhooks and idempotency keys, and the workers."""

from typing import Any

from omnivideo.contracts import FrozenModel


class FileRecord(FrozenModel):
    """A stored file. `object_key` is its key in the object store; `artifact` is set if it is an image or a clip."""

    id: str
    owner: str
    name: str
    purpose: str
    size_bytes: int
    object_key: str
    artifact: dict[str, Any] | None
    created_at: float
    expires_at: float | None = None


class BatchRecord(FrozenModel):
    """A batch of requests; `state_times` is when each state began, in seconds since 1970."""

    id: str
    owner: str
    state: str
    endpoint: str
    input_file_id: str
    output_file_id: str | None
    error_file_id: str | None
    counts: dict[str, int]  # of total, completed and failed lines
    metadata: dict[str, str]
    validation_errors: list[dict[str, Any]] | None
    state_times: dict[str, int]
    runner_name: str | None
    heartbeat_at: float
    created_at: float


class WebhookRecord(FrozenModel):
    """A webhook: the address that receives events (`url`), the key that signs them (`secret`), and the event types."""

    id: str
    owner: str
    url: str
    secret: str
    name: str
    event_types: list[str]
    created_at: float


class KeyClaim(FrozenModel):
    """A claimed idempotency key: what was requested and created with it. `is_new` says that it was not used before."""

    request_digest: str
    resource_id: str
    waiting_clients: int
    is_new: bool = False


class PartRecord(FrozenModel):
    """Where a part of a worker's model computes.

    `location` is "gpu", "gpu-in-turn", "gpu-in-blocks" or "cpu", `dtype` the type of its weights, and `compute_dtype`
    the type that they are cast to, one block at a time, if the two differ.
    """

    name: str
    location: str
    dtype: str
    compute_dtype: str
    size_bytes: int


class WorkerRecord(FrozenModel):
    """A worker, as it describes itself: its weights and precision (`ModelIdentity`), and where each part computes."""

    name: str
    preset: str
    weights: str
    precision: str
    placement: str
    parts: tuple[PartRecord, ...]
