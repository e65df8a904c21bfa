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
    values = {"name": "a", "purpose": "batch", "bytes": 1, "key": f"{name}.bin", "artifact": None} | given
    return records.create_file(owner, id=name, **values)


def batch(records: RecordRepository, name: str, owner: str = "ann", most: int = 9):
    return records.create_batch(owner, most, id=name, endpoint="/v1/videos", input="file", meta={"a": "b"}, times={})


def test_pages_follow_each_other_whatever_their_moment(records):
    for at in range(7):
        submit(records, f"job{at}")
    records.all(update(jobs).where(jobs.c.id.in_(["job2", "job3", "job4"])).values(made=unix_now()))
    for newest in (True, False):
        seen, after, more = [], None, True
        while more:
            page, more = records.jobs("ann", "video", after, 2, newest)
            seen += [status.id for status in page]
            after = seen[-1]
        assert sorted(seen) == [f"job{at}" for at in range(7)] and len(page) == 1
    with pytest.raises(InvalidInput, match="after"):
        records.jobs("bob", "video", "job1", 2, True)
    assert records.jobs("ann", "image", None, 2, True) == ([], False)


def test_a_removed_job_is_not_found_nor_removed_again(records):
    submit(records, "one")
    assert records.job("one", "ann", "video") and not records.job("one", "bob", "video")
    assert not records.remove_job("one", "bob", "video") and records.remove_job("one", "ann", "video")
    assert not records.remove_job("one", "ann", "video") and records.job("one", "ann", "video") is None


def test_a_file_is_kept_as_it_first_was(records):
    first, again = file(records, "one", artifact={"a": [1]}), file(records, "one", key="other.bin")
    assert first == again and again.artifact == {"a": [1]} and again.made > 0
    file(records, "two", purpose="vision")
    rows, more = records.files("ann", "vision", None, 5, True)
    assert ([row.id for row in rows], more) == (["two"], False)
    assert records.remove_file("one", "ann") and not records.file("one", "ann")


def test_what_files_refer_to_stays(records):
    for name in ("kept", "file", "gone"):
        file(records, name)
    row = batch(records, "batch")
    records.remove_file("gone", "ann")
    records.remove_file("file", "ann")
    assert records.referred() == {"kept.bin", "file.bin"} and records.input_of("batch") == "file.bin"
    records.move(row, "failed")
    assert records.referred() == {"kept.bin"}


def test_open_batches_of_one_owner_are_bounded(records):
    one = batch(records, "one", most=1)
    assert batch(records, "one", most=1) == one and (one.state, one.meta, one.output) == (
        "validating",
        {"a": "b"},
        None,
    )
    with pytest.raises(ServiceBusy):
        batch(records, "two", most=1)
    assert batch(records, "two", owner="bob", most=1)
    records.move(one, "failed", trouble=[{"code": "x"}])
    assert batch(records, "three", most=1).state == "validating"


def test_a_batch_has_one_runner_until_it_falls_silent(records):
    batch(records, "one")
    row = records.take_batch("first", 5.0)
    assert row.id == "one" and records.take_batch("second", 5.0) is None
    assert records.move(row, "in_progress", "first", counts={"total": 1, "completed": 0, "failed": 0})
    assert not records.move(row, "failed", "first")  # it has moved on
    records.all(update(batches).values(beat=unix_now() - 60.0))
    records.beat_batches("first", ["one"])
    assert records.take_batch("second", 5.0) is None
    records.all(update(batches).values(beat=unix_now() - 60.0))
    taken = records.take_batch("second", 5.0)
    assert taken.runner == "second" and records.held_batch("one", "first") is None
    assert not records.move(taken, "finalizing", "first") and "in_progress_at" in taken.times
    records.leave_batches("second")
    assert records.take_batch("third", 5.0).id == "one"


def test_lines_are_kept_once(records):
    records.keep_lines("one", [(2, True, {"a": 1}), (1, False, {"b": 2})])
    records.keep_lines("one", [(2, False, {"a": 9}), (3, True, {"c": 3})])
    assert records.lines_done("one") == {1: False, 2: True, 3: True}
    assert [row.answer for row in records.lines("one", 1, 9)] == [{"a": 1}, {"c": 3}]
    records.forget_lines("one")
    assert not records.lines("one", 0, 9)


def hook(records: RecordRepository, name: str, most: int = 9):
    return records.create_webhook("ann", most, id=name, url="https://a.test/", secret="whsec_", name="a", events=["x"])


def test_hooks_of_one_owner_are_bounded(records):
    assert hook(records, "one", most=1).events == ["x"]
    with pytest.raises(InvalidInput, match="webhooks"):
        hook(records, "two", most=1)
    assert records.remove_hook("one", "ann") and not records.remove_hook("one", "ann")


def test_an_end_is_announced_and_delivered_once(records):
    hook(records, "hook")
    submit(records, "one")
    submit(records, "two", kind="image")
    assert not records.unannounced("video", 9)
    end(records)
    (job,) = records.unannounced("video", 9)
    for _ in range(2):
        records.deliver([("event", "hook", {"created_at": 1})])
    records.announced([job.id])
    assert (job.id, job.state) == ("one", "done") and not records.unannounced("video", 9)
    ((row, found),) = records.due(9, 60.0)
    assert (row.tries, row.body, found.id) == (1, {"created_at": 1}, "hook") and not records.due(9, 60.0)
    records.put_off("event", -1.0)
    records.remove_hook("hook", "ann")
    ((row, found),) = records.due(9, -1.0)
    assert (row.tries, found) == (2, None)
    records.delivered("event")
    records.tidy()
    assert not records.due(9, 60.0)


def test_many_senders_and_runners_never_share(records):
    records.deliver([(f"event{at}", "hook", {}) for at in range(40)])
    for at in range(10):
        batch(records, f"batch{at}", most=99)
    taken: list[str] = []

    def work() -> None:
        name = threading.current_thread().name
        while (due := records.due(3, 60.0)) or (row := records.take_batch(name, 60.0)):
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
