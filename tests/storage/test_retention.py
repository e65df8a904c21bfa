"""What has ended is removed after its lifetime, and the metrics still count it."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Engine, update

from omnivideo.contracts import Artifact, Job, StepProgress, resolve_sampling_params
from omnivideo.presets import TINY
from omnivideo.storage.database.batches import BatchRepository
from omnivideo.storage.database.files import FileRepository
from omnivideo.storage.database.jobs import JobRepository
from omnivideo.storage.database.retention import IDLE_SECONDS, RetentionRepository
from omnivideo.storage.database.schema import batches, jobs, stored_objects, threads, turn_events, turns
from omnivideo.storage.database.turns import TurnRepository
from omnivideo.storage.objects.local import LocalObjectStore
from omnivideo.storage.sweep import Lifetimes, Sweep
from tests.support.claims import MODEL
from tests.support.elapsed_time import pass_time

HOUR, DAY = 3600.0, 86_400.0
LIFETIMES = Lifetimes(artifact_seconds=30 * DAY, turn_seconds=30 * DAY, job_seconds=90 * DAY)


class NoCheckpoints:
    """The checkpoints of a service without conversations."""

    def __init__(self) -> None:
        self.deleted: list[str] = []

    def delete_thread(self, thread_id: str) -> None:
        self.deleted.append(thread_id)

    def erase_freed_space(self) -> None: ...


class Service:
    def __init__(self, engine: Engine, folder: Path):
        self.engine, self.folder = engine, folder
        self.jobs, self.turns, self.rows = JobRepository(engine), TurnRepository(engine), RetentionRepository(engine)
        self.files, self.batches = FileRepository(engine), BatchRepository(engine)
        self.checkpoints = NoCheckpoints()
        self.store = LocalObjectStore(folder, self.jobs.announce_object)
        self.kept_keys: set[str] = set()

    def sweep(self, after_seconds: float = 0.0, lifetimes: Lifetimes = LIFETIMES) -> list[str]:
        pass_time(self.engine, self.folder, after_seconds)

        def collect_referenced_keys() -> set[str]:
            keys = self.jobs.collect_referenced_keys(LIFETIMES.artifact_seconds)
            return self.kept_keys | keys | self.files.collect_referenced_keys() | self.turns.collect_referenced_keys()

        arguments = self.checkpoints, self.store, collect_referenced_keys, lifetimes
        return Sweep(self.rows, self.jobs, self.turns, *arguments).run().object_keys

    def submit(self, job_id: str, **options: str) -> None:
        params = resolve_sampling_params(TINY, "text-to-video", seed=1)
        job = Job(id=job_id, prompt="x", visual_tokens=None, source=None, params=params, preset="tiny")
        self.jobs.submit(job, "ann", **options)  # type: ignore[arg-type]

    def render(self, job_id: str, **options: str) -> str:
        """Complete a job and return its clip's key."""
        self.submit(job_id, **options)
        claim = self.jobs.claim_next_job("worker", MODEL)
        assert claim is not None and claim.job.id == job_id
        self.jobs.heartbeat(claim, StepProgress(step=3, steps=3, eta_seconds=0.0), preview=self.put("png"))
        key = self.put("mp4")
        self.jobs.mark_done(claim, Artifact(key=key, medium="video", width=64, height=64, frames=9, fps=8, caption="",
                                            created_by=job_id))  # fmt: skip
        return key

    def put(self, suffix: str) -> str:
        return self.store.put(os.urandom(16), suffix)

    def list_ids(self, table) -> list[str]:
        return sorted(row[0] for row in self.rows.fetch_all(table.select()))

    def run_turn(self, turn_id: str, thread_id: str, state: str = "done") -> None:
        self.turns.create_turn(turn_id, thread_id, "ann", 1, {"text": "a"})
        turn = self.turns.claim_next_turn(60.0)
        assert turn is not None and turn.id == turn_id
        self.turns.append_event(turn, {"kind": "text", "delta": "a"})
        self.turns.end_turn(turn, state)


@pytest.fixture
def service(empty_database: Engine, tmp_path: Path) -> Service:
    return Service(empty_database, tmp_path)


def test_metrics_count_removed_jobs(service):
    service.render("old")
    service.submit("cancelled", lane="batch")
    service.jobs.cancel("cancelled")
    pass_time(service.engine, service.folder, 100 * DAY)
    service.render("new")
    counts, durations = service.jobs.count_by_lane_and_state(), service.jobs.measure_durations()
    service.sweep()
    assert service.list_ids(jobs) == ["new"]
    assert service.jobs.count_by_lane_and_state() == counts
    (measured,) = service.jobs.measure_durations()
    assert measured.queued.counts == durations[0].queued.counts and measured.steps == durations[0].steps == 6
    assert measured.generated.sum_seconds == pytest.approx(durations[0].generated.sum_seconds)
    service.sweep(100 * DAY)
    assert service.list_ids(jobs) == [] and service.jobs.count_by_lane_and_state() == counts
    assert service.jobs.measure_durations()[0].queued.total == 2


def test_ended_turns_are_removed_with_their_events_but_for_an_open_question(service):
    service.turns.create_thread("thread", "ann")
    for turn_id, state in (("done", "done"), ("answered", "asks"), ("asks", "asks")):
        service.run_turn(turn_id, "thread", state)
        time.sleep(0.01)
    service.turns.create_thread("other", "ann")
    service.turns.create_turn("queued", "other", "ann", 1, {"text": "a"})
    service.sweep(29 * DAY)
    assert service.list_ids(turns) == ["answered", "asks", "done", "queued"]
    service.sweep(2 * DAY)
    assert service.list_ids(turns) == ["asks", "queued"]
    assert service.list_ids(turn_events) == ["asks"]


def test_threads_without_turns_are_removed_after_their_lifetime(service):
    """Also those of an older version, which does not record when their last turn began."""
    for thread_id in ("idle", "used", "old", "open"):
        service.turns.create_thread(thread_id, "ann")
    service.rows.fetch_all(update(threads).where(threads.c.id == "old").values(used_at=None))
    service.sweep(300 * DAY)
    service.run_turn("used", "used")
    service.turns.create_turn("open", "open", "ann", 1, {"text": "a"})
    service.sweep(100 * DAY)
    assert service.list_ids(threads) == ["idle", "old", "open", "used"], "without a lifetime, they are kept"
    lifetimes = replace(LIFETIMES, thread_seconds=365 * DAY)
    service.sweep(0.0, lifetimes)
    assert service.list_ids(threads) == ["open", "used"] and sorted(service.checkpoints.deleted) == ["idle", "old"]
    service.sweep(300 * DAY, lifetimes)
    assert service.list_ids(threads) == ["open"]


def test_a_deleted_thread_waits_for_its_open_turn(service):
    service.turns.create_thread("own-id", "ann", client_id="mine")
    service.turns.create_turn("turn", "own-id", "ann", 1, {"text": "a"})
    turn = service.turns.claim_next_turn(60.0)
    assert [open_turn.id for open_turn in service.turns.delete_thread("own-id")] == ["turn"]
    service.sweep(DAY)
    assert service.checkpoints.deleted == [] and service.turns.heartbeat(turn) == "cancelled"
    service.turns.end_turn(turn, "cancelled")
    service.sweep(IDLE_SECONDS / 2)
    assert service.checkpoints.deleted == []
    service.sweep(IDLE_SECONDS)
    assert service.checkpoints.deleted == ["own-id"] and service.list_ids(turns) == []


def test_objects_of_the_service_go_soon_and_others_after_their_lifetime(service):
    clip = service.render("clip", kind="video")
    orphan, kept = service.put("safetensors"), service.put("mp4")
    foreign = LocalObjectStore(service.folder).put(b"of a studio", "mp4")
    service.kept_keys = {kept}
    assert service.sweep(IDLE_SECONDS / 2) == []
    assert orphan in service.sweep(IDLE_SECONDS)
    assert all(map(service.store.has, (clip, kept, foreign)))
    service.jobs.delete_owned_job("clip", "ann", "video")
    assert clip in service.sweep() and service.list_ids(jobs) == []
    assert service.list_ids(stored_objects) == [kept]
    assert service.sweep(31 * DAY) == [foreign] and service.store.has(kept)


def test_objects_that_an_older_version_has_written_go_with_their_last_reference(service):
    key = LocalObjectStore(service.folder).put(b"of version 0.2", "bin")
    fields = {"name": "a", "purpose": "user_data", "size_bytes": 1, "object_key": key, "artifact": None}
    service.files.create_file("ann", file_id="file", **fields)
    assert service.sweep(2 * HOUR) == []
    service.files.delete_file("file", "ann")
    assert service.sweep() == [key]


def test_a_job_stays_while_another_of_its_pass_runs(service):
    for job_id in ("one", "two", "three"):
        service.submit(job_id, lane="batch", kind="video")
    claim = service.jobs.claim_next_job("worker", MODEL)
    claims = service.jobs.claim_render_batch(claim, "worker", MODEL, 3, lambda job: True)
    assert len(claims) == 2
    service.jobs.mark_cancelled(claims[1])
    assert service.jobs.delete_owned_job(claims[1].job.id, "ann", "video")
    service.sweep(2 * HOUR)
    assert service.list_ids(jobs) == ["one", "three", "two"]
    service.jobs.mark_cancelled(claims[0])
    service.sweep(2 * HOUR)
    assert claims[1].job.id not in service.list_ids(jobs)


def test_everything_of_a_deleted_owner_goes(service):
    service.turns.create_thread("thread", "ann")
    service.run_turn("turn", "thread")
    service.render("clip", kind="video")
    fields = {"name": "a", "purpose": "batch", "size_bytes": 1, "object_key": service.put("jsonl"), "artifact": None}
    service.files.create_file("ann", file_id="file", **fields)
    service.batches.create_batch(
        "ann", 9, batch_id="batch", endpoint="/v1/videos", input_file_id="file", metadata={"a": "b"}
    )
    service.turns.create_thread("bob's", "bob")
    service.rows.mark_owner_deleted("ann")
    service.sweep()
    batch = service.batches.claim_batch("runner", 5.0)
    assert batch is not None and batch.state == "cancelling"
    assert service.batches.transition_batch(batch, "cancelled", "runner")
    service.sweep(2 * HOUR)
    service.sweep(2 * HOUR)
    for table in (jobs, turns, turn_events, batches, stored_objects):
        assert service.list_ids(table) == [], table.name
    assert service.files.get_file("file", "ann") is None and service.turns.has_thread("bob's", "bob")
    assert list(service.store.iter_keys()) == []
