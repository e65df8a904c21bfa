"""Files, batches, webhooks and lists of jobs in a real database: SQLite and PostgreSQL."""

import threading
import time

import pytest
from sqlalchemy import delete, update

from omnivideo.contracts import Artifact, Job
from omnivideo.errors import InvalidInput, ServiceBusy, StoreError
from omnivideo.storage.database.jobs import JobRepository
from omnivideo.storage.database.schema import (
    batch_lines,
    batches,
    create_database_engine,
    files,
    jobs,
    unix_now,
    webhook_deliveries,
    webhooks,
)
from omnivideo.storage.records import RecordRepository
from tests.support.servers import free_port


@pytest.fixture
def records(engine):
    made = RecordRepository(engine)
    for table in (jobs, files, batches, batch_lines, webhooks, webhook_deliveries):
        made.fetch_all(delete(table))
    return made


def submit(records: RecordRepository, name: str, owner: str = "ann", kind: str = "video") -> None:
    job = Job(id=name, task="text-to-video", prompt="a", visual_tokens=None, source=None, seed=1)
    JobRepository(records.engine).submit(job, owner, kind=kind, meta={"size": "64x64"})


def end(records: RecordRepository) -> str:
    book = JobRepository(records.engine)
    claim = book.claim_next_job("w")
    made = Artifact(
        key="a.mp4", medium="video", width=64, height=64, frames=9, fps=8, caption="a", created_by=claim.job.id
    )
    book.mark_done(claim, made)
    return claim.job.id


def file(records: RecordRepository, name: str, owner: str = "ann", **given):
    values = {"name": "a", "purpose": "batch", "size_bytes": 1, "object_key": f"{name}.bin", "artifact": None} | given
    return records.create_file(owner, id=name, **values)


def batch(records: RecordRepository, name: str, owner: str = "ann", most: int = 9):
    return records.create_batch(
        owner, most, id=name, endpoint="/v1/videos", input_file_id="file", metadata={"a": "b"}, state_times={}
    )


def test_pages_follow_each_other_whatever_their_moment(records):
    for at in range(7):
        submit(records, f"job{at}")
    records.fetch_all(update(jobs).where(jobs.c.id.in_(["job2", "job3", "job4"])).values(created_at=unix_now()))
    for newest in (True, False):
        seen, after, more = [], None, True
        while more:
            page, more = records.list_owned_jobs("ann", "video", after, 2, newest)
            seen += [status.id for status in page]
            after = seen[-1]
        assert sorted(seen) == [f"job{at}" for at in range(7)] and len(page) == 1
    with pytest.raises(InvalidInput, match="after"):
        records.list_owned_jobs("bob", "video", "job1", 2, True)
    assert records.list_owned_jobs("ann", "image", None, 2, True) == ([], False)


def test_a_removed_job_is_not_found_nor_removed_again(records):
    submit(records, "one")
    assert records.get_owned_job("one", "ann", "video") and not records.get_owned_job("one", "bob", "video")
    assert not records.delete_owned_job("one", "bob", "video") and records.delete_owned_job("one", "ann", "video")
    assert not records.delete_owned_job("one", "ann", "video") and records.get_owned_job("one", "ann", "video") is None


def test_a_file_is_kept_as_it_first_was(records):
    first, again = file(records, "one", artifact={"a": [1]}), file(records, "one", object_key="other.bin")
    assert first == again and again.artifact == {"a": [1]} and again.created_at > 0
    file(records, "two", purpose="vision")
    rows, more = records.list_files("ann", "vision", None, 5, True)
    assert ([row.id for row in rows], more) == (["two"], False)
    assert records.delete_file("one", "ann") and not records.get_file("one", "ann")


def test_what_files_refer_to_stays(records):
    for name in ("kept", "file", "gone"):
        file(records, name)
    row = batch(records, "batch")
    records.delete_file("gone", "ann")
    records.delete_file("file", "ann")
    assert (
        records.collect_referenced_keys() == {"kept.bin", "file.bin"}
        and records.get_batch_input_key("batch") == "file.bin"
    )
    records.transition_batch(row, "failed")
    assert records.collect_referenced_keys() == {"kept.bin"}


def test_open_batches_of_one_owner_are_bounded(records):
    one = batch(records, "one", most=1)
    assert batch(records, "one", most=1) == one and (one.state, one.metadata, one.output_file_id) == (
        "validating",
        {"a": "b"},
        None,
    )
    with pytest.raises(ServiceBusy):
        batch(records, "two", most=1)
    assert batch(records, "two", owner="bob", most=1)
    records.transition_batch(one, "failed", validation_errors=[{"code": "x"}])
    assert batch(records, "three", most=1).state == "validating"


def test_a_batch_has_one_runner_until_it_falls_silent(records):
    batch(records, "one")
    row = records.claim_batch("first", 5.0)
    assert row.id == "one" and records.claim_batch("second", 5.0) is None
    assert records.transition_batch(row, "in_progress", "first", counts={"total": 1, "completed": 0, "failed": 0})
    assert not records.transition_batch(row, "failed", "first")  # it has moved on
    records.fetch_all(update(batches).values(heartbeat_at=unix_now() - 60.0))
    records.heartbeat_batches("first", ["one"])
    assert records.claim_batch("second", 5.0) is None
    records.fetch_all(update(batches).values(heartbeat_at=unix_now() - 60.0))
    taken = records.claim_batch("second", 5.0)
    assert taken.runner_name == "second" and records.get_claimed_batch("one", "first") is None
    assert not records.transition_batch(taken, "finalizing", "first") and "in_progress_at" in taken.state_times
    records.release_batches("second")
    assert records.claim_batch("third", 5.0).id == "one"


def test_lines_are_kept_once(records):
    records.save_line_outcomes("one", [(2, True, {"a": 1}), (1, False, {"b": 2})])
    records.save_line_outcomes("one", [(2, False, {"a": 9}), (3, True, {"c": 3})])
    assert records.load_line_results("one") == {1: False, 2: True, 3: True}
    assert [row.output_line for row in records.list_line_outcomes("one", 1, 9)] == [{"a": 1}, {"c": 3}]
    records.delete_line_outcomes("one")
    assert not records.list_line_outcomes("one", 0, 9)


def hook(records: RecordRepository, name: str, most: int = 9):
    return records.create_webhook(
        "ann", most, id=name, url="https://a.test/", secret="whsec_", name="a", event_types=["x"]
    )


def test_hooks_of_one_owner_are_bounded(records):
    assert hook(records, "one", most=1).event_types == ["x"]
    with pytest.raises(InvalidInput, match="webhooks"):
        hook(records, "two", most=1)
    assert records.delete_webhook("one", "ann") and not records.delete_webhook("one", "ann")


def test_an_end_is_announced_and_delivered_once(records):
    hook(records, "hook")
    submit(records, "one")
    submit(records, "two", kind="image")
    assert not records.list_unannounced_jobs("video", 9)
    end(records)
    (job,) = records.list_unannounced_jobs("video", 9)
    for _ in range(2):
        records.enqueue_deliveries([("event", "hook", {"created_at": 1})])
    records.mark_announced([job.id])
    assert (job.id, job.state) == ("one", "done") and not records.list_unannounced_jobs("video", 9)
    ((row, found),) = records.claim_due_deliveries(9, 60.0)
    assert (row.attempts, row.body, found.id) == (1, {"created_at": 1}, "hook") and not records.claim_due_deliveries(
        9, 60.0
    )
    records.postpone_delivery("event", -1.0)
    records.delete_webhook("hook", "ann")
    ((row, found),) = records.claim_due_deliveries(9, -1.0)
    assert (row.attempts, found) == (2, None)
    records.complete_delivery("event")
    records.delete_old_deliveries()
    assert not records.claim_due_deliveries(9, 60.0)


def test_many_senders_and_runners_never_share(records):
    records.enqueue_deliveries([(f"event{at}", "hook", {}) for at in range(40)])
    for at in range(10):
        batch(records, f"batch{at}", most=99)
    taken: list[str] = []

    def work() -> None:
        name = threading.current_thread().name
        while (due := records.claim_due_deliveries(3, 60.0)) or (row := records.claim_batch(name, 60.0)):
            taken.extend([delivery.id for delivery, _ in due] if due else [row.id])

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    work()  # a worker that found every waiting row locked may have gone home early
    assert len(taken) == len(set(taken)) == 50


def test_a_database_that_is_away_is_said():
    away = RecordRepository(create_database_engine(f"postgresql://test@127.0.0.1:{free_port()}/postgres"))
    began = time.monotonic()
    with pytest.raises(StoreError, match="database: it does not answer"):
        away.get_file("a", "ann")
    assert time.monotonic() - began < 10
