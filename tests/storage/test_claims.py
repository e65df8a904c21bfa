"""Which jobs a worker may claim: those of its preset, and resume points only of its own weights and precision."""

import pytest
from sqlalchemy import update

from omnivideo.contracts import Job, ModelIdentity, resolve_sampling_params
from omnivideo.errors import InvalidInput
from omnivideo.presets import TINY
from omnivideo.storage.database.jobs import JobRepository
from omnivideo.storage.database.repository import unix_now
from omnivideo.storage.database.schema import jobs as jobs_table
from tests.support.claims import MODEL

NEW = MODEL.model_copy(update={"weights": "new"})
OTHERS = [NEW, MODEL.model_copy(update={"precision": "preset"})]
RESUME_TIMEOUT = 60.0


@pytest.fixture
def jobs(empty_database):
    return JobRepository(empty_database, resume_timeout_seconds=RESUME_TIMEOUT)


def build_job(job_id: str, preset: str | None = "tiny", seed: int = 1) -> Job:
    params = resolve_sampling_params(TINY, "text-to-video", seed=seed)
    return Job(id=job_id, prompt="a red ball", visual_tokens=None, source=None, params=params, preset=preset)


def lose_worker(jobs: JobRepository, job_id: str, model: ModelIdentity, resume_key: str | None, silent: float) -> None:
    """Let a worker begin a job, save a resume point and die; it was silent for so many seconds."""
    claim = jobs.claim_next_job("lost", model)
    assert claim is not None and claim.job.id == job_id
    if resume_key:
        jobs.heartbeat(claim, resume_key=resume_key)
    with jobs.engine.connect() as connection:
        silence = update(jobs_table).where(jobs_table.c.id == job_id).values(heartbeat_at=unix_now() - silent)
        connection.execute(silence)
    assert jobs.requeue_lost_jobs(15.0) == [job_id]


def test_a_job_takes_the_weights_of_the_first_worker_and_resumes_with_them(jobs):
    jobs.submit(build_job("one"))
    lose_worker(jobs, "one", MODEL, "point.safetensors", silent=20.0)
    for other in OTHERS:
        assert jobs.claim_next_job("other", other) is None
    claim = jobs.claim_next_job("same", MODEL)
    assert (claim.attempt, claim.resume_key) == (2, "point.safetensors")


@pytest.mark.parametrize("other", OTHERS)
def test_a_job_without_a_resume_point_is_begun_again_by_any_worker_of_its_preset(jobs, other):
    jobs.submit(build_job("one"))
    lose_worker(jobs, "one", MODEL, None, silent=20.0)
    claim = jobs.claim_next_job("other", other)
    assert (claim.attempt, claim.resume_key) == (2, None)
    jobs.heartbeat(claim, resume_key="point.safetensors")
    jobs.requeue(claim)
    assert jobs.claim_next_job("first", MODEL) is None  # it has the other worker's weights now
    assert jobs.claim_next_job("other", other).resume_key == "point.safetensors"


@pytest.mark.parametrize("other", OTHERS)
def test_a_job_whose_weights_no_worker_has_starts_again_with_others(jobs, other):
    jobs.submit(build_job("one"))
    lose_worker(jobs, "one", MODEL, "point.safetensors", silent=RESUME_TIMEOUT + 1)
    claim = jobs.claim_next_job("other", other)
    assert (claim.attempt, claim.resume_key) == (2, None)  # from the first step
    jobs.requeue(claim)
    assert jobs.claim_next_job("first", MODEL).resume_key is None  # the old resume point is gone


def test_a_job_waits_for_a_busy_worker_that_has_its_weights(jobs):
    """It does so between two jobs of that worker, too: it counts as lost after RESUME_TIMEOUT."""
    jobs.submit(build_job("one"))
    lose_worker(jobs, "one", MODEL, "point.safetensors", silent=RESUME_TIMEOUT + 1)
    jobs.submit(build_job("two"))
    with jobs.engine.connect() as connection:  # the second job is claimed first
        connection.execute(update(jobs_table).where(jobs_table.c.id == "two").values(fair_rank=0))
    busy = jobs.claim_next_job("busy", MODEL)
    assert busy.job.id == "two"
    assert jobs.claim_next_job("other", NEW) is None
    jobs.mark_cancelled(busy)
    assert jobs.claim_next_job("other", NEW) is None
    with jobs.engine.connect() as connection:
        ended = update(jobs_table).where(jobs_table.c.id == "two").values(ended_at=unix_now() - RESUME_TIMEOUT - 1)
        connection.execute(ended)
    assert jobs.claim_next_job("other", NEW).job.id == "one"


def test_a_job_waits_for_a_worker_of_its_preset(jobs):
    jobs.submit(build_job("published", preset="omnivideo-1.3b"))
    jobs.submit(build_job("one"))
    assert jobs.claim_next_job("w", MODEL).job.id == "one"  # past the job that it cannot render
    assert jobs.claim_next_job("w", MODEL) is None and jobs.count_queued() == 1
    published = MODEL.model_copy(update={"preset": "omnivideo-1.3b"})
    assert jobs.claim_next_job("w", published).job == build_job("published", preset="omnivideo-1.3b")


def test_a_job_of_version_0_2_names_no_preset_and_is_taken_by_any_worker(jobs):
    jobs.submit(build_job("one", preset=None))
    assert jobs.submit(build_job("one")) is None  # the same job, submitted again by this version
    claim = jobs.claim_next_job("w", MODEL)
    assert claim.job == build_job("one")
    with pytest.raises(InvalidInput, match="id: that id belongs to a different job"):
        jobs.submit(build_job("one", preset="omnivideo-1.3b"))


def test_the_state_of_a_worker_of_version_0_2_is_not_resumed(jobs):
    """Its weights are unknown."""
    jobs.submit(build_job("one"))
    lose_worker(jobs, "one", MODEL, "point.safetensors", silent=20.0)
    with jobs.engine.connect() as connection:
        connection.execute(update(jobs_table).values(weights=None, precision=None))
    assert jobs.claim_next_job("w", MODEL).resume_key is None


def test_a_batch_is_resumed_with_its_weights_or_starts_again_as_a_whole(jobs):
    for index in range(4):
        jobs.submit(build_job(f"job{index}", seed=index), lane="batch")
    first = jobs.claim_next_job("lost", MODEL)
    claims = jobs.claim_render_batch(first, "lost", MODEL, 2, lambda job: True)
    members = [claim.job.id for claim in claims]
    jobs.heartbeat_all(claims, resume_key="point.safetensors")
    for claim in claims:
        jobs.requeue(claim)
    assert {jobs.claim_next_job("other", NEW).job.id, jobs.claim_next_job("other", NEW).job.id} == {"job2", "job3"}
    assert jobs.claim_next_job("other", NEW) is None
    with jobs.engine.connect() as connection:
        is_member = jobs_table.c.id.in_(members)
        connection.execute(update(jobs_table).where(is_member).values(heartbeat_at=unix_now() - 3600.0))
    again = jobs.claim_render_batch(jobs.claim_next_job("other", NEW), "other", NEW, 1, lambda job: True)
    assert [claim.job.id for claim in again] == members
    assert all((claim.resume_key, claim.batch_job_ids) == (None, tuple(members)) for claim in again)


def test_jobs_of_another_preset_join_no_batch(jobs):
    for index in range(6):
        preset = "omnivideo-1.3b" if index % 2 else "tiny"
        jobs.submit(build_job(f"job{index}", preset=preset, seed=index), lane="batch")
    first = jobs.claim_next_job("w", MODEL)
    claims = jobs.claim_render_batch(first, "w", MODEL, 4, lambda job: True)
    assert {claim.job.preset for claim in claims} == {"tiny"} and len(claims) == 2
