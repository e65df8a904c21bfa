"""Jobs rendered by real workers: in this process, killed midway, and taken over by another worker."""

import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from omnivideo.backends.decoder.renderer import Renderer
from omnivideo.backends.decoder.resume import pack_resume_point, unpack_resume_point
from omnivideo.backends.decoder.worker import InProcessWorker, Worker, WorkerConfig
from omnivideo.backends.queue.durable import DurableQueue
from omnivideo.backends.queue.reaper import Reaper
from omnivideo.contracts import Artifact, Job, Preview, StepProgress, resolve_sampling_params
from omnivideo.errors import JobCancelled, OmniVideoError
from omnivideo.models.sampling import DenoisingState
from omnivideo.models.vae import decode_latents, pixels_to_bytes
from omnivideo.presets import TINY
from omnivideo.storage.database.engine import create_database_engine, upgrade_schema
from omnivideo.storage.database.jobs import JobRepository
from omnivideo.storage.objects.local import LocalObjectStore
from omnivideo.storage.objects.tensors import get_tensors
from tests.support.claims import MODEL

CONFIG = WorkerConfig(save_every_steps=2, save_every_seconds=0.0, heartbeat_timeout_seconds=1.0)


class ServiceFolder:
    """A folder with a database and a store. `create_worker` opens both again, as another process would."""

    def __init__(self, path, omni):
        self.omni = omni
        self.address = f"sqlite:///{path}/service.sqlite"
        self.store = LocalObjectStore(path / "store")
        upgrade_schema(create_database_engine(self.address))
        self.jobs = JobRepository(create_database_engine(self.address))

    def create_worker(self, config: WorkerConfig = CONFIG) -> Worker:
        return Worker(
            Renderer(self.omni, self.store, "random"), JobRepository(create_database_engine(self.address)), config
        )

    def create_queue(self) -> DurableQueue:
        return DurableQueue(self.jobs, self.store, SimpleNamespace(notify_workers=lambda: None))


@pytest.fixture
def folder(omni, tmp_path):
    return ServiceFolder(tmp_path, omni)


def build_job(
    name: str, prompt: str = "a red ball", *, steps: int = 6, seed: int = 5, visual_tokens: str | None = None,
    **overrides,
) -> Job:  # fmt: skip
    params = resolve_sampling_params(TINY, "text-to-video", seed=seed, steps=steps).model_copy(update=overrides)
    return Job(id=name, prompt=prompt, visual_tokens=visual_tokens, source=None, params=params, preset="tiny")


def get_result(folder: ServiceFolder, name: str) -> Artifact:
    status = folder.jobs.get_status(name)
    assert status.state == "done", status
    return status.result


def test_a_followed_job_yields_steps_previews_and_its_artifact(folder):
    workers = InProcessWorker(folder.create_worker()).start()
    try:
        queue = DurableQueue(folder.jobs, folder.store, workers)
        events = list(queue.run(build_job("one", steps=12)))
        again = list(queue.run(build_job("one", steps=12)))
    finally:
        workers.stop()
    steps = [event.step for event in events if isinstance(event, StepProgress)]
    assert steps == sorted(set(steps)) and steps[-1] == 12
    assert any(isinstance(event, Preview) for event in events)
    assert isinstance(events[-1], Artifact) and events[-1] == again[-1]
    assert folder.store.has(events[-1].key) and folder.store.has(events[-1].manifest)


def test_the_resume_points_of_a_job_are_removed_when_it_ends(folder, monkeypatch):
    """There is one at a time, and none after the end: 12 steps left six of them for the lifetime of artifacts."""
    saved_keys, numbers_of_states = list[str](), list[int]()
    worker = folder.create_worker()
    save_state = worker.save_state

    def save_and_count(*arguments) -> str:
        saved_keys.append(save_state(*arguments))
        numbers_of_states.append(sum(map(folder.store.has, saved_keys)))
        return saved_keys[-1]

    monkeypatch.setattr(worker, "save_state", save_and_count)
    folder.jobs.submit(build_job("one", steps=12))
    assert worker.run_next_job() and get_result(folder, "one")
    assert len(saved_keys) >= 5 and max(numbers_of_states) <= 2
    assert not any(map(folder.store.has, saved_keys))


def assert_same_clip(first: Artifact, second: Artifact) -> None:
    assert (first.key, first.latents) == (second.key, second.latents)


def record_steps(worker: Worker, method: str) -> list[int]:
    """Return a list to which the worker's heartbeats by `method` append their steps."""
    heartbeat, steps = getattr(worker.jobs, method), []

    def record_and_send(claims, step=None, **fields):
        steps.extend([step.step] if step else [])
        return heartbeat(claims, step, **fields)

    setattr(worker.jobs, method, record_and_send)
    return steps


def kill_midway(folder: ServiceFolder, after: int, config: WorkerConfig = CONFIG) -> None:
    """Run a worker in a child process, and kill it once it has reported step `after`."""
    child = os.fork()
    if child == 0:
        try:
            folder.create_worker(config).run_next_job()
        finally:
            os._exit(0)
    deadline = time.monotonic() + 60
    while (status := folder.jobs.get_status("cut")).step < after and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), status


def test_a_killed_workers_job_continues_from_its_state_to_the_same_bytes(folder):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child cannot use the parent's pool
    try:
        folder.jobs.submit(build_job("whole", steps=40))
        assert folder.create_worker().run_next_job()
        folder.jobs.submit(build_job("cut", steps=40))
        kill_midway(folder, after=10)
        assert folder.jobs.get_status("cut").state == "running" and not folder.create_worker().run_next_job()
        time.sleep(CONFIG.heartbeat_timeout_seconds)
        assert folder.jobs.requeue_lost_jobs(CONFIG.heartbeat_timeout_seconds) == ["cut"]
        worker = folder.create_worker()
        reported_steps = record_steps(worker, "heartbeat")
        assert worker.run_next_job()
    finally:
        torch.set_num_threads(threads)
    assert min(reported_steps) > 2  # it resumed instead of starting again
    assert_same_clip(get_result(folder, "whole"), get_result(folder, "cut"))
    assert folder.jobs.get_status("cut").attempt == 2


def test_a_state_survives_packing():
    latents, previous, *outputs_so_far = (torch.randn(1, 16, 3, 8, 8) for _ in range(4))
    job = build_job("one", visual_tokens="v.safetensors")
    for outputs in (tuple(outputs_so_far[:1]), tuple(outputs_so_far)):
        data = pack_resume_point(DenoisingState(7, latents, previous, outputs), MODEL, [job])
        unprepared = job.model_copy(update={"id": "two", "visual_tokens": None})
        point = unpack_resume_point(data, MODEL, [unprepared], torch.device("cpu"))
        state = point.state
        assert point.visual_tokens == ("v.safetensors",)
        assert (state.step, len(state.model_outputs)) == (7, len(outputs))
        assert torch.equal(state.latents, latents) and torch.equal(state.previous_sample, previous)
        assert all(map(torch.equal, state.model_outputs, outputs))


def test_a_running_job_is_cancelled_within_a_step(folder):
    workers = InProcessWorker(folder.create_worker()).start()
    try:
        queue = DurableQueue(folder.jobs, folder.store, workers)
        running = queue.run(build_job("long", steps=200))
        step = next(event for event in running if isinstance(event, StepProgress))
        queue.cancel("long")
        with pytest.raises(JobCancelled):
            list(running)
        assert step.step <= folder.jobs.get_status("long").step < 200
        assert isinstance(list(queue.run(build_job("next")))[-1], Artifact)
    finally:
        workers.stop()


@pytest.mark.parametrize(
    ("job", "code", "message"),
    [
        (build_job("odd", width=72), "invalid_input", "width"),
        (build_job("gone", visual_tokens="0" * 64 + ".safetensors"), "failed", "there is no such artifact"),
    ],
)
def test_a_job_that_cannot_be_rendered_fails_with_its_reason(folder, job, code, message):
    folder.jobs.submit(job)
    assert folder.create_worker().run_next_job()
    with pytest.raises(OmniVideoError, match=message):
        list(folder.create_queue().follow_job(job.id))
    assert folder.jobs.get_status(job.id).code == code


@pytest.mark.parametrize(
    ("error", "code"), [(torch.OutOfMemoryError("CUDA"), "out_of_memory"), (ZeroDivisionError("/etc/x"), "internal")]
)
def test_an_error_in_the_worker_fails_only_that_job(folder, monkeypatch, error, code):
    worker = folder.create_worker()
    folder.jobs.submit(build_job("one"))
    folder.jobs.submit(build_job("two"))
    with monkeypatch.context() as patch:
        patch.setattr(worker.renderer, "render_job", lambda *rest: (_ for _ in ()).throw(error))
        assert worker.run_next_job()
    status = folder.jobs.get_status("one")
    assert (status.state, status.code) == ("failed", code) and "/etc" not in status.error
    assert worker.run_next_job()
    assert get_result(folder, "two").frames == 9


def test_a_superseded_worker_changes_nothing(folder):
    """A worker that was considered lost finishes late; the other worker's result stays."""
    folder.jobs.submit(build_job("one"))
    slow, quick = folder.create_worker(), folder.create_worker()
    claim = slow.jobs.claim_next_job("slow", MODEL)
    time.sleep(0.05)
    assert folder.jobs.requeue_lost_jobs(0.01) == ["one"]
    assert quick.run_next_job()
    expected = get_result(folder, "one")
    with pytest.raises(Exception, match="no longer belongs to this worker"):
        slow.run_claim(claim)
    assert get_result(folder, "one") == expected


def test_the_reaper_notifies_workers_of_lost_jobs(folder):
    folder.jobs.submit(build_job("one"))
    folder.jobs.claim_next_job("gone", MODEL)
    notified = threading.Event()
    reaper = Reaper(folder.jobs, 0.5, notified.set).start()
    try:
        assert notified.wait(5)
    finally:
        reaper.stop()
    assert folder.create_worker().run_next_job()
    assert get_result(folder, "one")


# ---------------------------------------------------------------- batches

BATCH_CONFIG = WorkerConfig(save_every_steps=2, save_every_seconds=0.0, heartbeat_timeout_seconds=1.0, max_batch_size=3)


def submit_batch_jobs(folder: ServiceFolder, *names: str, **options) -> None:
    """Submit jobs of the batch lane and as many others, because a worker leaves half of the queue to the next one."""
    all_names = (*names, *(f"rest{index}" for index, _ in enumerate(names)))
    for index, name in enumerate(all_names):
        folder.jobs.submit(build_job(name, f"a red ball {index}", seed=index, **options), lane="batch")


def load_latents(folder: ServiceFolder, name: str) -> torch.Tensor:
    return get_tensors(folder.store, get_result(folder, name).latents)["latents"]


def test_clips_rendered_in_one_pass_differ_only_by_rounding(folder):
    submit_batch_jobs(folder, "one", "two", "three", steps=12)
    assert folder.create_worker(BATCH_CONFIG).run_next_job()
    states = [folder.jobs.get_status(name).state for name in ("one", "two", "three", "rest0")]
    assert states == ["done", "done", "done", "queued"]
    for index, name in enumerate(("one", "two", "three")):
        folder.jobs.submit(build_job(f"{name} alone", f"a red ball {index}", steps=12, seed=index))
        assert folder.create_worker(BATCH_CONFIG).run_next_job()  # the interactive lane comes first, and one at a time
        assert folder.jobs.get_status(f"{name} alone").state == "done"
        pair = load_latents(folder, name), load_latents(folder, f"{name} alone")
        assert (pair[0] - pair[1]).abs().max() < 1e-4  # of deviation 1
        batched, single = (pixels_to_bytes(decode_latents(folder.omni.vae, latents[None])) for latents in pair)
        assert abs(batched.astype(int) - single).max() <= 1  # before H.264
    assert len({get_result(folder, name).key for name in ("one", "two", "three")}) == 3


def test_a_killed_workers_batch_continues_to_the_same_bytes(folder, tmp_path_factory):
    undisturbed = ServiceFolder(tmp_path_factory.mktemp("undisturbed"), folder.omni)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        submit_batch_jobs(undisturbed, "cut", "two", "three", steps=40)
        assert undisturbed.create_worker(BATCH_CONFIG).run_next_job()
        submit_batch_jobs(folder, "cut", "two", "three", steps=40)
        kill_midway(folder, after=10, config=BATCH_CONFIG)
        folder.jobs.cancel("two")  # it stays in the render batch nevertheless
        time.sleep(BATCH_CONFIG.heartbeat_timeout_seconds)
        assert sorted(folder.jobs.requeue_lost_jobs(BATCH_CONFIG.heartbeat_timeout_seconds)) == ["cut", "three"]
        worker = folder.create_worker()  # the batch stays together even if the worker renders no batches itself
        reported_steps = record_steps(worker, "heartbeat_all")
        assert worker.run_next_job()
    finally:
        torch.set_num_threads(threads)
    assert min(reported_steps) > 2
    for name in ("cut", "three"):
        assert_same_clip(get_result(undisturbed, name), get_result(folder, name))
    assert folder.jobs.get_status("two").state == "cancelled"


def test_only_jobs_with_the_same_batch_key_share_a_pass(folder):
    long_prompt = " ".join(["a red ball and"] * 12)
    names = ("one", "other", "two", "long", "three", "four")
    for index, name in enumerate(names):
        prompt, steps = long_prompt if name == "long" else "a red ball", 7 if name == "other" else 6
        folder.jobs.submit(build_job(name, prompt, steps=steps, seed=index), lane="batch")
    assert folder.create_worker(BATCH_CONFIG).run_next_job()
    assert [name for name in names if folder.jobs.get_status(name).state == "done"] == ["one", "two"]


def test_a_cancelled_job_leaves_its_batch(folder):
    submit_batch_jobs(folder, "one", "two", "three", steps=12)
    worker = folder.create_worker(BATCH_CONFIG)
    heartbeat = worker.jobs.heartbeat_all

    def cancel_at_step_3(claims, step=None, **fields):
        if step and step.step == 3:
            folder.jobs.cancel("two")
        return heartbeat(claims, step, **fields)

    worker.jobs.heartbeat_all = cancel_at_step_3
    assert worker.run_next_job()
    assert [folder.jobs.get_status(name).state for name in ("one", "two", "three")] == ["done", "cancelled", "done"]


def test_a_batch_that_needs_too_much_memory_is_rendered_one_by_one(folder, monkeypatch):
    submit_batch_jobs(folder, "one", "two", "three")
    worker = folder.create_worker(BATCH_CONFIG)
    full = lambda *rest: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA"))  # noqa: E731
    monkeypatch.setattr(worker.renderer, "render_batch", full)
    assert worker.run_next_job()
    assert all(get_result(folder, name) for name in ("one", "two", "three"))


def test_a_job_that_kills_its_workers_is_isolated_from_its_batch(folder):
    """After two losses each job of the batch is rendered alone, so that only the faulty job has the third loss."""
    submit_batch_jobs(folder, "one", "two", "three")
    for _ in range(2):
        first = folder.jobs.claim_next_job("w", MODEL)
        claims = folder.jobs.claim_render_batch(first, "w", MODEL, 3, lambda job: True)
        assert sorted(claim.job.id for claim in claims) == ["one", "three", "two"]
        time.sleep(0.05)
        folder.jobs.requeue_lost_jobs(0.01)
    seen = [folder.jobs.claim_next_job("w", MODEL) for _ in range(3)]
    assert all(claim.batch_job_ids == () and claim.resume_key is None for claim in seen)
