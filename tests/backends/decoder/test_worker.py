"""Jobs drawn by real workers: in this process, killed in the middle, taken over by another."""

import os
import signal
import threading
import time

import pytest
import torch

from omnivideo.backends.decoder.renderer import Renderer
from omnivideo.backends.decoder.worker import Worker, WorkerConfig, pack_state, unpack_state
from omnivideo.backends.queue.celery import InProcessWorker
from omnivideo.backends.queue.durable import DurableQueue
from omnivideo.backends.queue.reaper import Reaper
from omnivideo.contracts import Artifact, Job, Preview, StepProgress, resolve_sampling_params
from omnivideo.errors import JobCancelled, JobFailed
from omnivideo.models.sampling import DenoisingState
from omnivideo.models.vae import decode_latents, pixels_to_bytes
from omnivideo.presets import TINY
from omnivideo.storage.database.engine import create_database_engine, upgrade_schema
from omnivideo.storage.database.jobs import JobRepository
from omnivideo.storage.objects.local import LocalObjectStore
from omnivideo.storage.objects.tensors import get_tensors

HABITS = WorkerConfig(save_every_steps=2, save_every_seconds=0.0, heartbeat_timeout_seconds=1.0)


class Place:
    """A home with a database and a store; `worker` opens it anew, as another process would."""

    def __init__(self, folder, omni):
        self.omni = omni
        self.address = f"sqlite:///{folder}/service.sqlite"
        self.store = LocalObjectStore(folder / "store")
        upgrade_schema(create_database_engine(self.address))
        self.jobs = JobRepository(create_database_engine(self.address))

    def worker(self, habits: WorkerConfig = HABITS) -> Worker:
        return Worker(
            Renderer(self.omni, self.store, "random"), JobRepository(create_database_engine(self.address)), habits
        )

    def queue(self) -> DurableQueue:
        return DurableQueue(self.jobs, self.store, lambda: None)


@pytest.fixture
def place(omni, tmp_path):
    return Place(tmp_path, omni)


def job(name: str, prompt: str = "a red ball", steps: int = 6, seed: int = 5, **overrides) -> Job:
    params = resolve_sampling_params(TINY, "text-to-video", seed=seed, steps=steps)
    return Job(id=name, prompt=prompt, visual_tokens=None, source=None, params=params.model_copy(update=overrides))


def drawn(place: Place, name: str) -> Artifact:
    status = place.jobs.get_status(name)
    assert status.state == "done", status
    return status.result


def test_a_followed_job_tells_its_steps_previews_and_artifact(place):
    workers = InProcessWorker(place.worker()).start()
    try:
        queue = DurableQueue(place.jobs, place.store, workers.notify_workers)
        events = list(queue.run(job("one", steps=12)))
        again = list(queue.run(job("one", steps=12)))
    finally:
        workers.stop()
    steps = [event.step for event in events if isinstance(event, StepProgress)]
    assert steps == sorted(set(steps)) and steps[-1] == 12
    assert any(isinstance(event, Preview) for event in events)
    assert isinstance(events[-1], Artifact) and events[-1] == again[-1]
    assert place.store.has(events[-1].key) and place.store.has(events[-1].manifest)


def kill_midway(place: Place, after: int, habits: WorkerConfig = HABITS) -> None:
    """A worker in a process of its own, killed once it has told of step `after`."""
    child = os.fork()
    if child == 0:
        try:
            place.worker(habits).run_next_job()
        finally:
            os._exit(0)
    deadline = time.monotonic() + 60
    while (status := place.jobs.get_status("cut")).step < after and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), status


def test_a_killed_workers_job_goes_on_from_its_point_to_the_same_bytes(place):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child cannot use the parent's pool
    try:
        place.jobs.submit(job("whole", steps=40).model_copy(update={"id": "whole"}))
        assert place.worker().run_next_job()
        place.jobs.submit(job("cut", steps=40))
        kill_midway(place, after=10)
        assert place.jobs.get_status("cut").state == "running" and not place.worker().run_next_job()
        time.sleep(HABITS.heartbeat_timeout_seconds)
        assert place.jobs.requeue_lost_jobs(HABITS.heartbeat_timeout_seconds) == ["cut"]
        worker, told = place.worker(), []
        beat = worker.jobs.heartbeat
        worker.jobs.heartbeat = lambda claim, step=None, **kept: (told.append(step), beat(claim, step, **kept))[1]
        assert worker.run_next_job()
    finally:
        torch.set_num_threads(threads)
    first = min(step.step for step in told if step)
    assert first > 2  # it did not begin anew
    one, two = drawn(place, "whole"), drawn(place, "cut")
    assert (one.key, one.latents) == (two.key, two.latents)
    assert place.jobs.get_status("cut").attempt == 2


def test_a_point_survives_its_way_through_the_store():
    made = [torch.randn(1, 16, 3, 8, 8) for _ in range(4)]
    for outputs in ((made[2],), (made[2], made[3])):
        point = unpack_state(pack_state(DenoisingState(7, made[0], made[1], outputs)), torch.device("cpu"))
        assert (point.step, len(point.model_outputs)) == (7, len(outputs))
        assert torch.equal(point.latents, made[0]) and torch.equal(point.previous_sample, made[1])
        assert all(map(torch.equal, point.model_outputs, outputs))


def test_a_running_job_is_cancelled_within_a_step(place):
    workers = InProcessWorker(place.worker()).start()
    try:
        queue = DurableQueue(place.jobs, place.store, workers.notify_workers)
        running = queue.run(job("long", steps=200))
        step = next(event for event in running if isinstance(event, StepProgress))
        queue.cancel("long")
        with pytest.raises(JobCancelled):
            list(running)
        assert step.step <= place.jobs.get_status("long").step < 200
        assert isinstance(list(queue.run(job("next")))[-1], Artifact)
    finally:
        workers.stop()


@pytest.mark.parametrize(
    ("wanted", "code", "said"),
    [
        (job("odd", width=72), "invalid_input", "width"),
        (job("gone").model_copy(update={"visual_tokens": "0" * 64 + ".safetensors"}), "failed", "there is no artifact"),
    ],
)
def test_what_cannot_be_drawn_fails_with_its_reason(place, wanted, code, said):
    place.jobs.submit(wanted)
    assert place.worker().run_next_job()
    with pytest.raises(JobFailed, match=said) as failed:
        list(place.queue().follow_job(wanted.id))
    assert failed.value.code == code


@pytest.mark.parametrize(
    ("raised", "code"), [(torch.OutOfMemoryError("CUDA"), "out_of_memory"), (ZeroDivisionError("/etc/x"), "internal")]
)
def test_trouble_in_the_worker_ends_that_job_only(place, monkeypatch, raised, code):
    worker = place.worker()
    place.jobs.submit(job("one"))
    place.jobs.submit(job("two"))
    with monkeypatch.context() as broken:
        broken.setattr(worker.renderer, "render_job", lambda *rest: (_ for _ in ()).throw(raised))
        assert worker.run_next_job()
    status = place.jobs.get_status("one")
    assert (status.state, status.code) == ("failed", code) and "/etc" not in status.error
    assert worker.run_next_job()
    assert drawn(place, "two").frames == 9


def test_a_late_twin_changes_nothing(place):
    """A worker that was thought lost comes back with its result: the other one's stands."""
    place.jobs.submit(job("one"))
    slow, quick = place.worker(), place.worker()
    claim = slow.jobs.claim_next_job("slow")
    time.sleep(0.05)
    assert place.jobs.requeue_lost_jobs(0.01) == ["one"]
    assert quick.run_next_job()
    expected = drawn(place, "one")
    with pytest.raises(Exception, match="does not belong to this worker any more"):
        slow.run_claim(claim)
    assert drawn(place, "one") == expected


def test_the_reaper_wakes_workers_for_what_was_lost(place):
    place.jobs.submit(job("one"))
    place.jobs.claim_next_job("gone")
    told = threading.Event()
    reaper = Reaper(place.jobs, 0.5, told.set).start()
    try:
        assert told.wait(5)
    finally:
        reaper.stop()
    assert place.worker().run_next_job()
    assert drawn(place, "one")


# ---------------------------------------------------------------- several clips in one pass

TOGETHER = WorkerConfig(save_every_steps=2, save_every_seconds=0.0, heartbeat_timeout_seconds=1.0, max_batch_size=3)


def lines(place: Place, *names: str, **given) -> None:
    """Jobs of the batch lane, and as many others after them: a worker leaves half of what waits to the next one."""
    for at, name in enumerate((*names, *(f"rest{at}" for at, _ in enumerate(names)))):
        one = job(name, f"a red ball {at}", seed=at, **given)
        place.jobs.submit(one, lane="batch")


def latents(place: Place, name: str) -> torch.Tensor:
    return get_tensors(place.store, drawn(place, name).latents)["latents"]


def test_clips_of_the_batch_lane_in_one_pass_differ_by_rounding_only(place):
    lines(place, "one", "two", "three", steps=12)
    assert place.worker(TOGETHER).run_next_job()
    states = [place.jobs.get_status(name).state for name in ("one", "two", "three", "rest0")]
    assert states == ["done", "done", "done", "queued"]
    for at, name in enumerate(("one", "two", "three")):
        alone = job(f"{name} alone", f"a red ball {at}", steps=12, seed=at)
        place.jobs.submit(alone)
        assert place.worker(TOGETHER).run_next_job()  # the interactive lane comes first, and one at a time
        assert place.jobs.get_status(f"{name} alone").state == "done"
        pair = latents(place, name), latents(place, f"{name} alone")
        assert (pair[0] - pair[1]).abs().max() < 1e-4  # of deviation 1
        one, two = (pixels_to_bytes(decode_latents(place.omni.vae, each[None])) for each in pair)
        assert abs(one.astype(int) - two).max() <= 1  # before H.264
    assert len({drawn(place, name).key for name in ("one", "two", "three")}) == 3


def test_a_killed_workers_pack_goes_on_whole_to_the_same_bytes(place, tmp_path_factory):
    quiet = Place(tmp_path_factory.mktemp("quiet"), place.omni)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        lines(quiet, "cut", "two", "three", steps=40)
        assert quiet.worker(TOGETHER).run_next_job()
        lines(place, "cut", "two", "three", steps=40)
        kill_midway(place, after=10, habits=TOGETHER)
        place.jobs.cancel("two")  # it is drawn along all the same
        time.sleep(TOGETHER.heartbeat_timeout_seconds)
        assert sorted(place.jobs.requeue_lost_jobs(TOGETHER.heartbeat_timeout_seconds)) == ["cut", "three"]
        worker, told = (
            place.worker(WorkerConfig(save_every_steps=2, save_every_seconds=0.0, heartbeat_timeout_seconds=1.0)),
            [],
        )
        beat = worker.jobs.heartbeat_all
        worker.jobs.heartbeat_all = lambda claims, step=None, **kept: (told.append(step), beat(claims, step, **kept))[1]
        assert worker.run_next_job()
    finally:
        torch.set_num_threads(threads)
    assert min(step.step for step in told if step) > 2
    for name in ("cut", "three"):
        one, two = drawn(quiet, name), drawn(place, name)
        assert (one.key, one.latents) == (two.key, two.latents)
    assert place.jobs.get_status("two").state == "cancelled"


def test_only_what_is_alike_is_drawn_in_one_pass(place):
    long = " ".join(["a red ball and"] * 12)
    for at, one in enumerate((job("one"), job("other", steps=7), job("two"), job("long"), job("three"), job("four"))):
        words = long if one.id == "long" else one.prompt
        place.jobs.submit(job(one.id, words, steps=one.params.steps, seed=at), lane="batch")
    assert place.worker(TOGETHER).run_next_job()
    names = ("one", "other", "two", "long", "three")
    assert [name for name in names if place.jobs.get_status(name).state == "done"] == ["one", "two"]


def test_a_cancelled_job_leaves_its_pack(place):
    lines(place, "one", "two", "three", steps=12)
    worker = place.worker(TOGETHER)
    beat = worker.jobs.heartbeat_all

    def beaten(claims, step=None, **kept):
        if step and step.step == 3:
            place.jobs.cancel("two")
        return beat(claims, step, **kept)

    worker.jobs.heartbeat_all = beaten
    assert worker.run_next_job()
    assert [place.jobs.get_status(name).state for name in ("one", "two", "three")] == ["done", "cancelled", "done"]


def test_a_pack_without_room_is_drawn_one_by_one(place, monkeypatch):
    lines(place, "one", "two", "three")
    worker = place.worker(TOGETHER)
    full = lambda *rest: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA"))  # noqa: E731
    monkeypatch.setattr(worker.renderer, "render_batch", full)
    assert worker.run_next_job()
    assert all(drawn(place, name) for name in ("one", "two", "three"))


def test_what_kills_its_workers_is_found_out_among_its_pack(place):
    """After two losses each job of the pack is drawn alone; the third loss is the culprit's own."""
    lines(place, "one", "two", "three")
    for _ in range(2):
        first = place.jobs.claim_next_job("w")
        claims = place.jobs.claim_render_batch(first, "w", 3, lambda job: True)
        assert sorted(claim.job.id for claim in claims) == ["one", "three", "two"]
        time.sleep(0.05)
        place.jobs.requeue_lost_jobs(0.01)
    seen = [place.jobs.claim_next_job("w") for _ in range(3)]
    assert all(claim.batch_job_ids == () and claim.resume_key is None for claim in seen)
