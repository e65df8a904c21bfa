"""Batches and their lines in a real database: SQLite and PostgreSQL."""

import threading
import time

import pytest
from sqlalchemy import Engine, update

from omnivideo.errors import ServiceBusy, StoreError
from omnivideo.storage.database import schema
from omnivideo.storage.database.batches import BatchRecord, BatchRepository, LineOutcome
from omnivideo.storage.database.engine import create_database_engine
from omnivideo.storage.database.repository import unix_now
from tests.support.claims import claim_from_threads
from tests.support.servers import free_port


@pytest.fixture
def batches(empty_database: Engine) -> BatchRepository:
    return BatchRepository(empty_database)


def create_batch(batches: BatchRepository, batch_id: str, owner: str = "ann", max_open_batches: int = 9) -> BatchRecord:
    return batches.create_batch(
        owner, max_open_batches, batch_id=batch_id, endpoint="/v1/videos", input_file_id="file", metadata={"a": "b"}
    )


def silence_runners(batches: BatchRepository) -> None:
    """Set the last heartbeat of every batch to a minute ago."""
    batches.fetch_all(update(schema.batches).values(heartbeat_at=unix_now() - 60.0))


def test_the_open_batches_of_one_owner_are_limited(batches: BatchRepository) -> None:
    batch = create_batch(batches, "one", max_open_batches=1)
    assert create_batch(batches, "one", max_open_batches=1) == batch
    assert (batch.state, batch.metadata, batch.output_file_id) == ("validating", {"a": "b"}, None)
    with pytest.raises(ServiceBusy):
        create_batch(batches, "two", max_open_batches=1)
    assert create_batch(batches, "two", owner="bob", max_open_batches=1)
    batches.transition_batch(batch, "failed", validation_errors=[{"code": "x"}])
    assert create_batch(batches, "three", max_open_batches=1).state == "validating"


def test_a_batch_has_one_runner_until_the_runner_falls_silent(batches: BatchRepository) -> None:
    create_batch(batches, "one")
    batch = batches.claim_batch("first", 5.0)
    assert batch and batch.id == "one" and batches.claim_batch("second", 5.0) is None
    assert batches.transition_batch(batch, "in_progress", "first", counts={"total": 1, "completed": 0, "failed": 0})
    assert not batches.transition_batch(batch, "failed", "first")  # its state has changed since
    silence_runners(batches)
    batches.heartbeat_batches("first", ["one"])
    assert batches.claim_batch("second", 5.0) is None
    silence_runners(batches)
    claimed = batches.claim_batch("second", 5.0)
    assert claimed and claimed.runner_name == "second" and batches.get_claimed_batch("one", "first") is None
    assert not batches.transition_batch(claimed, "finalizing", "first") and "in_progress_at" in claimed.state_times
    batches.release_batches("second")
    claimed = batches.claim_batch("third", 5.0)
    assert claimed and claimed.id == "one"


def test_the_first_outcome_of_a_line_is_kept(batches: BatchRepository) -> None:
    batches.save_line_outcomes("one", [LineOutcome(2, True, {"a": 1}), LineOutcome(1, False, {"b": 2})])
    batches.save_line_outcomes("one", [LineOutcome(2, False, {"a": 9}), LineOutcome(3, True, {"c": 3})])
    assert batches.load_line_results("one") == {1: False, 2: True, 3: True}
    assert [outcome.output_line for outcome in batches.list_line_outcomes("one", 1, 9)] == [{"a": 1}, {"c": 3}]
    batches.delete_line_outcomes("one")
    assert not batches.list_line_outcomes("one", 0, 9)


def test_several_runners_never_claim_the_same_batch(batches: BatchRepository) -> None:
    for index in range(20):
        create_batch(batches, f"batch{index}", max_open_batches=99)

    def claim() -> list[str]:
        batch = batches.claim_batch(threading.current_thread().name, 60.0)
        return [batch.id] if batch else []

    claimed_ids = claim_from_threads(claim)
    assert len(claimed_ids) == len(set(claimed_ids)) == 20


def test_an_unreachable_database_is_reported() -> None:
    batches = BatchRepository(create_database_engine(f"postgresql://test@127.0.0.1:{free_port()}/postgres"))
    started_at = time.monotonic()
    with pytest.raises(StoreError, match="database: the server cannot be reached"):
        batches.get_batch("a", "ann")
    assert time.monotonic() - started_at < 10


def test_a_batch_that_stops_its_runners_ends_with_a_reason(batches: BatchRepository) -> None:
    create_batch(batches, "one")
    error = {"code": "poison", "message": "it stopped its runners"}
    for runner in ("first", "second", "third"):
        assert not batches.fail_poisonous_batches(5.0, error)
        assert batches.claim_batch(runner, 5.0)
        silence_runners(batches)
    assert batches.fail_poisonous_batches(5.0, error) == ["one"]
    failed = batches.get_batch("one", "ann")
    assert failed and failed.state == "failed" and failed.validation_errors == [error]
    assert not batches.claim_batch("fourth", 5.0)


def test_progress_and_stops_are_no_losses_of_a_batch(batches: BatchRepository) -> None:
    create_batch(batches, "one")
    for index in range(6):
        assert batches.claim_batch(f"runner{index}", 5.0)
        if index % 2:
            batches.release_batches(f"runner{index}")
        else:
            batches.update_batch_counts("one", {"total": 9, "completed": index, "failed": 0})
            silence_runners(batches)
        assert not batches.fail_poisonous_batches(5.0, {"code": "poison", "message": ""})


def test_batches_are_claimed_from_owners_in_turn(batches: BatchRepository) -> None:
    for index in range(9):
        create_batch(batches, f"bulk{index}", owner="ann")
    create_batch(batches, "small", owner="bob")
    claimed = [batches.claim_batch("runner", 60.0) for _ in range(3)]
    assert [batch and batch.id for batch in claimed] == ["bulk0", "small", "bulk1"]
    assert batches.claim_batch("runner", 60.0, ["ann"]) is None
