"""Jobs drawn by real workers: in this process, killed in the middle, taken over by another."""

import os
import signal
import threading
import time

import pytest
import torch

from omnivideo.backends.broker import Reaper
from omnivideo.backends.decoder.painter import Painter
from omnivideo.backends.decoder.worker import Habits, Worker, packed, unpacked
from omnivideo.backends.decoder.workers import LocalWorkers
from omnivideo.backends.jobs import DurableQueue
from omnivideo.contracts import Artifact, Given, Job, Preview, Step
from omnivideo.errors import JobCancelled, JobFailed
from omnivideo.models.sampling import Point
from omnivideo.storage.database import engine_for, migrate
from omnivideo.storage.jobs import Jobs
from omnivideo.storage.local import LocalStore

HABITS = Habits(every=2, apart=0.0, silent=1.0)


class Place:
    """A home with a database and a store; `worker` opens it anew, as another process would."""

    def __init__(self, folder, omni):
        self.omni = omni
        self.address = f"sqlite:///{folder}/service.sqlite"
        self.store = LocalStore(folder / "store")
        migrate(engine_for(self.address))
        self.jobs = Jobs(engine_for(self.address))

    def worker(self) -> Worker:
        return Worker(Painter(self.omni, self.store, "random"), Jobs(engine_for(self.address)), HABITS)

    def queue(self) -> DurableQueue:
        return DurableQueue(self.jobs, self.store, lambda: None)


@pytest.fixture
def place(omni, tmp_path):
    return Place(tmp_path, omni)


def job(name: str, steps: int = 6, **given) -> Job:
    return Job(
        id=name, task="text-to-video", prompt="a red ball", visual_tokens=None, source=None, seed=5,
        given=Given(steps=steps, **given),
    )  # fmt: skip


def drawn(place: Place, name: str) -> Artifact:
    status = place.jobs.status(name)
    assert status.state == "done", status
    return status.result


def test_a_followed_job_tells_its_steps_previews_and_artifact(place):
    workers = LocalWorkers(place.worker()).start()
    try:
        queue = DurableQueue(place.jobs, place.store, workers.tell)
        events = list(queue.run(job("one", steps=12)))
        again = list(queue.run(job("one", steps=12)))
    finally:
        workers.stop()
    steps = [event.step for event in events if isinstance(event, Step)]
    assert steps == sorted(set(steps)) and steps[-1] == 12
    assert any(isinstance(event, Preview) for event in events)
    assert isinstance(events[-1], Artifact) and events[-1] == again[-1]
    assert place.store.has(events[-1].key) and place.store.has(events[-1].manifest)


def kill_midway(place: Place, after: int) -> None:
    """A worker in a process of its own, killed once it has told of step `after`."""
    child = os.fork()
    if child == 0:
        try:
            place.worker().work()
        finally:
            os._exit(0)
    deadline = time.monotonic() + 60
    while (status := place.jobs.status("cut")).step < after and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), status


def test_a_killed_workers_job_goes_on_from_its_point_to_the_same_bytes(place):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child cannot use the parent's pool
    try:
        place.jobs.submit(job("whole", steps=40).model_copy(update={"id": "whole"}))
        assert place.worker().work()
        place.jobs.submit(job("cut", steps=40))
        kill_midway(place, after=10)
        assert place.jobs.status("cut").state == "running" and not place.worker().work()
        time.sleep(HABITS.silent)
        assert place.jobs.reap(HABITS.silent) == ["cut"]
        worker, told = place.worker(), []
        beat = worker.jobs.beat
        worker.jobs.beat = lambda claim, step=None, **kept: (told.append(step), beat(claim, step, **kept))[1]
        assert worker.work()
    finally:
        torch.set_num_threads(threads)
    first = min(step.step for step in told if step)
    assert first > 2  # it did not begin anew
    one, two = drawn(place, "whole"), drawn(place, "cut")
    assert (one.key, one.latents) == (two.key, two.latents)
    assert place.jobs.status("cut").attempt == 2


def test_a_point_survives_its_way_through_the_store():
    made = [torch.randn(1, 16, 3, 8, 8) for _ in range(4)]
    for outputs in ((made[2],), (made[2], made[3])):
        point = unpacked(packed(Point(7, made[0], made[1], outputs)), torch.device("cpu"))
        assert (point.step, len(point.outputs)) == (7, len(outputs))
        assert torch.equal(point.latents, made[0]) and torch.equal(point.before, made[1])
        assert all(map(torch.equal, point.outputs, outputs))


def test_a_running_job_is_cancelled_within_a_step(place):
    workers = LocalWorkers(place.worker()).start()
    try:
        queue = DurableQueue(place.jobs, place.store, workers.tell)
        running = queue.run(job("long", steps=200))
        step = next(event for event in running if isinstance(event, Step))
        queue.cancel("long")
        with pytest.raises(JobCancelled):
            list(running)
        assert step.step <= place.jobs.status("long").step < 200
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
    assert place.worker().work()
    with pytest.raises(JobFailed, match=said) as failed:
        list(place.queue().follow(wanted.id))
    assert failed.value.code == code


@pytest.mark.parametrize(
    ("raised", "code"), [(torch.OutOfMemoryError("CUDA"), "out_of_memory"), (ZeroDivisionError("/etc/x"), "internal")]
)
def test_trouble_in_the_worker_ends_that_job_only(place, monkeypatch, raised, code):
    worker = place.worker()
    place.jobs.submit(job("one"))
    place.jobs.submit(job("two"))
    with monkeypatch.context() as broken:
        broken.setattr(worker.painter, "drawn", lambda *rest: (_ for _ in ()).throw(raised))
        assert worker.work()
    status = place.jobs.status("one")
    assert (status.state, status.code) == ("failed", code) and "/etc" not in status.error
    assert worker.work()
    assert drawn(place, "two").frames == 9


def test_a_late_twin_changes_nothing(place):
    """A worker that was thought lost comes back with its result: the other one's stands."""
    place.jobs.submit(job("one"))
    slow, quick = place.worker(), place.worker()
    claim = slow.jobs.claim("slow")
    time.sleep(0.05)
    assert place.jobs.reap(0.01) == ["one"]
    assert quick.work()
    expected = drawn(place, "one")
    with pytest.raises(Exception, match="not this worker's any more"):
        slow.ended(claim)
    assert drawn(place, "one") == expected


def test_the_reaper_wakes_workers_for_what_was_lost(place):
    place.jobs.submit(job("one"))
    place.jobs.claim("gone")
    told = threading.Event()
    reaper = Reaper(place.jobs, 0.5, told.set).start()
    try:
        assert told.wait(5)
    finally:
        reaper.stop()
    assert place.worker().work()
    assert drawn(place, "one")
