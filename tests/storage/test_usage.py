"""What keys have used and may use: exact with many processes, and the same on PostgreSQL and SQLite."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, update

from omnivideo.contracts import Artifact, Claim, Job, StepProgress, resolve_sampling_params
from omnivideo.errors import LimitReached, ServiceBusy
from omnivideo.presets import TINY
from omnivideo.records import KeyLimits
from omnivideo.storage.database.jobs import JobRepository
from omnivideo.storage.database.keys import APIKeyRepository
from omnivideo.storage.database.schema import jobs as jobs_table
from omnivideo.storage.database.schema import request_windows, usage_days
from omnivideo.storage.database.usage import UsageRepository
from tests.support.claims import MODEL

CLIP = Artifact(key="a.mp4", medium="video", width=64, height=64, frames=9, fps=8, caption="x", created_by="one")
PARAMS = resolve_sampling_params(TINY, "text-to-video", seed=1, steps=4)


def submit(jobs: JobRepository, job_id: str, owner: str, lane="interactive") -> None:
    jobs.submit(Job(id=job_id, prompt="a ball", visual_tokens=None, source=None, params=PARAMS), owner, lane, "video")


def claim_and_wait(jobs: JobRepository, seconds: float) -> Claim:
    """Claim the next job, and move the beginning of its attempt back by `seconds`."""
    claim = jobs.claim_next_job("worker", MODEL)
    assert claim is not None
    move = update(jobs_table).where(jobs_table.c.id == claim.job.id)
    jobs.fetch_all(move.values(started_at=jobs_table.c.started_at - seconds))
    return claim


def render(jobs: JobRepository, seconds: float, stored_bytes: int = 0) -> None:
    """Render the next job: four steps in the given time."""
    claim = claim_and_wait(jobs, seconds)
    jobs.heartbeat(claim, StepProgress(step=4, steps=4, eta_seconds=0.0))
    jobs.mark_done(claim, CLIP, stored_bytes)


def read_usage(engine: Engine, owner: str):
    records = UsageRepository(engine).list_usage(owner, 1)
    return records[0] if records else None


def end_day(engine: Engine) -> None:
    """Make today's use that of yesterday."""
    UsageRepository(engine).fetch_all(update(usage_days).values(day=usage_days.c.day - 1))


def test_clips_steps_seconds_and_bytes_are_counted_once(empty_database: Engine) -> None:
    jobs = JobRepository(empty_database)
    submit(jobs, "one", "ann")
    render(jobs, 30.0, stored_bytes=700)
    submit(jobs, "two", "bob")
    jobs.cancel("two")  # no worker had it
    used = read_usage(empty_database, "ann")
    assert (used.clips, used.images, used.steps, used.stored_bytes) == (1, 0, 4, 700)
    assert used.device_seconds == pytest.approx(30.0, abs=2.0)
    bob = read_usage(empty_database, "bob")
    assert (bob.clips, bob.steps, bob.device_seconds) == (0, 0, 0.0)


def test_every_attempt_counts_and_a_pass_counts_for_each_of_its_jobs_in_part(empty_database: Engine) -> None:
    jobs = JobRepository(empty_database)
    submit(jobs, "one", "ann")
    jobs.requeue(claim_and_wait(jobs, 10.0))  # its worker stops
    claim_and_wait(jobs, 20.0)  # this one is lost: until its last heartbeat it has worked 20 s
    lost = update(jobs_table).values(
        heartbeat_at=jobs_table.c.heartbeat_at - 100, started_at=jobs_table.c.started_at - 100
    )
    jobs.fetch_all(lost)
    assert jobs.requeue_lost_jobs(5.0) == ["one"]
    jobs.mark_failed(claim_and_wait(jobs, 5.0), "failed", "x")
    assert read_usage(empty_database, "ann").device_seconds == pytest.approx(35.0, abs=3.0)
    submit(jobs, "two", "bob")
    jobs.fetch_all(update(jobs_table).where(jobs_table.c.id == "two").values(batch_job_ids=["two", "x", "y", "z"]))
    render(jobs, 40.0)
    assert read_usage(empty_database, "bob").device_seconds == pytest.approx(10.0, abs=1.0)


def test_a_request_is_counted_once_by_many_processes(empty_database: Engine) -> None:
    repositories = [UsageRepository(empty_database) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        windows = list(pool.map(lambda number: repositories[number % 4].count_request("ann"), range(40)))
    assert sorted(window.request_count for window in windows) == list(range(1, 41))
    assert all(50 < window.seconds_left <= 60 for window in windows)
    assert repositories[0].count_request("bob").request_count == 1
    repositories[0].fetch_all(update(request_windows).values(started_at=request_windows.c.started_at - 61))
    assert repositories[0].count_request("ann").request_count == 1


def test_bytes_of_parallel_uploads_stay_within_the_limit(empty_database: Engine) -> None:
    usage = UsageRepository(empty_database, KeyLimits(stored_bytes_per_day=1000))

    def reserve(size: int) -> bool:
        try:
            with usage.reserve_bytes("ann", size):
                return True
        except LimitReached as error:
            assert (error.limit, error.quota, error.window_seconds) == ("stored-bytes", 1000, 86_400)
            return False

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(reserve, [300] * 12)) == 3
    assert reserve(100) and not reserve(1)
    assert read_usage(empty_database, "ann").stored_bytes == 1000
    with UsageRepository(empty_database).reserve_bytes("ann", 5000):  # without a limit
        pass
    end_day(empty_database)
    assert reserve(900)


def test_a_key_may_have_its_own_number_of_open_jobs(empty_database: Engine) -> None:
    jobs, keys = JobRepository(empty_database, max_open_jobs_per_owner=2), APIKeyRepository(empty_database)
    ann, bob = keys.create_key("ann", own_limits={"open_jobs": 3})[0], keys.create_key("bob")[0]
    for owner, quota in ((ann, 3), (bob, 2)):
        for number in range(quota):
            submit(jobs, f"{owner}.{number}", owner)
        with pytest.raises(LimitReached, match=f"open jobs: this key may have {quota} queued or running") as raised:
            submit(jobs, f"{owner}.more", owner)
        assert (raised.value.limit, raised.value.window_seconds) == ("open-jobs", 0)
    keys.update_key(bob, open_jobs=0)  # none
    submit(jobs, f"{bob}.more", bob)
    full = JobRepository(empty_database, max_open_jobs=1)
    with pytest.raises(ServiceBusy, match="queue: too many clips") as busy:
        submit(full, "eve", "eve")
    assert not isinstance(busy.value, LimitReached)


def test_parallel_submits_stay_within_the_number_of_open_jobs(empty_database: Engine) -> None:
    repositories = [JobRepository(empty_database, max_open_jobs_per_owner=5) for _ in range(4)]

    def submit_one(number: int) -> bool:
        try:
            submit(repositories[number % 4], f"job.{number}", "ann")
        except LimitReached:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(submit_one, range(60))) == 5


@pytest.mark.parametrize("limit", ["device_seconds_per_day", "stored_bytes_per_day"])
def test_a_share_of_the_day_refuses_further_jobs(empty_database: Engine, limit: str) -> None:
    key_id, _ = APIKeyRepository(empty_database).create_key("ann", own_limits={limit: 50})
    jobs = JobRepository(empty_database)
    for number in range(3):
        submit(jobs, f"now.{number}", key_id)
    submit(jobs, "later", key_id, "batch")
    submit(jobs, "other", "bob")
    render(jobs, 60.0, stored_bytes=60)
    with pytest.raises(LimitReached, match="may use 50 a day") as raised:
        submit(JobRepository(empty_database), "more", key_id)
    assert 0 < raised.value.retry_after_seconds <= 86_400
    assert jobs.fail_exhausted_jobs() and jobs.fail_exhausted_jobs() == []
    states = {status.id: (status.state, status.code) for status in jobs.list_statuses(["now.0", "now.1", "now.2"])}
    assert sorted(states.values()) == [("done", None), *[("failed", "rate_limit_exceeded")] * 2]
    assert jobs.claim_next_job("worker", MODEL).job.id == "other"
    assert jobs.claim_next_job("worker", MODEL) is None  # the batch waits for the next day
    end_day(empty_database)
    assert jobs.claim_next_job("worker", MODEL).job.id == "later"


def test_a_job_that_has_begun_is_completed(empty_database: Engine) -> None:
    jobs = JobRepository(empty_database, daily_limits=KeyLimits(device_seconds_per_day=50))
    submit(jobs, "one", "ann")
    claim = claim_and_wait(jobs, 60.0)
    jobs.requeue(claim)
    assert jobs.fail_exhausted_jobs() == []
    assert jobs.claim_next_job("worker", MODEL).attempt == 2
    submit(jobs, "two", "admin")  # the admin key has no daily limits
    jobs.add_usage("admin", device_seconds=1000)
    submit(jobs, "three", "admin")


def test_what_was_used_is_forgotten_after_its_lifetime(empty_database: Engine) -> None:
    usage = UsageRepository(empty_database)
    usage.add_usage("ann", clips=1, device_seconds=0.5)
    usage.add_usage("ann", clips=2)
    usage.fetch_all(update(usage_days).values(day=usage_days.c.day - 401))
    usage.add_usage("ann", steps=7)
    usage.delete_old_usage()
    (left,) = usage.list_usage(None, 400)
    assert (left.owner, left.clips, left.steps, left.day) == ("ann", 0, 7, int(time.time() // 86_400))


def test_a_key_expires(empty_database: Engine) -> None:
    keys = APIKeyRepository(empty_database, "the-key-of-the-admin")
    key_id, key = keys.create_key("ann", ["read"], lifetime_seconds=3600)
    found = keys.find_key(key)
    assert (found.id, found.scopes, found.own_limits) == (key_id, ("read",), {})
    keys.update_key(key_id, lifetime_seconds=-1.0)
    assert keys.find_key(key) is None
    assert keys.update_key(key_id, lifetime_seconds=0).expires_at is None
    assert keys.find_key(key).id == key_id
    admin = keys.find_key("the-key-of-the-admin")
    assert admin.scopes == ("read", "generate", "administer")
    assert admin.merge_limits(KeyLimits(requests_per_minute=5, open_jobs=7)) == KeyLimits(open_jobs=7)
