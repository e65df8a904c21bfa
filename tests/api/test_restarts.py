"""Two hundred turns and a thousand jobs, while the service is restarted every 20 s: everything is done exactly once."""

import itertools
import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import func, select

from benchmarks.conversation_faults import EmbeddedService
from omnivideo.contracts import Job, resolve_sampling_params
from omnivideo.presets import TINY
from omnivideo.settings import load_settings
from omnivideo.storage.database.schema import batches, jobs, turn_events, turns
from omnivideo.wiring import ServiceWiring
from tests.support.openai_service import wait_until

THREADS, JOBS, SLOTS, RESTART_SECONDS = 200, 1000, 16, 20.0
HEARTBEAT_TIMEOUT_SECONDS = 8.0  # shorter than the time between restarts, and long enough for a busy machine
OPEN_STATES = ("queued", "running")
CHAT_LINES = 12
MAX_STOP_SECONDS = 25.0  # it took 45 s; a busy machine takes three times as long as an idle one


class RestartedService(EmbeddedService):
    """An embedded service that is stopped and started again, and its database beside it."""

    def __init__(self, home: Path):
        super().__init__(home, heartbeat_timeout=HEARTBEAT_TIMEOUT_SECONDS)
        self.log = home / "api.log"
        self.wiring = ServiceWiring(load_settings(home=home))

    def stop(self, kind: signal.Signals) -> None:
        self.process.send_signal(kind)
        self.process.wait(60)

    def count_open(self) -> int:
        return sum(self.count(table, table.c.state.in_(OPEN_STATES)) for table in (jobs, turns))

    def count(self, table, condition) -> int:
        (row,) = self.wiring.jobs.fetch_all(select(func.count()).select_from(table).where(condition))
        return int(row[0])

    def count_losses(self) -> int:
        """Return how often a process was taken for lost that had a job or a turn."""
        total = 0
        for column in (jobs.c.worker_losses, turns.c.process_losses):
            total += self.wiring.jobs.fetch_all(select(func.coalesce(func.sum(column), 0)))[0][0]
        return total


def submit_jobs(service: RestartedService) -> None:
    params = resolve_sampling_params(TINY, "text-to-image", steps=1, seed=1)  # a clip takes three times as long
    for seed in range(JOBS):
        job = Job(
            id=f"job-{seed}", prompt=f"a red ball {seed}", visual_tokens=None, source=None, preset="tiny",
            params=params.model_copy(update={"seed": seed}),
        )  # fmt: skip
        service.wiring.jobs.submit(job, "bulk", "batch")


def create_turns(service: RestartedService) -> None:
    """Create the turns, several at a time, so that most of them are open when the service stops for the first time."""

    def create_turn(number: int) -> None:
        thread = service.http.post("/v1/threads", json={"id": f"thread-{number}"}).raise_for_status().json()
        body = {"text": "a picture of a red circle", "steps": 1, "seed": number}
        service.http.post(f"/v1/threads/{thread['id']}/turns", json=body).raise_for_status()

    with ThreadPoolExecutor(SLOTS) as pool:
        list(pool.map(create_turn, range(THREADS)))


def restart_until_done(service: RestartedService) -> list[tuple[signal.Signals, int]]:
    """Restart the service every 20 s until nothing is open; return each signal with the losses that followed it."""
    losses = []
    for kind in itertools.cycle((signal.SIGTERM, signal.SIGKILL)):
        end = time.monotonic() + RESTART_SECONDS
        while service.count_open() and time.monotonic() < end:
            time.sleep(0.5)
        if losses:
            losses[-1] = (losses[-1][0], service.count_losses() - losses[-1][1])
        if not service.count_open():
            return losses
        before = service.count_losses()
        service.stop(kind)
        losses.append((kind, before))
        service.start()


@pytest.mark.timeout(1800)
def test_restarts_lose_and_repeat_nothing(tmp_path):
    service = RestartedService(tmp_path)
    service.start()
    try:
        submit_jobs(service)
        create_turns(service)
        losses = restart_until_done(service)
    finally:
        service.close()
    print(losses, service.log.read_text().count("its process has stopped; it continues here"))
    assert {kind for kind, _ in losses} == {signal.SIGTERM, signal.SIGKILL}
    for kind, count in losses:  # a stop is no loss, and nothing alive is taken for lost
        assert count == 0 if kind == signal.SIGTERM else count <= SLOTS + TINY.max_batch_size, losses
    rows = service.wiring.jobs.fetch_all(select(jobs.c.id, jobs.c.state, jobs.c.result, jobs.c.notified_at))
    assert {row.state for row in rows} == {"done"}
    assert sum(row.id.startswith("job-") for row in rows) == JOBS and len(rows) == JOBS + THREADS
    keys = {row.result["key"] for row in rows if row.id.startswith("job-")}
    assert len(keys) == JOBS and all(map(service.wiring.store.has, keys))
    ended = service.wiring.jobs.fetch_all(select(turns.c.id, turns.c.state))
    assert [row.state for row in ended] == ["done"] * THREADS
    ends = service.wiring.jobs.fetch_all(
        select(turn_events.c.turn_id, turn_events.c.body).where(turn_events.c.turn_id.in_([row.id for row in ended]))
    )
    completed = [row.turn_id for row in ends if row.body["kind"] == "done"]
    assert len(completed) == len(set(completed)) == THREADS
    service.wiring.close()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_during_chats_of_a_batch_and_a_clip_takes_seconds_and_is_no_loss(tmp_path, kind):
    service = RestartedService(tmp_path)
    service.start()
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a video of a red circle moving left"}]}
    lines = [
        json.dumps({"custom_id": f"{number}", "method": "POST", "url": "/v1/chat/completions", "body": body})
        for number in range(CHAT_LINES)
    ]
    try:
        files = {"file": ("lines.jsonl", "\n".join(lines).encode())}
        stored = service.http.post("/v1/files", data={"purpose": "batch"}, files=files).raise_for_status().json()
        options = {"input_file_id": stored["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        batch = service.http.post("/v1/batches", json=options).raise_for_status().json()
        clip = service.http.post("/v1/videos", json={"prompt": "a blue star", "num_inference_steps": 200}).json()
        for _ in range(3):
            wait_until(lambda: service.count(turns, turns.c.state == "running"), 60)
            started_at = time.monotonic()
            service.stop(kind)
            assert time.monotonic() - started_at < MAX_STOP_SECONDS
            service.start()
        wait_until(lambda: service.http.get(f"/v1/videos/{clip['id']}").json()["status"] == "completed", 180)
        path = f"/v1/batches/{batch['id']}"
        wait_until(lambda: service.http.get(path).json()["status"] == "completed", 240)
        batch = service.http.get(path).json()
        output = service.http.get(f"/v1/files/{batch['output_file_id']}/content").text.splitlines()
    finally:
        service.close()
    assert sorted(int(json.loads(line)["custom_id"]) for line in output) == list(range(CHAT_LINES))
    assert service.count_losses() == 0 and service.count(batches, batches.c.runner_losses > 0) == 0
    service.wiring.close()
