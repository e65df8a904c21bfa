"""Celery workers in separate processes with a real broker: Redis with PostgreSQL, and RabbitMQ with SQLite."""

import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from kombu import Connection

from omnivideo.backends.queue.reaper import Reaper
from omnivideo.contracts import Artifact, Job, resolve_sampling_params
from omnivideo.errors import JobCancelled
from omnivideo.presets import TINY
from omnivideo.presets.shapes import SourceLength
from tests.support.continuations import PRESET, make_frames, store_frames
from tests.support.deployments import HEARTBEAT_TIMEOUT, Deployment
from tests.support.openai_service import wait_until
from tests.support.servers import postgres, rabbitmq, redis


@pytest.fixture(scope="module", params=["redis", "rabbitmq"])
def deployment(request, weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    broker = {"redis": redis, "rabbitmq": rabbitmq}[request.param](folder / "broker")
    database = postgres(folder / "database") if request.param == "redis" else nullcontext("")
    with broker as broker_address, database as database_address:
        with Connection(broker_address) as connection:
            connection.ensure_connection(max_retries=50, interval_start=0.2, interval_max=0.5)
        deployment = Deployment(folder, broker_address, database_address, weights)
        yield deployment
        deployment.jobs.engine.dispose()


def test_notifying_workers_loads_no_model_library() -> None:
    code = "import sys; import omnivideo.backends.queue.celery; print('torch' in sys.modules)"
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert completed.stdout.strip() == "False"


def build_job(name: str, steps: int = 4, frames: int = 9) -> Job:
    params = resolve_sampling_params(TINY, "text-to-video", seed=5, steps=steps)
    params = params.model_copy(update={"frames": frames})  # more than the preset was trained for take longer
    return Job(id=name, prompt="a red ball", visual_tokens=None, source=None, params=params)


def find_child(worker: subprocess.Popen[bytes]) -> int:
    """Return the pid of the worker's child process, which renders the jobs."""
    children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
    return int(children[-1])


def test_killed_workers_lose_no_job(deployment):
    with deployment.run_worker() as worker:
        artifact = list(deployment.queue.run(build_job("first")))[-1]
        assert isinstance(artifact, Artifact) and deployment.store.has(artifact.key)
        uninterrupted = list(deployment.queue.run(build_job("uninterrupted", 150)))[-1]

        # The child is killed: its parent starts another, which continues from the last saved state.
        deployment.jobs.submit(build_job("killed_child", 150))
        deployment.notify_workers()
        deployment.wait_for("killed_child", step=20)
        os.kill(find_child(worker), signal.SIGKILL)
        deployment.wait_for("killed_child", ended=True)
        status = deployment.jobs.get_status("killed_child")
        assert (status.state, status.attempt) == ("done", 2)
        assert (status.result.key, status.result.latents) == (uninterrupted.key, uninterrupted.latents)

        running = deployment.queue.run(build_job("cancelled", 200, frames=33))
        next(running)
        deployment.queue.cancel("cancelled")
        with pytest.raises(JobCancelled):
            list(running)

        # The worker and its child are killed: only the reaper of the service notices.
        deployment.jobs.submit(build_job("killed_worker", 150))
        deployment.notify_workers()
        deployment.wait_for("killed_worker", step=20)
        os.killpg(worker.pid, signal.SIGKILL)
    reaper = Reaper(deployment.jobs, HEARTBEAT_TIMEOUT, deployment.notify_workers).start()
    try:
        with deployment.run_worker():
            deployment.wait_for("killed_worker", ended=True)
    finally:
        reaper.stop()
    status = deployment.jobs.get_status("killed_worker")
    assert (status.state, status.result.key) == ("done", uninterrupted.key)
    assert deployment.jobs.count_queued() == 0


def test_a_killed_workers_extension_continues_in_its_second_pass(deployment):
    """Two passes of 40 steps; the last saved state has the latents of the first."""
    clip, still = (store_frames(deployment.store, make_frames(count)) for count in (9, 1))
    length = SourceLength(clip.frames, clip.fps)
    params = resolve_sampling_params(PRESET, "video-extension", length, seed=5, steps=40, frames=16)
    jobs = [
        Job(id=name, prompt="it moves", visual_tokens=None, source=clip, params=params, preset="tiny")
        for name in ("extended", "extended_with_a_loss")
    ]
    with deployment.run_worker("-m", "tests.support.continuation_worker") as worker:
        uninterrupted = list(deployment.queue.run(jobs[0]))[-1]
        assert uninterrupted.frames == 25
        deployment.jobs.submit(jobs[1])
        deployment.notify_workers()
        deployment.wait_for(jobs[1].id, step=50)
        os.kill(find_child(worker), signal.SIGKILL)
        deployment.wait_for(jobs[1].id, ended=True)
        status = deployment.jobs.get_status(jobs[1].id)
        assert (status.state, status.attempt, status.steps) == ("done", 2, 80)
        assert status.result.key == uninterrupted.key

        params = resolve_sampling_params(PRESET, "keyframes-to-video", steps=2)
        job = Job(id="frames", prompt="a", visual_tokens=None, source=still, last_frame=still, params=params)
        assert list(deployment.queue.run(job))[-1].source == still.key


class Payload:
    """Create a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_workers_log_has_its_own_lines(deployment):
    """The real process's log: one JSON object on each line, and neither Celery's banner nor its format."""
    known = set(deployment.home.glob("worker-*.log"))
    with deployment.run_worker():
        list(deployment.queue.run(build_job("logged")))
        (log,) = set(deployment.home.glob("worker-*.log")) - known
        wait_until(lambda: "attempt 1 is done" in log.read_text())  # it is written after the job has ended
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    attempts = [line for line in lines if line.get("job") == "logged"]
    assert [line["message"].split(" after")[0] for line in attempts] == [
        "job logged: attempt 1 begins", "job logged: attempt 1 is done",
    ]  # fmt: skip
    assert attempts[1]["outcome"] == "is done" and attempts[1]["seconds"] > 0 and attempts[1]["steps"] == 4


def test_attack_a_pickled_message_is_never_opened(deployment, tmp_path):
    created_file = tmp_path / "opened"
    with Connection(deployment.broker) as connection:
        producer = connection.Producer(serializer="pickle")
        producer.publish(
            [(Payload(created_file),), {}, {}],
            routing_key=deployment.queue_name,
            headers={"task": "omnivideo.work", "id": "x"},
        )
    with deployment.run_worker():
        assert isinstance(list(deployment.queue.run(build_job("after")))[-1], Artifact)
    assert not created_file.exists()


def test_a_terminated_worker_gives_its_job_back(deployment):
    """A restart counts as no loss, however often it happens; the job continues with the same bytes."""
    deployment.jobs.submit(build_job("restarted", 150))
    steps = [0]
    for _ in range(4):
        with deployment.run_worker() as worker:
            deployment.notify_workers()
            deployment.wait_for("restarted", step=steps[-1] + 5)
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(20) == 0
        status = deployment.jobs.get_status("restarted")
        assert status.state == "queued"
        steps.append(status.step)
    assert steps == sorted(set(steps))
    with deployment.run_worker():
        deployment.wait_for("restarted", ended=True)
        uninterrupted = list(deployment.queue.run(build_job("unrestarted", 150)))[-1]
    status = deployment.jobs.get_status("restarted")
    assert (status.state, status.attempt, status.result.key) == ("done", 5, uninterrupted.key)


SLOW_WORKER = """
import time
from omnivideo.backends.queue.celery import serve_celery_worker
from omnivideo.cli.service import build_wiring, read_queue_name

settings = build_wiring(device="cpu").settings

def build_worker():
    time.sleep(30)
    return build_wiring(device="cpu").worker, settings.heartbeat_timeout

serve_celery_worker(settings.broker, read_queue_name(settings), build_worker)
"""


@pytest.mark.timeout(1200)
def test_a_child_that_loads_slowly_is_replaced(tmp_path, weights):
    """Celery kills a child that has not started within 4 s; a large model needs minutes to load, here 30 s."""
    names = [f"slow{number}" for number in range(5)]
    with redis(tmp_path / "broker") as address:
        deployment = Deployment(tmp_path, address, "", weights)
        for name in names:
            deployment.jobs.submit(build_job(name, 150))

        def find_new_attempt() -> tuple[str, int] | None:
            """Return a clip and its attempt that is under way and met no kill; a third kill would give the clip up."""
            for name in names:
                status = deployment.jobs.get_status(name)
                attempt = (name, status.attempt)
                if status.state == "running" and status.step >= 5 and status.attempt < 3 and attempt not in killed:
                    return attempt
            return None

        with deployment.run_worker("-c", SLOW_WORKER) as worker:
            killed: dict[tuple[str, int], int] = {}
            for _ in range(5):
                attempt = wait_until(find_new_attempt, 300)
                killed[attempt] = find_child(worker)
                os.kill(killed[attempt], signal.SIGKILL)
            for name in names:
                deployment.wait_for(name, ended=True, timeout_seconds=300)
    assert len(set(killed.values())) == 5
    outcomes = [(status.state, status.attempt) for status in map(deployment.jobs.get_status, names)]
    assert all(state == "done" for state, _ in outcomes), outcomes
    assert sum(attempt - 1 for _, attempt in outcomes) == 5, outcomes
    deployment.jobs.engine.dispose()


def test_a_clip_may_take_longer_than_the_brokers_acknowledgement_timeout(tmp_path, weights):
    """RabbitMQ closes the channel of a message that is not acknowledged in time, here 3 s, which would end a worker."""
    with rabbitmq(tmp_path / "broker", consumer_timeout_ms=3000) as address:
        deployment = Deployment(tmp_path, address, "", weights)
        with deployment.run_worker() as worker:
            for name in ("longer", "next"):
                deployment.jobs.submit(build_job(name, 200, frames=33))
                deployment.notify_workers()
                deployment.wait_for(name, ended=True)
            assert worker.poll() is None
    for status in map(deployment.jobs.get_status, ("longer", "next")):
        assert (status.state, status.attempt) == ("done", 1) and status.ended_at - status.started_at > 6
    deployment.jobs.engine.dispose()


def test_services_that_share_a_broker_take_no_messages_of_each_other(deployment, tmp_path):
    other = Deployment(tmp_path, deployment.broker, "", deployment.environment["OMNIVIDEO_WEIGHTS"])
    assert other.queue_name != deployment.queue_name
    with deployment.run_worker():
        list(deployment.queue.run(build_job("warm")))
        other.notify_workers()
        list(deployment.queue.run(build_job("neighbour")))
    with Connection(deployment.broker) as connection:
        assert connection.SimpleQueue(other.queue_name).qsize() == 1  # it waits for a worker of its own
    other.jobs.engine.dispose()


def test_a_missing_broker_loses_no_job(tmp_path, weights):
    """The job is in the database; its message is sent when the broker starts."""
    with redis(tmp_path / "broker") as address:
        port = int(address.rpartition(":")[2].partition("/")[0])
    deployment = Deployment(tmp_path, address, "", weights)
    deployment.jobs.submit(build_job("early"))
    deployment.notify_workers()
    assert deployment.jobs.get_status("early").state == "queued"
    with deployment.jobs.engine.connect() as connection:
        connection.exec_driver_sql("UPDATE jobs SET notified_at = notified_at - 60")
    with redis(tmp_path / "broker", port), deployment.run_worker():
        reaper = Reaper(deployment.jobs, HEARTBEAT_TIMEOUT, deployment.notify_workers).start()
        try:
            deployment.wait_for("early", ended=True)
        finally:
            reaper.stop()
    assert deployment.jobs.get_status("early").state == "done"
