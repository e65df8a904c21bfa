"""The life of jobs in a real database: SQLite and PostgreSQL."""

import threading
import time

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import update

from omnivideo.contracts import Artifact, Job, StepProgress, resolve_sampling_params
from omnivideo.errors import InvalidInput, JobCancelled, JobFailed, JobLost, ServiceBusy, StoreError
from omnivideo.presets import TINY
from omnivideo.storage.database.engine import create_database_engine, upgrade_schema
from omnivideo.storage.database.jobs import JobRepository, result_from_status
from omnivideo.storage.database.repository import unix_now
from omnivideo.storage.database.schema import jobs, metadata
from tests.support.servers import free_port


@pytest.fixture
def book(empty_database):
    return JobRepository(empty_database)


def job(name: str, prompt: str = "a red ball") -> Job:
    params = resolve_sampling_params(TINY, "text-to-video", seed=1)
    return Job(id=name, prompt=prompt, visual_tokens=None, source=None, params=params)


ARTIFACT = Artifact(
    key="a.mp4", medium="video", width=64, height=64, frames=9, fps=8, caption="a red ball", created_by="one"
)


def silence(book: JobRepository, name: str) -> None:
    """As if the job's worker had not been heard of for an hour."""
    with book.engine.connect() as connection:
        connection.execute(
            update(jobs)
            .where(jobs.c.id == name)
            .values(heartbeat_at=unix_now() - 3600.0, notified_at=unix_now() - 3600.0)
        )


def test_migrations_make_the_tables_that_the_code_speaks_of(engine):
    upgrade_schema(engine)  # again: nothing is left to do
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_a_job_is_drawn_once(book):
    assert book.submit(job("one")) and not book.submit(job("one"))
    claim = book.claim_next_job("worker")
    assert (claim.job, claim.attempt, claim.resume_key) == (job("one"), 1, None)
    assert book.claim_next_job("worker") is None
    assert book.heartbeat(
        claim, StepProgress(step=3, steps=20, eta_seconds=1.5), preview="p.png", resume_key="x.safetensors"
    )
    seen = book.get_status("one")
    assert (seen.state, seen.step, seen.steps, seen.eta_seconds, seen.preview) == ("running", 3, 20, 1.5, "p.png")
    assert result_from_status(seen) is None
    book.mark_done(claim, ARTIFACT)
    assert result_from_status(book.get_status("one")) == ARTIFACT
    with pytest.raises(JobLost):
        book.heartbeat(claim)


def test_an_id_stands_for_one_request_of_one_owner(book):
    book.submit(job("one"), owner="ann")
    with pytest.raises(InvalidInput, match="id: that id belongs to a different job"):
        book.submit(job("one", "a blue ball"), owner="ann")
    with pytest.raises(InvalidInput, match="id: that id belongs to a different job"):
        book.submit(job("one"), owner="bob")


def test_interactive_work_comes_before_batches(book):
    book.submit(job("slow"), lane="batch")
    book.submit(job("quick"))
    assert [book.claim_next_job("w").job.id for _ in range(2)] == ["quick", "slow"]


def test_owners_take_turns(book):
    for at in range(6):
        book.submit(job(f"ann{at}"), owner="ann")
    assert book.claim_next_job("w").job.id == "ann0"
    book.submit(job("bob0"), owner="bob")
    book.submit(job("bob1"), owner="bob")
    order = [book.claim_next_job("w").job.id for _ in range(5)]
    assert order.index("bob0") <= 1 and order.index("bob1") <= 3
    assert [name for name in order if name.startswith("ann")] == ["ann1", "ann2", "ann3"]


def test_bounds_are_kept(engine, book):
    small = JobRepository(engine, max_open_jobs=3, max_open_jobs_per_owner=2)
    small.submit(job("ann0"), owner="ann")
    small.submit(job("ann1"), owner="ann")
    with pytest.raises(ServiceBusy) as full:
        small.submit(job("ann2"), owner="ann")
    assert full.value.retry_after_seconds > 0
    small.submit(job("bob0"), owner="bob")
    with pytest.raises(ServiceBusy):
        small.submit(job("cid0"), owner="cid")
    assert not small.submit(job("bob0"), owner="bob")  # what is known already is no new work


def test_a_silent_workers_job_goes_to_another_one_from_its_point(book):
    book.submit(job("one"))
    late = book.claim_next_job("first")
    book.heartbeat(late, StepProgress(step=8, steps=20, eta_seconds=1.0), resume_key="x.safetensors")
    assert book.requeue_lost_jobs(5.0) == []
    silence(book, "one")
    assert book.requeue_lost_jobs(5.0) == ["one"]
    claim = book.claim_next_job("second")
    assert (claim.attempt, claim.resume_key) == (2, "x.safetensors")
    for twin in (
        lambda: book.heartbeat(late),
        lambda: book.mark_done(late, ARTIFACT),
        lambda: book.mark_failed(late, "x", "x"),
    ):
        with pytest.raises(JobLost):
            twin()
    book.mark_done(claim, ARTIFACT)
    assert book.get_status("one").state == "done"


def test_a_job_that_silences_three_workers_fails(book):
    book.submit(job("one"))
    for _ in range(3):
        assert book.claim_next_job("w")
        silence(book, "one")
        book.requeue_lost_jobs(5.0)
    assert book.claim_next_job("w") is None
    with pytest.raises(JobFailed, match="it stopped 3 workers in a row") as failed:
        result_from_status(book.get_status("one"))
    assert failed.value.code == "poison"


def test_cancelling(book):
    book.submit(job("waits"))
    book.submit(job("runs"))
    book.cancel("waits")
    with pytest.raises(JobCancelled):
        result_from_status(book.get_status("waits"))
    claim = book.claim_next_job("w")
    assert claim.job.id == "runs" and book.heartbeat(claim)
    book.cancel("runs")
    assert not book.heartbeat(claim)
    book.mark_cancelled(claim)
    assert book.get_status("runs").state == "cancelled"
    book.cancel("runs")
    book.cancel("nothing")


def test_a_cancelled_job_of_a_lost_worker_is_not_drawn_again(book):
    book.submit(job("one"))
    book.claim_next_job("w")
    book.cancel("one")
    silence(book, "one")
    assert book.requeue_lost_jobs(5.0) == []
    assert book.get_status("one").state == "cancelled"


def test_a_message_that_was_lost_is_noticed_once(book):
    book.submit(job("one"))
    assert not book.claim_renotification(5.0)
    silence(book, "one")
    assert book.claim_renotification(5.0) and not book.claim_renotification(5.0)


def test_many_workers_never_share_a_job(book):
    for at in range(60):
        book.submit(job(f"{at}"), owner=f"owner{at % 3}")
    taken: list[str] = []

    def work() -> None:
        while claim := book.claim_next_job(threading.current_thread().name):
            taken.append(claim.job.id)
            book.mark_done(claim, ARTIFACT)

    workers = [threading.Thread(target=work) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    # A worker that found every waiting row locked may have gone home early: what is left is one more claim away.
    work()
    assert sorted(taken) == sorted(str(at) for at in range(60))


def test_a_database_that_is_away_is_said():
    began = time.monotonic()
    with pytest.raises(StoreError, match="database: it does not answer"):
        JobRepository(create_database_engine(f"postgresql://test@127.0.0.1:{free_port()}/postgres")).submit(job("one"))
    assert time.monotonic() - began < 10


def any_job(found: Job) -> bool:
    return True


def test_a_pack_is_the_next_of_the_batch_lane_and_half_of_it_at_most(book):
    book.submit(job("quick"))
    for at in range(6):
        book.submit(job(f"line{at}", f"ball {at}"), lane="batch")
    quick, first = book.claim_next_job("w"), book.claim_next_job("w")
    assert (quick.lane, first.lane) == ("interactive", "batch")
    assert book.claim_render_batch(quick, "w", 4, any_job) == [quick]
    claims = book.claim_render_batch(first, "w", 4, lambda found: found.prompt != "ball 2")
    assert [claim.job.id for claim in claims] == ["line0", "line1", "line3"]  # 4 wait that are alike: 2 of them
    assert {claim.batch_job_ids for claim in claims} == {("line0", "line1", "line3")}
    assert all(book.get_status(claim.job.id).state == "running" for claim in claims)
    assert book.heartbeat_all(claims, StepProgress(step=2, steps=9, eta_seconds=1.0), resume_key="x.safetensors") == {
        "line0": True, "line1": True, "line3": True
    }  # fmt: skip
    book.cancel("line1")
    assert book.heartbeat_all(claims) == {"line0": True, "line1": False, "line3": True}


def test_a_lost_pack_is_taken_over_whole(book):
    for at in range(6):
        book.submit(job(f"line{at}"), lane="batch")
    claims = book.claim_render_batch(book.claim_next_job("w"), "w", 3, any_job)
    pack = claims[0].batch_job_ids
    book.heartbeat_all(claims, resume_key="x.safetensors")
    book.mark_done(claims[1], ARTIFACT)
    for name in pack:
        silence(book, name)
    assert set(book.requeue_lost_jobs(60)) == {pack[0], pack[2]}
    again = sorted(book.claim_render_batch(book.claim_next_job("v"), "v", 1, any_job), key=lambda claim: claim.job.id)
    assert [(claim.job.id, claim.attempt, claim.resume_key, claim.batch_job_ids) for claim in again] == [
        (pack[0], 2, "x.safetensors", pack), (pack[2], 2, "x.safetensors", pack)
    ]  # fmt: skip
    assert book.heartbeat_all(claims) == {}  # the first worker has none of them any more
    fresh = book.claim_render_batch(book.claim_next_job("v"), "v", 3, any_job)
    assert fresh[0].job.id == "line3" and fresh[0].batch_job_ids == ("line3", "line4")


# ---------------------------------------------------------------- jobs as their owner sees them


def test_pages_follow_each_other_even_if_jobs_have_the_same_time(book):
    for at in range(7):
        book.submit(job(f"job{at}"), "ann", kind="video")
    book.fetch_all(update(jobs).where(jobs.c.id.in_(["job2", "job3", "job4"])).values(created_at=unix_now()))
    for newest_first in (True, False):
        seen, after, has_more = [], None, True
        while has_more:
            page, has_more = book.list_owned_jobs("ann", "video", after, 2, newest_first)
            seen += [status.id for status in page]
            after = seen[-1]
        assert sorted(seen) == [f"job{at}" for at in range(7)] and len(page) == 1
    with pytest.raises(InvalidInput, match="after"):
        book.list_owned_jobs("bob", "video", "job1", 2, True)
    assert book.list_owned_jobs("ann", "image", None, 2, True) == ([], False)


def test_a_deleted_job_is_not_found_nor_deleted_again(book):
    book.submit(job("one"), "ann", kind="video")
    assert book.get_owned_job("one", "ann", "video") and not book.get_owned_job("one", "bob", "video")
    assert not book.delete_owned_job("one", "bob", "video") and book.delete_owned_job("one", "ann", "video")
    assert not book.delete_owned_job("one", "ann", "video") and book.get_owned_job("one", "ann", "video") is None


def test_the_end_of_a_job_is_announced_once(book):
    book.submit(job("one"), "ann", kind="video")
    book.submit(job("two"), "ann", kind="image")
    assert not book.list_unannounced_jobs("video", 9)
    for _ in range(2):
        book.mark_done(book.claim_next_job("w"), ARTIFACT)
    (ended,) = book.list_unannounced_jobs("video", 9)
    assert (ended.id, ended.owner, ended.state) == ("one", "ann", "done") and ended.ended_at > 0
    book.mark_announced([ended.id])
    assert not book.list_unannounced_jobs("video", 9)
