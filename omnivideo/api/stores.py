"""The stores of records that the API alone reads: files, batches, webhooks, idempotency keys, API keys and workers.

The stores of jobs and turns, which the planner and the workers use too, are in omnivideo/ports.py. The repositories in
storage/database implement all of them.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from omnivideo.records import (
    APIKeyRecord,
    BatchRecord,
    FileRecord,
    KeyClaim,
    RequestWindow,
    UsageRecord,
    WebhookRecord,
    WorkerRecord,
)


class UserFileStore(Protocol):
    def create_file(
        self, owner: str, *, file_id: str, name: str, purpose: str, size_bytes: int, object_key: str,
        artifact: dict[str, Any] | None, lifetime_seconds: float | None = None,
    ) -> FileRecord:  # fmt: skip
        """Create a file, which expires after `lifetime_seconds`, and return it.

        If the id exists, return the file that has it, unchanged.
        """
        ...

    def get_file(self, file_id: str, owner: str) -> FileRecord | None: ...

    def list_files(
        self, owner: str, purpose: str | None, after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[FileRecord], bool]:
        """Return a page of the owner's files, of one purpose if given, and whether more follow."""
        ...

    def delete_file(self, file_id: str, owner: str) -> bool:
        """Return False if the owner has no such file."""
        ...


class BatchStore(Protocol):
    def create_batch(
        self, owner: str, max_open_batches: int, *, batch_id: str, endpoint: str, input_file_id: str,
        metadata: dict[str, str],
    ) -> BatchRecord:  # fmt: skip
        """Create a batch and return it. If the owner has a batch with the id, return that one, unchanged.

        Raises ServiceBusy if the owner already has `max_open_batches` active batches.
        """
        ...

    def get_batch(self, batch_id: str, owner: str) -> BatchRecord | None: ...

    def list_batches(self, owner: str, after: str | None, limit: int) -> tuple[list[BatchRecord], bool]:
        """Return a page of the owner's batches, newest first, and whether more follow."""
        ...

    def transition_batch(self, batch: BatchRecord, state: str) -> bool:
        """Move a batch to another state. Return False if its state is no longer that of `batch`."""
        ...

    def delete_batch(self, batch_id: str, owner: str) -> bool:
        """Delete a batch and cancel it. Return False if the owner has no such batch."""
        ...


class WebhookStore(Protocol):
    def create_webhook(
        self, owner: str, max_webhooks: int, *, webhook_id: str, url: str, secret: str, name: str,
        event_types: Sequence[str],
    ) -> WebhookRecord:  # fmt: skip
        """Create a webhook and return it. Raises InvalidInput if the owner already has `max_webhooks`."""
        ...

    def get_webhook(self, webhook_id: str, owner: str) -> WebhookRecord | None: ...

    def list_webhooks(self, owner: str, after: str | None, limit: int) -> tuple[list[WebhookRecord], bool]:
        """Return a page of the owner's webhooks, newest first, and whether more follow."""
        ...

    def update_webhook(self, webhook_id: str, owner: str, **values: Any) -> WebhookRecord | None:
        """Set fields of a webhook and return it, or None if the owner has no such webhook."""
        ...

    def enqueue_deliveries(self, events: Sequence[tuple[str, str, dict[str, Any]]]) -> None:
        """Send events, as (event id, webhook id, body), to webhooks."""
        ...

    def delete_webhook(self, webhook_id: str, owner: str) -> bool:
        """Return False if the owner has no such webhook."""
        ...


class IdempotencyStore(Protocol):
    def claim_key(
        self, owner: str, key_digest: str, *, request_digest: str, resource_id: str, lease_seconds: float
    ) -> KeyClaim | None:
        """Claim a key, which is created with `resource_id` if it is new. Return None while another request has it.

        A key with another digest is not claimed, but returned.
        """
        ...

    def set_key_resource(self, owner: str, key_digest: str, resource_id: str) -> None: ...

    def release_key(self, owner: str, key_digest: str, waiting_clients: int | None = None) -> None: ...

    def delete_key(self, owner: str, key_digest: str) -> None: ...


class APIKeyStore(Protocol):
    @property
    def is_required(self) -> bool:
        """Return whether a request needs a key, which it does if the operator has set an admin key."""
        ...

    def find_key(self, key: str) -> APIKeyRecord | None:
        """Return a key, whose id owns everything created with it, or None if it is wrong or revoked, or has expired."""
        ...

    def is_active(self, owner: str) -> bool:
        """Return whether the key with this id is valid."""
        ...


class UsageStore(Protocol):
    def count_request(self, owner: str) -> RequestWindow:
        """Count a request of the owner in the current minute."""
        ...

    def reserve_bytes(self, owner: str, size_bytes: int) -> AbstractContextManager[None]:
        """Count bytes that are stored within the context. Raises LimitReached if the owner may not store them today."""
        ...

    def add_usage(self, owner: str, **counts: float) -> None:
        """Add to what the owner has used today; the names are fields of UsageRecord."""
        ...

    def check_daily_limits(self, owner: str) -> None:
        """Raise LimitReached if the owner has used up a share of the day."""
        ...

    def list_usage(self, owner: str | None, num_days: int) -> list[UsageRecord]:
        """Return the use of the last days by one owner or by all, the newest day first."""
        ...


class WorkerStore(Protocol):
    def list_workers(self, max_age_seconds: float) -> list[WorkerRecord]:
        """Return the workers that have reported within the last `max_age_seconds`, by name."""
        ...
