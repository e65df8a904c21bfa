"""New weights replace old ones under load: no latents are resumed with other weights, and no job is lost."""

import copy
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from sqlalchemy import select

from omnivideo.backends.decoder.renderer import Renderer
from omnivideo.backends.decoder.worker import Worker, WorkerConfig
from omnivideo.backends.queue.reaper import Reaper
from omnivideo.contracts import Artifact, Job, resolve_sampling_params
from omnivideo.models.omni import OmniVideoModel
from omnivideo.models.weights import checkpoint
from omnivideo.models.weights.digests import compute_folder_digest
from omnivideo.presets import TINY
from omnivideo.storage.database.engine import create_database_engine, upgrade_schema
from omnivideo.storage.database.jobs import JobRepository
from omnivideo.storage.database.schema import jobs as jobs_table
from omnivideo.storage.objects.local import LocalObjectStore
from omnivideo.storage.objects.memory import MemoryObjectStore
from tests.support.deployments import HEARTBEAT_TIMEOUT, Deployment
from tests.support.servers import postgres, redis

CONFIG = WorkerConfig(save_every_steps=2, save_every_seconds=0.0, heartbeat_timeout_seconds=1.0)
RESUME_TIMEOUT = 4.0


@pytest.fixture(scope="module")
def new_omni(omni) -> OmniVideoModel:
    """The model with one tensor changed."""
    changed = copy.deepcopy(omni)
    with torch.no_grad():
        changed.decoder.blocks[0].ffn.net[0].proj.weight.mul_(1.5)
    return changed


@pytest.fixture(autouse=True)
def one_thread():
    """Let a forked child render, which cannot use the parent's pool of threads, and all processes compute alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build_job(name: str, seed: int = 5, steps: int = 40) -> Job:
    params = resolve_sampling_params(TINY, "text-to-video", seed=seed, steps=steps)
    return Job(id=name, prompt=f"a red ball {seed}", visual_tokens=None, source=None, params=params, preset="tiny")


def render(omni: OmniVideoModel, job: Job) -> Artifact:
    """Render a job without a service."""
    renderer = Renderer(omni, MemoryObjectStore(), "any")
    prepared, params = renderer.prepare_job(job)
    *_, clip = renderer.render_job(prepared, params)
    return renderer.store_result(prepared, params, clip)


def assert_same_clip(first: Artifact, second: Artifact) -> None:
    assert (first.key, first.latents) == (second.key, second.latents)


class Folder:
    """A database and a store of two workers with different weights."""

    def __init__(self, path: Path):
        self.address, self.store = f"sqlite:///{path}/service.sqlite", LocalObjectStore(path / "store")
        upgrade_schema(create_database_engine(self.address))
        self.jobs = JobRepository(create_database_engine(self.address))

    def create_worker(self, omni: OmniVideoModel, digest: str, resume_timeout: float = 60.0) -> Worker:
        engine = create_database_engine(self.address)
        jobs = JobRepository(engine, resume_timeout_seconds=resume_timeout)
        return Worker(Renderer(omni, self.store, digest), jobs, CONFIG)

    def kill_worker_midway(self, omni: OmniVideoModel, digest: str, name: str) -> None:
        child = os.fork()
        if child == 0:
            try:
                self.create_worker(omni, digest).run_next_job()
            finally:
                os._exit(0)
        deadline = time.monotonic() + 60
        while (status := self.jobs.get_status(name)).step < 10 and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), status
        time.sleep(CONFIG.heartbeat_timeout_seconds)
        assert self.jobs.requeue_lost_jobs(CONFIG.heartbeat_timeout_seconds) == [name]

    def get_result(self, name: str) -> Artifact:
        status = self.jobs.get_status(name)
        assert status.state == "done", status
        return status.result

    def read_weights(self, artifact: Artifact) -> str:
        return json.loads(self.store.get(artifact.manifest))["weights"]


def test_only_the_old_weights_resume_what_they_began(omni, new_omni, tmp_path):
    folder = Folder(tmp_path)
    folder.jobs.submit(build_job("cut"))
    folder.kill_worker_midway(omni, "old", "cut")
    assert not folder.create_worker(new_omni, "new").run_next_job()
    assert folder.create_worker(omni, "old").run_next_job()
    result = folder.get_result("cut")
    assert folder.read_weights(result) == "old"
    assert_same_clip(result, render(omni, build_job("cut")))


def test_the_new_weights_start_it_again_when_the_old_ones_are_gone(omni, new_omni, tmp_path):
    folder = Folder(tmp_path)
    folder.jobs.submit(build_job("cut"))
    folder.kill_worker_midway(omni, "old", "cut")
    assert folder.create_worker(new_omni, "new", resume_timeout=0.5).run_next_job()
    result = folder.get_result("cut")
    assert folder.read_weights(result) == "new"
    assert_same_clip(result, render(new_omni, build_job("cut")))
    assert result.latents != render(omni, build_job("cut")).latents


def test_a_resume_point_that_does_not_fit_is_not_used(omni, new_omni, tmp_path, caplog):
    """Even if the database says that it does: a worker of version 0.2 does not record its weights there."""
    folder = Folder(tmp_path)
    folder.jobs.submit(build_job("cut"))
    folder.kill_worker_midway(omni, "old", "cut")
    with folder.jobs.engine.connect() as connection:
        connection.execute(jobs_table.update().values(weights="new"))
    assert folder.create_worker(new_omni, "new").run_next_job()
    assert "its resume point is of another model or request" in caplog.text
    assert_same_clip(folder.get_result("cut"), render(new_omni, build_job("cut")))


# ---------------------------------------------------------------- two Celery workers under load


class Rollout:
    """A deployment whose jobs are followed while its workers are replaced."""

    def __init__(self, deployment: Deployment):
        self.deployment, self.names = deployment, []

    def submit(self, count: int) -> None:
        for _ in range(count):
            name = f"job{len(self.names)}"
            self.deployment.jobs.submit(build_job(name, seed=len(self.names), steps=60))
            self.names.append(name)
            self.deployment.notify_workers()

    def wait_for_running_job(self, process, min_step: int) -> str:
        """Return the job that a worker's child renders once it has a resume point."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            columns = select(jobs_table.c.id, jobs_table.c.worker_name, jobs_table.c.step)
            is_running = jobs_table.c.state == "running"
            for row in self.deployment.jobs.fetch_all(columns.where(is_running, jobs_table.c.resume_key.is_not(None))):
                if row.worker_name.rpartition(":")[2] in children and row.step >= min_step:
                    return row.id
            time.sleep(0.005)
        raise AssertionError("the worker renders nothing")

    def kill_in_a_job(self, process) -> str:
        name = self.wait_for_running_job(process, min_step=20)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return name

    def wait_for_ends(self, *names: str) -> None:
        for name in names:
            self.deployment.wait_for(name, ended=True)


@pytest.mark.timeout(600)
def test_weights_are_replaced_under_load_in_a_service_of_two_workers(omni, new_omni, tmp_path):
    folders = {"old": tmp_path / "old", "new": tmp_path / "new"}
    checkpoint.save(omni, folders["old"])
    checkpoint.save(new_omni, folders["new"])
    digests = {compute_folder_digest(folder).value: name for name, folder in folders.items()}
    with redis(tmp_path / "broker") as broker, postgres(tmp_path / "database") as database:
        deployment = Deployment(tmp_path, broker, database, folders["old"])
        deployment.environment["OMNIVIDEO_RESUME_TIMEOUT"] = str(RESUME_TIMEOUT)
        rollout = Rollout(deployment)
        reaper = Reaper(deployment.jobs, HEARTBEAT_TIMEOUT, deployment.notify_workers).start()
        try:
            with deployment.run_worker() as first, deployment.run_worker() as second:
                rollout.submit(8)
                resumed = rollout.kill_in_a_job(first)
                deployment.environment["OMNIVIDEO_WEIGHTS"] = str(folders["new"])
                with deployment.run_worker() as third:
                    rollout.wait_for_running_job(third, min_step=1)
                    rollout.wait_for_ends(resumed)
                    rollout.submit(6)
                    restarted = rollout.kill_in_a_job(second)
                    with deployment.run_worker():
                        rollout.wait_for_ends(*rollout.names)
        finally:
            reaper.stop()
        statuses = {name: deployment.jobs.get_status(name) for name in rollout.names}
        deployment.jobs.engine.dispose()
    weights = {}
    for name, status in statuses.items():
        assert status.state == "done", status
        manifest = json.loads(deployment.store.get(status.result.manifest))
        assert (manifest["preset"], manifest["precision"]) == ("tiny", "float32")
        weights[name] = digests[manifest["weights"]]
    attempts = {name: status.attempt for name, status in statuses.items()}
    assert attempts == dict.fromkeys(rollout.names, 1) | {resumed: 2, restarted: 2}  # every job once
    assert (weights[resumed], weights[restarted]) == ("old", "new")
    assert {"old", "new"} == set(weights.values())
    logs = "".join(path.read_text() for path in tmp_path.glob("worker-*.log"))
    assert f"job {resumed}: attempt 2 continues" in logs and f"job {restarted}: attempt 2 begins" in logs
    loaded = {name: checkpoint.load(folder) for name, folder in folders.items()}
    for name, status in statuses.items():
        assert_same_clip(status.result, render(loaded[weights[name]], status.job))
