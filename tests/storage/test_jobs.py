"""The life of jobs in a real database: SQLite and PostgreSQL."""

import threading
import time

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import update

from omnivideo.contracts import Artifact, Job, StepProgress
from omnivideo.errors import InvalidInput, JobCancelled, JobFailed, JobLost, ServiceBusy, StoreError
from omnivideo.storage.database.jobs import JobRepository, result_from_status
from omnivideo.storage.database.schema import create_database_engine, jobs, metadata, unix_now, upgrade_schema
from tests.support.servers import free_port, postgres


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def engine(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "sqlite":
        engine = create_database_engine(f"sqlite:///{folder}/service.db")
        upgrade_schema(engine)
        yield engine
        return
    with postgres(folder) as address:
        engine = create_database_engine(address)
        upgrade_schema(engine)
        yield engine
        engine.dispose()


@pytest.fixture
def book(engine):
    with engine.connect() as connection:
        connection.execute(jobs.delete())
    return JobRepository(engine)


def job(name: str, prompt: str = "a red ball") -> Job:
    return Job(id=name, task="text-to-video", prompt=prompt, visual_tokens=None, source=None, seed=1)


ARTIFACT = Artifact(
    key="a.mp4", medium="video", width=64, height=64, frames=9, fps=8, caption="a red ball", created_by="one"
)


def silence(book: JobRepository, name: str) -> None:
    """As if the job's worker had not been heard of for an hour."""
    with book.engine.connect() as connection:
        connection.execute(
            update(jobs).where(jobs.c.id == name).values(beat=unix_now() - 3600.0, told=unix_now() - 3600.0)
        )


def test_migrations_make_the_tables_that_the_code_speaks_of(engine):
    upgrade_schema(engine)  # again: nothing is left to do
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_a_job_is_drawn_once(book):
    assert book.submit(job("one")) and not book.submit(job("one"))
    claim = book.claim("worker")
    assert (claim.job, claim.attempt, claim.point) == (job("one"), 1, None)
    assert book.claim("worker") is None
    assert book.beat(claim, StepProgress(step=3, steps=20, eta_seconds=1.5), preview="p.png", point="x.safetensors")
    seen = book.status("one")
    assert (seen.state, seen.step, seen.steps, seen.left, seen.preview) == ("running", 3, 20, 1.5, "p.png")
    assert result_from_status(seen) is None
    book.finish(claim, ARTIFACT)
    assert result_from_status(book.status("one")) == ARTIFACT
    with pytest.raises(JobLost):
        book.beat(claim)


def test_an_id_stands_for_one_request_of_one_owner(book):
    book.submit(job("one"), owner="ann")
    with pytest.raises(InvalidInput, match="id: that id is another job's"):
        book.submit(job("one", "a blue ball"), owner="ann")
    with pytest.raises(InvalidInput, match="id: that id is another job's"):
        book.submit(job("one"), owner="bob")


def test_interactive_work_comes_before_batches(book):
    book.submit(job("slow"), lane="batch")
    book.submit(job("quick"))
    assert [book.claim("w").job.id for _ in range(2)] == ["quick", "slow"]


def test_owners_take_turns(book):
    for at in range(6):
        book.submit(job(f"ann{at}"), owner="ann")
    assert book.claim("w").job.id == "ann0"
    book.submit(job("bob0"), owner="bob")
    book.submit(job("bob1"), owner="bob")
    order = [book.claim("w").job.id for _ in range(5)]
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
    late = book.claim("first")
    book.beat(late, StepProgress(step=8, steps=20, eta_seconds=1.0), point="x.safetensors")
    assert book.reap(5.0) == []
    silence(book, "one")
    assert book.reap(5.0) == ["one"]
    claim = book.claim("second")
    assert (claim.attempt, claim.point) == (2, "x.safetensors")
    for twin in (lambda: book.beat(late), lambda: book.finish(late, ARTIFACT), lambda: book.fail(late, "x", "x")):
        with pytest.raises(JobLost):
            twin()
    book.finish(claim, ARTIFACT)
    assert book.status("one").state == "done"


def test_a_job_that_silences_three_workers_fails(book):
    book.submit(job("one"))
    for _ in range(3):
        assert book.claim("w")
        silence(book, "one")
        book.reap(5.0)
    assert book.claim("w") is None
    with pytest.raises(JobFailed, match="it stopped 3 workers in a row") as failed:
        result_from_status(book.status("one"))
    assert failed.value.code == "poison"


def test_cancelling(book):
    book.submit(job("waits"))
    book.submit(job("runs"))
    book.cancel("waits")
    with pytest.raises(JobCancelled):
        result_from_status(book.status("waits"))
    claim = book.claim("w")
    assert claim.job.id == "runs" and book.beat(claim)
    book.cancel("runs")
    assert not book.beat(claim)
    book.stop(claim)
    assert book.status("runs").state == "cancelled"
    book.cancel("runs")
    book.cancel("nothing")


def test_a_cancelled_job_of_a_lost_worker_is_not_drawn_again(book):
    book.submit(job("one"))
    book.claim("w")
    book.cancel("one")
    silence(book, "one")
    assert book.reap(5.0) == []
    assert book.status("one").state == "cancelled"


def test_a_message_that_was_lost_is_noticed_once(book):
    book.submit(job("one"))
    assert not book.untold(5.0)
    silence(book, "one")
    assert book.untold(5.0) and not book.untold(5.0)


def test_many_workers_never_share_a_job(book):
    for at in range(60):
        book.submit(job(f"{at}"), owner=f"owner{at % 3}")
    taken: list[str] = []

    def work() -> None:
        while claim := book.claim(threading.current_thread().name):
            taken.append(claim.job.id)
            book.finish(claim, ARTIFACT)

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
    quick, first = book.claim("w"), book.claim("w")
    assert (quick.lane, first.lane) == ("interactive", "batch")
    assert book.joined(quick, "w", 4, any_job) == [quick]
    claims = book.joined(first, "w", 4, lambda found: found.prompt != "ball 2")
    assert [claim.job.id for claim in claims] == ["line0", "line1", "line3"]  # 4 wait that are alike: 2 of them
    assert {claim.pack for claim in claims} == {("line0", "line1", "line3")}
    assert all(book.status(claim.job.id).state == "running" for claim in claims)
    assert book.beat_all(claims, StepProgress(step=2, steps=9, eta_seconds=1.0), point="x.safetensors") == {
        "line0": True, "line1": True, "line3": True
    }  # fmt: skip
    book.cancel("line1")
    assert book.beat_all(claims) == {"line0": True, "line1": False, "line3": True}


def test_a_lost_pack_is_taken_over_whole(book):
    for at in range(6):
        book.submit(job(f"line{at}"), lane="batch")
    claims = book.joined(book.claim("w"), "w", 3, any_job)
    pack = claims[0].pack
    book.beat_all(claims, point="x.safetensors")
    book.finish(claims[1], ARTIFACT)
    for name in pack:
        silence(book, name)
    assert set(book.reap(60)) == {pack[0], pack[2]}
    again = sorted(book.joined(book.claim("v"), "v", 1, any_job), key=lambda claim: claim.job.id)
    assert [(claim.job.id, claim.attempt, claim.point, claim.pack) for claim in again] == [
        (pack[0], 2, "x.safetensors", pack), (pack[2], 2, "x.safetensors", pack)
    ]  # fmt: skip
    assert book.beat_all(claims) == {}  # the first worker has none of them any more
    fresh = book.joined(book.claim("v"), "v", 3, any_job)
    assert fresh[0].job.id == "line3" and fresh[0].pack == ("line3", "line4")
