"""The lifecycle of jobs in a real database: SQLite and PostgreSQL."""

import threading
import time

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import update

from omnivideo.backends.queue.durable import result_from_status
from omnivideo.contracts import Artifact, Job, StepProgress, resolve_sampling_params
from omnivideo.errors import InvalidInput, JobCancelled, JobFailed, JobLost, ServiceBusy, StoreError
from omnivideo.presets import TINY
from omnivideo.storage.database.engine import create_database_engine, upgrade_schema
from omnivideo.storage.database.jobs import JobRepository
from omnivideo.storage.database.repository import unix_now
from omnivideo.storage.database.schema import jobs as jobs_table
from omnivideo.storage.database.schema import metadata
from tests.support.claims import MODEL
from tests.support.servers import free_port


@pytest.fixture
def jobs(empty_database):
    return JobRepository(empty_database)


def build_job(job_id: str, prompt: str = "a red ball") -> Job:
    params = resolve_sampling_params(TINY, "text-to-video", seed=1)
    return Job(id=job_id, prompt=prompt, visual_tokens=None, source=None, params=params, preset="tiny")


ARTIFACT = Artifact(
    key="a.mp4", medium="video", width=64, height=64, frames=9, fps=8, caption="a red ball", created_by="one"
)


def expire_heartbeat(jobs: JobRepository, job_id: str) -> None:
    """Set the last heartbeat and notification of a job to an hour ago."""
    with jobs.engine.connect() as connection:
        connection.execute(
            update(jobs_table)
            .where(jobs_table.c.id == job_id)
            .values(heartbeat_at=unix_now() - 3600.0, notified_at=unix_now() - 3600.0)
        )


def test_migrations_create_the_tables_of_the_schema(engine):
    upgrade_schema(engine)  # a second upgrade changes nothing
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_a_job_is_claimed_once(jobs):
    assert jobs.submit(build_job("one")) and not jobs.submit(build_job("one"))
    claim = jobs.claim_next_job("worker", MODEL)
    assert (claim.job, claim.attempt, claim.resume_key) == (build_job("one"), 1, None)
    assert jobs.claim_next_job("worker", MODEL) is None
    assert jobs.heartbeat(
        claim, StepProgress(step=3, steps=20, eta_seconds=1.5), preview="p.png", resume_key="x.safetensors"
    )
    seen = jobs.get_status("one")
    assert (seen.state, seen.step, seen.steps, seen.eta_seconds, seen.preview) == ("running", 3, 20, 1.5, "p.png")
    assert result_from_status(seen) is None
    jobs.mark_done(claim, ARTIFACT)
    assert result_from_status(jobs.get_status("one")) == ARTIFACT
    with pytest.raises(JobLost):
        jobs.heartbeat(claim)


def test_an_id_belongs_to_one_request_of_one_owner(jobs):
    jobs.submit(build_job("one"), owner="ann")
    with pytest.raises(InvalidInput, match="id: that id belongs to a different job"):
        jobs.submit(build_job("one", "a blue ball"), owner="ann")
    with pytest.raises(InvalidInput, match="id: that id belongs to a different job"):
        jobs.submit(build_job("one"), owner="bob")


def test_interactive_jobs_are_claimed_before_batch_jobs(jobs):
    jobs.submit(build_job("slow"), lane="batch")
    jobs.submit(build_job("quick"))
    assert [jobs.claim_next_job("w", MODEL).job.id for _ in range(2)] == ["quick", "slow"]


def test_owners_take_turns(jobs):
    for index in range(6):
        jobs.submit(build_job(f"ann{index}"), owner="ann")
    assert jobs.claim_next_job("w", MODEL).job.id == "ann0"
    jobs.submit(build_job("bob0"), owner="bob")
    jobs.submit(build_job("bob1"), owner="bob")
    order = [jobs.claim_next_job("w", MODEL).job.id for _ in range(5)]
    assert order.index("bob0") <= 1 and order.index("bob1") <= 3
    assert [name for name in order if name.startswith("ann")] == ["ann1", "ann2", "ann3"]


def test_the_numbers_of_open_jobs_are_limited(engine, jobs):
    limited = JobRepository(engine, max_open_jobs=3, max_open_jobs_per_owner=2)
    limited.submit(build_job("ann0"), owner="ann")
    limited.submit(build_job("ann1"), owner="ann")
    with pytest.raises(ServiceBusy) as full:
        limited.submit(build_job("ann2"), owner="ann")
    assert full.value.retry_after_seconds > 0
    limited.submit(build_job("bob0"), owner="bob")
    with pytest.raises(ServiceBusy):
        limited.submit(build_job("cid0"), owner="cid")
    assert not limited.submit(build_job("bob0"), owner="bob")  # a known job is not a new one


def test_a_worker_that_was_told_to_stop_is_no_loss(jobs):
    """Three workers in a row are killed after a stop signal, then three without one."""
    jobs.submit(build_job("one"))
    for _ in range(3):
        assert jobs.claim_next_job("stopped", MODEL)
        jobs.mark_stopping("another")
        jobs.mark_stopping("stopped")
        expire_heartbeat(jobs, "one")
        assert jobs.requeue_lost_jobs(5.0) == ["one"]
    for expected in (["one"], ["one"], []):
        assert jobs.claim_next_job("killed", MODEL)
        jobs.mark_stopping("another")
        expire_heartbeat(jobs, "one")
        assert jobs.requeue_lost_jobs(5.0) == expected
    assert jobs.get_status("one").state == "failed"


def test_another_worker_continues_the_job_of_a_silent_worker(jobs):
    jobs.submit(build_job("one"))
    late = jobs.claim_next_job("first", MODEL)
    jobs.heartbeat(late, StepProgress(step=8, steps=20, eta_seconds=1.0), resume_key="x.safetensors")
    assert jobs.requeue_lost_jobs(5.0) == []
    expire_heartbeat(jobs, "one")
    assert jobs.requeue_lost_jobs(5.0) == ["one"]
    claim = jobs.claim_next_job("second", MODEL)
    assert (claim.attempt, claim.resume_key) == (2, "x.safetensors")
    for update_late_claim in (
        lambda: jobs.heartbeat(late),
        lambda: jobs.mark_done(late, ARTIFACT),
        lambda: jobs.mark_failed(late, "x", "x"),
    ):
        with pytest.raises(JobLost):
            update_late_claim()
    jobs.mark_done(claim, ARTIFACT)
    assert jobs.get_status("one").state == "done"


def test_a_job_that_silences_three_workers_fails(jobs):
    jobs.submit(build_job("one"))
    for _ in range(3):
        assert jobs.claim_next_job("w", MODEL)
        expire_heartbeat(jobs, "one")
        jobs.requeue_lost_jobs(5.0)
    assert jobs.claim_next_job("w", MODEL) is None
    with pytest.raises(JobFailed, match="it stopped 3 workers in a row") as failed:
        result_from_status(jobs.get_status("one"))
    assert failed.value.code == "poison"


def test_cancelling(jobs):
    jobs.submit(build_job("waits"))
    jobs.submit(build_job("runs"))
    jobs.cancel("waits")
    with pytest.raises(JobCancelled):
        result_from_status(jobs.get_status("waits"))
    claim = jobs.claim_next_job("w", MODEL)
    assert claim.job.id == "runs" and jobs.heartbeat(claim)
    jobs.cancel("runs")
    assert not jobs.heartbeat(claim)
    jobs.mark_cancelled(claim)
    assert jobs.get_status("runs").state == "cancelled"
    jobs.cancel("runs")
    jobs.cancel("nothing")


def test_a_cancelled_job_of_a_lost_worker_is_not_requeued(jobs):
    jobs.submit(build_job("one"))
    jobs.claim_next_job("w", MODEL)
    jobs.cancel("one")
    expire_heartbeat(jobs, "one")
    assert jobs.requeue_lost_jobs(5.0) == []
    assert jobs.get_status("one").state == "cancelled"


def test_a_lost_message_is_sent_again_once(jobs):
    jobs.submit(build_job("one"))
    assert not jobs.claim_renotification(5.0)
    expire_heartbeat(jobs, "one")
    assert jobs.claim_renotification(5.0) and not jobs.claim_renotification(5.0)


def test_many_workers_never_share_a_job(jobs):
    for index in range(60):
        jobs.submit(build_job(f"{index}"), owner=f"owner{index % 3}")
    claimed_ids: list[str] = []

    def work() -> None:
        while claim := jobs.claim_next_job(threading.current_thread().name, MODEL):
            claimed_ids.append(claim.job.id)
            jobs.mark_done(claim, ARTIFACT)

    workers = [threading.Thread(target=work) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    work()  # a worker that found every queued row locked may have stopped early
    assert sorted(claimed_ids) == sorted(str(index) for index in range(60))


def test_an_unreachable_database_is_reported():
    started_at = time.monotonic()
    with pytest.raises(StoreError, match="database: the server cannot be reached"):
        JobRepository(create_database_engine(f"postgresql://test@127.0.0.1:{free_port()}/postgres")).submit(
            build_job("one")
        )
    assert time.monotonic() - started_at < 10


def accept_any_job(job: Job) -> bool:
    return True


def test_a_render_batch_takes_at_most_half_of_the_batch_lane(jobs):
    jobs.submit(build_job("quick"))
    for index in range(6):
        jobs.submit(build_job(f"line{index}", f"ball {index}"), lane="batch")
    quick, first = jobs.claim_next_job("w", MODEL), jobs.claim_next_job("w", MODEL)
    assert (quick.lane, first.lane) == ("interactive", "batch")
    assert jobs.claim_render_batch(quick, "w", MODEL, 4, accept_any_job) == [quick]
    claims = jobs.claim_render_batch(first, "w", MODEL, 4, lambda job: job.prompt != "ball 2")
    assert [claim.job.id for claim in claims] == [
        "line0",
        "line1",
        "line3",
    ]  # 4 similar jobs are queued, of which the batch takes 2
    assert {claim.batch_job_ids for claim in claims} == {("line0", "line1", "line3")}
    assert all(jobs.get_status(claim.job.id).state == "running" for claim in claims)
    assert jobs.heartbeat_all(claims, StepProgress(step=2, steps=9, eta_seconds=1.0), resume_key="x.safetensors") == {
        "line0": True, "line1": True, "line3": True
    }  # fmt: skip
    jobs.cancel("line1")
    assert jobs.heartbeat_all(claims) == {"line0": True, "line1": False, "line3": True}


def test_another_worker_takes_over_a_whole_lost_render_batch(jobs):
    for index in range(6):
        jobs.submit(build_job(f"line{index}"), lane="batch")
    claims = jobs.claim_render_batch(jobs.claim_next_job("w", MODEL), "w", MODEL, 3, accept_any_job)
    batch_job_ids = claims[0].batch_job_ids
    jobs.heartbeat_all(claims, resume_key="x.safetensors")
    jobs.mark_done(claims[1], ARTIFACT)
    for name in batch_job_ids:
        expire_heartbeat(jobs, name)
    assert set(jobs.requeue_lost_jobs(60)) == {batch_job_ids[0], batch_job_ids[2]}
    again = sorted(
        jobs.claim_render_batch(jobs.claim_next_job("v", MODEL), "v", MODEL, 1, accept_any_job),
        key=lambda claim: claim.job.id,
    )
    assert [(claim.job.id, claim.attempt, claim.resume_key, claim.batch_job_ids) for claim in again] == [
        (batch_job_ids[0], 2, "x.safetensors", batch_job_ids), (batch_job_ids[2], 2, "x.safetensors", batch_job_ids)
    ]  # fmt: skip
    assert jobs.heartbeat_all(claims) == {}  # the first worker has lost all of them
    fresh = jobs.claim_render_batch(jobs.claim_next_job("v", MODEL), "v", MODEL, 3, accept_any_job)
    assert fresh[0].job.id == "line3" and fresh[0].batch_job_ids == ("line3", "line4")


# ---------------------------------------------------------------- jobs of one owner


def test_jobs_are_listed_in_pages_even_if_they_have_the_same_time(jobs):
    for index in range(7):
        jobs.submit(build_job(f"job{index}"), "ann", kind="video")
    jobs.fetch_all(
        update(jobs_table).where(jobs_table.c.id.in_(["job2", "job3", "job4"])).values(created_at=unix_now())
    )
    for newest_first in (True, False):
        seen, after, has_more = [], None, True
        while has_more:
            page, has_more = jobs.list_owned_jobs("ann", "video", after, 2, newest_first)
            seen += [status.id for status in page]
            after = seen[-1]
        assert sorted(seen) == [f"job{index}" for index in range(7)] and len(page) == 1
    with pytest.raises(InvalidInput, match="after"):
        jobs.list_owned_jobs("bob", "video", "job1", 2, True)
    assert jobs.list_owned_jobs("ann", "image", None, 2, True) == ([], False)


def test_a_deleted_job_is_not_found_or_deleted_again(jobs):
    jobs.submit(build_job("one"), "ann", kind="video")
    assert jobs.get_owned_job("one", "ann", "video") and not jobs.get_owned_job("one", "bob", "video")
    assert not jobs.delete_owned_job("one", "bob", "video") and jobs.delete_owned_job("one", "ann", "video")
    assert not jobs.delete_owned_job("one", "ann", "video") and jobs.get_owned_job("one", "ann", "video") is None


def test_the_end_of_a_job_is_announced_once(jobs):
    jobs.submit(build_job("one"), "ann", kind="video")
    jobs.submit(build_job("two"), "ann", kind="image")
    assert not jobs.list_unannounced_jobs("video", 9)
    for _ in range(2):
        jobs.mark_done(jobs.claim_next_job("w", MODEL), ARTIFACT)
    (ended,) = jobs.list_unannounced_jobs("video", 9)
    assert (ended.id, ended.owner, ended.state) == ("one", "ann", "done") and ended.ended_at > 0
    jobs.mark_announced([ended.id])
    assert not jobs.list_unannounced_jobs("video", 9)
