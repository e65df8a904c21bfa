"""Idempotency keys in SQLite and PostgreSQL: one request at a time claims a key."""

from sqlalchemy import Engine

from omnivideo.records import KeyClaim
from omnivideo.storage.database.idempotency import IdempotencyRepository


def claim_key(
    keys: IdempotencyRepository, digest: str = "d", lease_seconds: float = 60.0, owner: str = "ann"
) -> KeyClaim | None:
    return keys.claim_key(owner, "k", request_digest=digest, resource_id=f"{owner} 1", lease_seconds=lease_seconds)


def test_a_key_is_claimed_by_one_request_until_it_is_released(empty_database: Engine) -> None:
    keys = IdempotencyRepository(empty_database)
    first = claim_key(keys)
    assert first is not None and first.is_new and first.resource_id == "ann 1"
    assert claim_key(keys) is None
    keys.set_key_resource("ann", "k", "ann 2")
    keys.release_key("ann", "k", waiting_clients=3)
    second = claim_key(keys, lease_seconds=-1.0)
    assert second == KeyClaim(request_digest="d", resource_id="ann 2", waiting_clients=3)
    assert claim_key(keys) == second  # the lease of a dead process ends


def test_a_key_of_another_request_is_returned_but_not_claimed(empty_database: Engine) -> None:
    keys = IdempotencyRepository(empty_database)
    claim_key(keys)
    other = claim_key(keys, "another")
    assert other is not None and other.request_digest == "d" and not other.is_new
    assert claim_key(keys) is None
    assert (claim := claim_key(keys, "another", owner="bob")) is not None and claim.is_new


def test_keys_are_forgotten(empty_database: Engine) -> None:
    keys = IdempotencyRepository(empty_database)
    claim_key(keys)
    keys.delete_key("ann", "k")
    assert (claim := claim_key(keys)) is not None and claim.is_new
    keys.delete_old_keys(60.0)
    assert claim_key(keys) is None
    keys.delete_old_keys(-60.0)
    assert (claim := claim_key(keys)) is not None and claim.is_new
