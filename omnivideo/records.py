"""What the service stores, as frozen records: files, batches, webhooks, keys and their use, workers, times of jobs."""

from datetime import UTC, datetime
from typing import Any, Literal

from omnivideo.contracts import FrozenModel, Lane
from omnivideo.errors import SECONDS_PER_DAY

Scope = Literal["read", "generate", "administer"]
SCOPES: tuple[Scope, ...] = ("read", "generate", "administer")
DEFAULT_SCOPES: tuple[Scope, ...] = ("read", "generate")
REQUEST_WINDOW_SECONDS = 60  # in which a key's requests are counted


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


class KeyLimits(FrozenModel):
    """What a key may use. 0 is without a limit. A day is one of UTC; "device" is a worker's GPU or CPU."""

    requests_per_minute: int = 0
    open_jobs: int = 0  # queued or running
    device_seconds_per_day: float = 0.0
    stored_bytes_per_day: int = 0


class APIKeyRecord(FrozenModel):
    """An API key without the key itself. `own_limits` has those that replace the settings' limits."""

    id: str
    name: str
    created_at: float
    revoked: bool
    expires_at: float | None
    scopes: tuple[Scope, ...]
    own_limits: dict[str, float]

    def merge_limits(self, defaults: KeyLimits) -> KeyLimits:
        return KeyLimits(**defaults.model_dump() | self.own_limits)


class RequestWindow(FrozenModel):
    """The requests of a key in its current minute, with the one that is counted now."""

    request_count: int
    seconds_left: float


class UsageRecord(FrozenModel):
    """What a key has used on a day (UTC), which is counted from 1970-01-01.

    `steps` are denoising steps and `device_seconds` the time of workers, in all attempts and also for clips that have
    failed or were cancelled. `stored_bytes` were written on that day, whether or not they have been deleted since.
    """

    owner: str
    day: int
    clips: int = 0
    images: int = 0
    steps: int = 0
    device_seconds: float = 0.0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    stored_bytes: int = 0

    @property
    def date(self) -> str:
        """The day as YYYY-MM-DD."""
        return datetime.fromtimestamp(self.day * SECONDS_PER_DAY, UTC).date().isoformat()


JOB_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)  # bounds of the histograms of jobs' times


class DurationCounts(FrozenModel):
    """How many durations are up to each of some bounds, how many there are, and their sum in seconds."""

    counts: tuple[int, ...]
    total: int
    sum_seconds: float


class JobDurations(FrozenModel):
    """How long the completed jobs of a lane have waited and were generated, and their denoising steps."""

    lane: Lane
    queued: DurationCounts
    generated: DurationCounts
    steps: int
