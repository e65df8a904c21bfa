"""The service in figures: submits under load, followers, cancels, and a batch beside the same clips drawn in a loop.

python -m benchmarks.service submits|followers|cancels|throughput|memory [--weights FOLDER] [--seconds 60] ...

Real PostgreSQL, Redis and S3 server, the API and the workers as processes of their own.
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

from benchmarks.faults import KEY, Plant
from omnivideo.contracts import Job, resolve_sampling_params
from omnivideo.presets import TINY


def quantiles(values: list[float]) -> str:
    ranked = sorted(values)
    at = lambda share: ranked[min(len(ranked) - 1, int(share * len(ranked)))]  # noqa: E731
    return f"p50 {1000 * at(0.5):.1f} ms, p99 {1000 * at(0.99):.1f} ms, most {1000 * ranked[-1]:.1f} ms"


# ---------------------------------------------------------------- submits


def submits(plant: Plant, given: argparse.Namespace) -> None:
    """An open loop (benchmarks/load.py) against the API alone: nothing is drawn meanwhile."""
    where = httpx.URL(plant.address)
    command = ["-m", "benchmarks.load", where.host, where.port, KEY, given.rate, given.seconds]
    before = processor(plant.api.process.pid)
    told = json.loads(subprocess.check_output([sys.executable, *map(str, command)]))
    spent, whole = told["spent"], told["seconds"]
    each = 1000 * (processor(plant.api.process.pid) - before) / max(1, len(spent))
    print(f"{len(spent)} submits in {whole:.1f} s ({len(spent) / whole:.0f} a second), {quantiles(spent)}, "
          f"errors {len(told['wrong'])}; {each:.1f} ms of the API's processor time each")  # fmt: skip
    print(*told["wrong"][:3], sep="\n")


def processor(process: int) -> float:
    """Seconds of processor time that it has had."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ---------------------------------------------------------------- followers


async def followers(plant: Plant, given: argparse.Namespace) -> None:
    """Many event streams over one turn's events while it runs: the delay from the first follower's sight of an event
    to the last one's."""
    headers = {"Authorization": f"Bearer {KEY}"}
    limits = httpx.Limits(max_connections=None)
    seen: dict[int, list[float]] = {}
    refused: list[str] = []
    async with httpx.AsyncClient(
        base_url=plant.address, headers=headers, limits=limits, trust_env=False, timeout=120
    ) as client:
        turns = plant.rooms.build_service_context().turns
        thread = (await client.post("/v1/threads")).json()["id"]
        row = turns.create_turn(
            "turn_followed", thread, "admin", 1, {"text": "", "attachments": [], "options": {}, "is_reply": False}
        )
        row = turns.claim_turn(row.id)

        async def follow() -> int:
            count = 0
            async with client.stream("GET", f"/v1/threads/{thread}/turns/{row.id}/events") as stream:
                if stream.status_code != 200:
                    refused.append((await stream.aread()).decode()[:200])
                async for line in stream.aiter_lines():
                    if line.startswith("id: "):
                        seen.setdefault(int(line[4:]), []).append(time.perf_counter())
                        count += 1
            return count

        began = time.perf_counter()
        waiting = [asyncio.create_task(follow()) for _ in range(given.followers)]
        for _ in range(max(1, min(40, given.followers // 25))):  # a silent turn would be taken over
            await asyncio.to_thread(turns.heartbeat, row)
            await asyncio.sleep(0.5)
        for number in range(1, given.events + 1):
            event = {"kind": "step", "step": number, "steps": given.events, "eta_seconds": 0.0}
            await asyncio.to_thread(turns.append_event, row, event)
            await asyncio.to_thread(turns.heartbeat, row)
            await asyncio.sleep(0.2)
        await asyncio.to_thread(turns.end_turn, row, "cancelled")
        counts = await asyncio.gather(*waiting)
    print(*refused[:3], sep="\n")
    late = [max(times) - min(times) for times in seen.values()]
    whole = sum(count == given.events for count in counts)
    print(f"{whole} of {given.followers} followers saw all of {given.events} events, first to last {quantiles(late)}, "
          f"{time.perf_counter() - began:.1f} s in all, API {resident(plant.api.process.pid):.0f} MB")  # fmt: skip


# ---------------------------------------------------------------- cancels


def cancels(plant: Plant, given: argparse.Namespace) -> None:
    """From the request over HTTP to the row that says cancelled, beside the job's own time a step."""
    late, steps = [], []
    for at in range(given.runs):
        body = {"prompt": "a red ball", "seed": at, "num_inference_steps": 200}
        name = plant.http.post("/v1/videos", json=body).json()["id"]
        first = watched(plant, name, 3)
        begun = time.perf_counter()
        last = watched(plant, name, 23)
        each = (time.perf_counter() - begun) / max(1, last - first)
        begun = time.perf_counter()
        plant.http.post(f"/v1/videos/{name}/cancel")
        while plant.rooms.jobs.get_status(name).state == "running":
            time.sleep(0.001)
        late.append(time.perf_counter() - begun)
        steps.append(each)
    over = max(one - each for one, each in zip(late, steps, strict=True))
    print(f"{given.runs} cancels: {quantiles(late)}; a step takes {1000 * statistics.median(steps):.1f} ms; "
          f"most above one step: {1000 * over:.1f} ms")  # fmt: skip


def watched(plant: Plant, name: str, step: int) -> int:
    while (status := plant.rooms.jobs.get_status(name)).step < step:
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
began = time.perf_counter()
for at in range(first, first + count):
    params = resolve_sampling_params(studio.omni.preset, "text-to-video", seed=at, steps=steps)
    for event in generate_clip(studio.omni, f"a red ball {at}", params):
        if isinstance(event, GeneratedClip):
            encode_clip(event.frames, params.fps)
print(time.perf_counter() - began, flush=True)
"""


def looped(plant: Plant, given: argparse.Namespace) -> float:
    """Seconds that two processes take for the same clips, each in a plain loop."""
    half = given.prompts // 2
    command = [sys.executable, "-c", LOOP, given.weights]
    processes = [
        subprocess.Popen([*command, str(at * half), str(half), str(given.steps)], env=plant.environment,
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for at in range(2)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    return max(float(process.communicate()[0]) for process in processes)


def throughput(plant: Plant, given: argparse.Namespace) -> None:
    """The batch lane against the loop; `--kill` has one worker killed midway (and then no ratio is told)."""
    jobs = plant.rooms.jobs
    for at in range(given.prompts):
        made = Job(
            id=f"line-{at}", prompt=f"a red ball {at}", visual_tokens=None, source=None,
            params=resolve_sampling_params(TINY, "text-to-video", seed=at, steps=given.steps),
        )  # fmt: skip
        jobs.submit(made, "admin", "batch")
    began = time.perf_counter()
    for _ in plant.workers:
        plant.rooms.notify_workers()
    killed = False
    while jobs.count_queued() or any(state == "running" for _, state, _ in jobs.count_by_lane_and_state()):
        done = sum(count for _, state, count in jobs.count_by_lane_and_state() if state == "done")
        if given.kill and not killed and done > given.prompts // 2:
            os.killpg(plant.workers[0].process.pid, signal.SIGKILL)
            plant.workers[0].process.wait()
            plant.workers[0].start()
            killed = True
        time.sleep(0.5)
    ours = time.perf_counter() - began
    ends = jobs.list_statuses([f"line-{at}" for at in range(given.prompts)])
    done = sum(one.state == "done" for one in ends)
    keys = {one.result.key for one in ends if one.result}
    again = sum(one.attempt - 1 for one in ends)
    print(f"{done} of {given.prompts} done, {len(keys)} different clips, {again} taken over")
    print(f"{ours:.1f} s, {given.prompts / ours:.2f} clips a second")
    if not given.kill:
        for worker in plant.workers:
            worker.kill()
        raw = looped(plant, given)
        print(f"the same in a loop: {raw:.1f} s, {given.prompts / raw:.2f} clips a second; ratio {raw / ours:.3f}")


# ---------------------------------------------------------------- memory


def resident(process: int) -> float:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory(plant: Plant, given: argparse.Namespace) -> None:
    plant.ended([plant.submit(seed) for seed in range(10)])
    children = Path(f"/proc/{plant.workers[0].process.pid}/task/{plant.workers[0].process.pid}/children")
    child = int(children.read_text().split()[-1])
    print(f"API {resident(plant.api.process.pid):.0f} MB; worker {resident(plant.workers[0].process.pid):.0f} MB, "
          f"its child with the model {resident(child):.0f} MB, after 10 clips")  # fmt: skip
    for program, name in ((plant.api, "API"), (plant.workers[0], "worker")):
        program.kill()
        began = time.perf_counter()
        program.start()
        if name == "worker":
            plant.ended([plant.submit(99)])
        print(
            f"{name}: {time.perf_counter() - began:.1f} s from start to "
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
    given = parser.parse_args()
    print(json.dumps({"cores": os.cpu_count(), "machine": platform.processor() or platform.machine()}))
    os.environ |= {"OMNIVIDEO_MAX_QUEUED_JOBS": "100000", "OMNIVIDEO_MAX_OPEN_JOBS_PER_KEY": "100000"}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        workers = 0 if given.what in ("submits", "followers") else 2
        plant = Plant(Path(folder), given.weights, stack, workers, hurried=False)
        match given.what:
            case "followers":
                asyncio.run(followers(plant, given))
            case _:
                ways = {"submits": submits, "cancels": cancels, "throughput": throughput, "memory": memory}
                ways[given.what](plant, given)


if __name__ == "__main__":
    main()
