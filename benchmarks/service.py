"""Measure the service: submits under load, followers, cancels, and a batch against the same clips in a plain loop.

python -m benchmarks.service submits|followers|cancels|throughput|memory [--weights FOLDER] [--seconds 60] ...

PostgreSQL, Redis, an S3 server, the API and the workers run as separate processes.
"""

import argparse
import asyncio
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import httpx

from benchmarks.cluster import KEY, ServiceCluster
from omnivideo.contracts import Job, JobStatus, resolve_sampling_params
from omnivideo.presets import TINY


def format_quantiles(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    p50, p99 = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.99))
    return f"p50 {1000 * p50:.1f} ms, p99 {1000 * p99:.1f} ms, maximum {1000 * ordered[-1]:.1f} ms"


# ---------------------------------------------------------------- submits


def measure_submits(cluster: ServiceCluster, arguments: argparse.Namespace) -> None:
    """Submit jobs at a constant rate (benchmarks/load.py); there are no workers, so no clip is generated."""
    url = httpx.URL(cluster.address)
    command = ["-m", "benchmarks.load", url.host, url.port, KEY, arguments.rate, arguments.seconds]
    cpu_before = read_cpu_seconds(cluster.api.process.pid)
    report = json.loads(subprocess.check_output([sys.executable, *map(str, command)]))
    latencies, seconds = report["latencies"], report["seconds"]
    cpu_ms = 1000 * (read_cpu_seconds(cluster.api.process.pid) - cpu_before) / max(1, len(latencies))
    print(f"{len(latencies)} submits in {seconds:.1f} s ({len(latencies) / seconds:.0f} per second)")
    print(f"{format_quantiles(latencies)}; {len(report['errors'])} errors; {cpu_ms:.1f} ms of the API's CPU time each")
    print(*report["errors"][:3], sep="\n")


def read_cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ---------------------------------------------------------------- followers


async def measure_followers(cluster: ServiceCluster, arguments: argparse.Namespace) -> None:
    """Follow one turn with many event streams; measure how long after the first follower the last gets an event."""
    headers = {"Authorization": f"Bearer {KEY}"}
    limits = httpx.Limits(max_connections=None)
    times_by_event: dict[int, list[float]] = {}
    errors: list[str] = []
    async with httpx.AsyncClient(
        base_url=cluster.address, headers=headers, limits=limits, trust_env=False, timeout=120
    ) as client:
        turns = cluster.wiring.build_service_context().turns
        thread = (await client.post("/v1/threads")).json()["id"]
        body = {"text": "", "attachments": [], "options": {}, "is_reply": False}
        turns.create_turn("turn_followed", thread, "admin", 1, body)
        turn = turns.claim_next_turn(60.0)
        assert turn is not None, "no other process runs turns"

        async def follow() -> int:
            event_count = 0
            async with client.stream("GET", f"/v1/threads/{thread}/turns/{turn.id}/events") as stream:
                if stream.status_code != 200:
                    errors.append((await stream.aread()).decode()[:200])
                async for line in stream.aiter_lines():
                    if line.startswith("id: "):
                        times_by_event.setdefault(int(line[4:]), []).append(time.perf_counter())
                        event_count += 1
            return event_count

        start = time.perf_counter()
        followers = [asyncio.create_task(follow()) for _ in range(arguments.followers)]
        for _ in range(max(1, min(40, arguments.followers // 25))):  # without heartbeats the turn would be taken over
            await asyncio.to_thread(turns.heartbeat, turn)
            await asyncio.sleep(0.5)
        for step in range(1, arguments.events + 1):
            event = {"kind": "step", "step": step, "steps": arguments.events, "eta_seconds": 0.0}
            await asyncio.to_thread(turns.append_event, turn, event)
            await asyncio.to_thread(turns.heartbeat, turn)
            await asyncio.sleep(0.2)
        await asyncio.to_thread(turns.end_turn, turn, "cancelled")
        counts = await asyncio.gather(*followers)
    print(*errors[:3], sep="\n")
    delays = [max(times) - min(times) for times in times_by_event.values()]
    complete = sum(count == arguments.events for count in counts)
    print(f"{complete} of {arguments.followers} followers received all {arguments.events} events; first to last "
          f"{format_quantiles(delays)}, {time.perf_counter() - start:.1f} s in total, "
          f"API {read_resident_mb(cluster.api.process.pid):.0f} MB")  # fmt: skip


# ---------------------------------------------------------------- cancels


def measure_cancels(cluster: ServiceCluster, arguments: argparse.Namespace) -> None:
    """Measure the time from a cancel request to the cancelled row, compared with the time of a step."""
    delays, step_seconds = [], []
    for seed in range(arguments.runs):
        body = {"prompt": "a red ball", "seed": seed, "num_inference_steps": 200}
        job_id = cluster.http.post("/v1/videos", json=body).json()["id"]
        first = wait_for_step(cluster, job_id, 3)
        start = time.perf_counter()
        last = wait_for_step(cluster, job_id, 23)
        step_seconds.append((time.perf_counter() - start) / max(1, last - first))
        start = time.perf_counter()
        cluster.http.post(f"/v1/videos/{job_id}/cancel")
        while get_status(cluster, job_id).state == "running":
            time.sleep(0.001)
        delays.append(time.perf_counter() - start)
    excess = max(delay - step for delay, step in zip(delays, step_seconds, strict=True))
    step_ms = 1000 * statistics.median(step_seconds)
    print(f"{arguments.runs} cancels: {format_quantiles(delays)}; a step takes {step_ms:.1f} ms; "
          f"longest beyond one step: {1000 * excess:.1f} ms")  # fmt: skip


def get_status(cluster: ServiceCluster, job_id: str) -> JobStatus:
    status = cluster.wiring.jobs.get_status(job_id)
    assert status is not None, "the job was submitted before"
    return status


def wait_for_step(cluster: ServiceCluster, job_id: str, step: int) -> int:
    """Wait until a job has reached a step, and return the step that it is at."""
    while (status := get_status(cluster, job_id)).step < step:
        time.sleep(0.001)
    return int(status.step)


# ---------------------------------------------------------------- throughput

LOOP = """
import sys, json, time
import torch
torch.set_num_threads(1)
from omnivideo.backends.decoder.pipeline import GeneratedClip, generate_clip
from omnivideo.media.artifacts import encode_clip
from omnivideo.contracts import resolve_sampling_params
from omnivideo.sdk.studio import Studio
weights, first, count, steps = sys.argv[1] or None, int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
studio = Studio(weights=weights, device="cpu")
sys.stdin.readline() if print("ready", flush=True) is None else None
start = time.perf_counter()
for seed in range(first, first + count):
    params = resolve_sampling_params(studio.omni.preset, "text-to-video", seed=seed, steps=steps)
    for event in generate_clip(studio.omni, f"a red ball {seed}", params):
        if isinstance(event, GeneratedClip):
            encode_clip(event.frames, params.fps)
print(time.perf_counter() - start, flush=True)
"""


def measure_plain_loop(cluster: ServiceCluster, arguments: argparse.Namespace) -> float:
    """Return the seconds in which two processes generate the same clips, each in a plain loop."""
    half = arguments.prompts // 2
    command = [sys.executable, "-c", LOOP, arguments.weights]
    processes = [
        subprocess.Popen([*command, str(index * half), str(half), str(arguments.steps)], env=cluster.environment,
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for index in range(2)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    return max(float(process.communicate()[0]) for process in processes)


def measure_throughput(cluster: ServiceCluster, arguments: argparse.Namespace) -> None:
    """Compare the batch lane with the plain loop; with --kill, kill one worker midway and print no ratio."""
    jobs = cluster.wiring.jobs
    for seed in range(arguments.prompts):
        job = Job(
            id=f"line-{seed}", prompt=f"a red ball {seed}", visual_tokens=None, source=None,
            params=resolve_sampling_params(TINY, "text-to-video", seed=seed, steps=arguments.steps),
        )  # fmt: skip
        jobs.submit(job, "admin", "batch")
    start = time.perf_counter()
    for _ in cluster.workers:
        cluster.wiring.notify_workers()
    killed = False
    while jobs.count_queued() or any(state == "running" for _, state, _ in jobs.count_by_lane_and_state()):
        done = sum(count for _, state, count in jobs.count_by_lane_and_state() if state == "done")
        if arguments.kill and not killed and done > arguments.prompts // 2:
            os.killpg(cluster.workers[0].process.pid, signal.SIGKILL)
            cluster.workers[0].process.wait()
            cluster.workers[0].start()
            killed = True
        time.sleep(0.5)
    seconds = time.perf_counter() - start
    statuses = jobs.list_statuses([f"line-{seed}" for seed in range(arguments.prompts)])
    done = sum(status.state == "done" for status in statuses)
    keys = {status.result.key for status in statuses if status.result}
    retries = sum(status.attempt - 1 for status in statuses)
    print(f"{done} of {arguments.prompts} done, {len(keys)} different clips, {retries} taken over")
    print(f"{seconds:.1f} s, {arguments.prompts / seconds:.2f} clips per second")
    if not arguments.kill:
        for worker in cluster.workers:
            worker.kill()
        loop_seconds = measure_plain_loop(cluster, arguments)
        rate = arguments.prompts / loop_seconds
        print(f"the same clips in a plain loop: {loop_seconds:.1f} s, {rate:.2f} clips per second; "
              f"ratio {loop_seconds / seconds:.3f}")  # fmt: skip


# ---------------------------------------------------------------- memory


def read_resident_mb(pid: int) -> float:
    """Return the resident memory of a process in MB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure_memory(cluster: ServiceCluster, arguments: argparse.Namespace) -> None:
    """Measure the memory of the processes after ten clips, and the time in which they start."""
    cluster.wait_for_jobs([cluster.submit(seed) for seed in range(10)])
    api_pid, worker_pid = cluster.api.process.pid, cluster.workers[0].process.pid
    child_pid = int(Path(f"/proc/{worker_pid}/task/{worker_pid}/children").read_text().split()[-1])
    print(f"API {read_resident_mb(api_pid):.0f} MB; worker {read_resident_mb(worker_pid):.0f} MB, "
          f"its child with the model {read_resident_mb(child_pid):.0f} MB, after 10 clips")  # fmt: skip
    for program, name in ((cluster.api, "API"), (cluster.workers[0], "worker")):
        program.kill()
        start = time.perf_counter()
        program.start()
        if name == "worker":
            cluster.wait_for_jobs([cluster.submit(99)])
        print(
            f"{name}: {time.perf_counter() - start:.1f} s from start to "
            + ("ready" if name == "API" else "its first clip")
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("submits", "followers", "cancels", "throughput", "memory"))
    parser.add_argument("--weights", default="")
    parser.add_argument("--rate", type=float, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--followers", type=int, default=1000)
    parser.add_argument("--events", type=int, default=50)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--kill", action="store_true")
    arguments = parser.parse_args()
    print(json.dumps({"cores": os.cpu_count(), "machine": platform.processor() or platform.machine()}))
    os.environ |= {"OMNIVIDEO_MAX_QUEUED_JOBS": "100000", "OMNIVIDEO_MAX_OPEN_JOBS_PER_KEY": "100000"}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        workers = 0 if arguments.what in ("submits", "followers") else 2
        cluster = ServiceCluster(Path(folder), arguments.weights, stack, workers, frequent_saves=False)
        match arguments.what:
            case "followers":
                asyncio.run(measure_followers(cluster, arguments))
            case _:
                measurements = {
                    "submits": measure_submits, "cancels": measure_cancels, "throughput": measure_throughput,
                    "memory": measure_memory,
                }  # fmt: skip
                measurements[arguments.what](cluster, arguments)


if __name__ == "__main__":
    main()
