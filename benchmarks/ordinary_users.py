"""Ten ordinary users of a service, in a process of their own, for benchmarks/hostile.py.

python -m benchmarks.ordinary_users ADDRESS SECONDS KEY...    prints "ready", waits for a line, and prints a UsersReport

Each user sends a request every INTERVAL_SECONDS, on schedule even if earlier ones are not answered (an open loop).
Latencies count from the scheduled time, so a request that is sent late because this process was not scheduled counts
in full. How late a timer of this process fires is measured beside them: that part of a latency is the machine's.
"""

import asyncio
import json
import random
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

INTERVAL_SECONDS, HEALTH_INTERVAL_SECONDS, TIMER_SECONDS = 0.5, 0.1, 0.02
TIMEOUT_SECONDS = 60.0
TURN_SECONDS = 10.0  # after the phase, for the last turn; its time is then a lower bound
CLIP_ROUNDS = 5  # of requests, of which one asks for a clip: together the users ask for one every two seconds
CLIP = {"prompt": "a red ball", "num_inference_steps": 1, "size": "32x32", "num_frames": 5}


@dataclass
class UsersReport:
    """Latencies in s by kind of request, answers that refuse with Retry-After, other errors, and late timers in s.

    The kinds are "health", "ordinary" (the database answers), "store" (the object store must answer) and "turn".
    """

    latencies: dict[str, list[float]] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    timer_delays: list[float] = field(default_factory=list)


class OrdinaryUser:
    """A user who looks at lists, asks for clips, uploads and downloads small files, and talks."""

    def __init__(self, client: httpx.AsyncClient, key: str, report: UsersReport):
        self.client, self.report = client, report
        self.headers = {"Authorization": f"Bearer {key}"}
        self.video_id = self.file_id = self.thread_id = ""

    async def send(self, kind: str, method: str, path: str, due: float, **options: Any) -> dict[str, Any]:
        """Send a request and record its latency; return its JSON, or nothing if it was refused or failed."""
        try:
            response = await self.client.request(method, path, headers=self.headers, **options)
        except httpx.HTTPError as error:
            self.report.errors.append(f"{method} {path.split('/')[2]}: {type(error).__name__}")
            self.report.latencies.setdefault(kind, []).append(time.perf_counter() - due)
            return {}
        self.report.latencies.setdefault(kind, []).append(time.perf_counter() - due)
        if response.status_code in (429, 503) and "retry-after" in response.headers:
            self.report.refused[kind] = self.report.refused.get(kind, 0) + 1
        elif response.status_code >= 400:
            self.report.errors.append(f"{method} {path}: {response.status_code} {response.text[:120]}")
        elif "json" in response.headers["content-type"]:
            return dict(response.json())
        return {}

    async def prepare(self) -> None:
        """Create what later requests read."""
        now = time.perf_counter()
        self.video_id = (await self.send("prepare", "POST", "/v1/videos", now, json=CLIP)).get("id", "")
        self.thread_id = (await self.send("prepare", "POST", "/v1/threads", now)).get("id", "")
        self.file_id = (await self.upload("prepare", now)).get("id", "")

    async def upload(self, kind: str, due: float) -> dict[str, Any]:
        data, files = {"purpose": "user_data"}, {"file": ("notes.txt", b"some words " * 100)}
        return await self.send(kind, "POST", "/v1/files", due, data=data, files=files)

    async def act(self, number: int, due: float) -> None:
        """Send the request of this number; eight kinds follow one another."""
        match number % 8:
            case 0:
                await self.send("ordinary", "GET", "/v1/videos?limit=10", due)
            case 1:
                await self.send("ordinary", "POST", "/v1/threads", due)
            case 2:
                await self.send("ordinary", "GET", f"/v1/threads/{self.thread_id}", due)
            case 3 if number % (8 * CLIP_ROUNDS) == 3:
                body = CLIP | {"seed": random.randrange(2**31)}
                self.video_id = (await self.send("ordinary", "POST", "/v1/videos", due, json=body)).get(
                    "id", self.video_id
                )
            case 3 | 4:
                await self.send("ordinary", "GET", f"/v1/videos/{self.video_id}", due)
            case 5:
                await self.send("ordinary", "GET", "/v1/files", due)
            case 6:
                await self.upload("store", due)
            case 7:
                await self.send("store", "GET", f"/v1/files/{self.file_id}/content", due)

    async def send_on_schedule(self, seconds: float, offset: float) -> None:
        start, tasks = time.perf_counter() + offset, []
        for number in range(int((seconds - offset) / INTERVAL_SECONDS)):
            due = start + number * INTERVAL_SECONDS
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(self.act(number + int(offset * 100), due)))
        await asyncio.gather(*tasks)

    async def talk(self, seconds: float) -> None:
        """Ask for one picture after another, and measure the time of each turn."""
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            due = time.perf_counter()
            thread = await self.send("prepare", "POST", "/v1/threads", due)
            body = {"text": "a picture of a red circle", "steps": 1}
            path = f"/v1/threads/{thread.get('id')}/turns"
            turn = await self.send("prepare", "POST", path, due, json=body) if thread else {}
            while turn.get("state") in ("queued", "running") and time.perf_counter() < end + TURN_SECONDS:
                await asyncio.sleep(0.1)
                turn = await self.send("prepare", "GET", f"{path}/{turn['id']}", time.perf_counter())
            self.report.latencies.setdefault("turn", []).append(time.perf_counter() - due)
            if turn.get("state") not in (None, "queued", "running", "done"):
                self.report.errors.append(f"a turn ended as {turn['state']}: {turn.get('error')}")
            await asyncio.sleep(0.5)


async def poll_health(user: OrdinaryUser, seconds: float) -> None:
    """Ask for /health on schedule; every request has a connection of its own, as those of a load balancer."""
    start, tasks = time.perf_counter(), []
    for number in range(int(seconds / HEALTH_INTERVAL_SECONDS)):
        due = start + number * HEALTH_INTERVAL_SECONDS
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(user.send("health", "GET", "/health", due, extensions={})))
    await asyncio.gather(*tasks)


async def measure_timers(report: UsersReport) -> None:
    while True:
        due = time.perf_counter() + TIMER_SECONDS
        await asyncio.sleep(TIMER_SECONDS)
        report.timer_delays.append(max(0.0, time.perf_counter() - due))


async def run_users(address: str, seconds: float, keys: list[str]) -> UsersReport:
    """Let the users send requests for some seconds, and wait for the last answers."""
    report = UsersReport()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=address, limits=limits, trust_env=False, timeout=TIMEOUT_SECONDS) as client:
        users = [OrdinaryUser(client, key, report) for key in keys]
        await asyncio.gather(*(user.prepare() for user in users))
        if report.errors:
            sys.exit(report.errors[0])
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        timers = asyncio.create_task(measure_timers(report))
        await asyncio.gather(
            poll_health(users[0], seconds),
            users[0].talk(seconds),
            *(
                user.send_on_schedule(seconds, index * INTERVAL_SECONDS / len(users))
                for index, user in enumerate(users)
            ),
        )
        timers.cancel()
        with suppress(asyncio.CancelledError):
            await timers
    report.latencies.pop("prepare", None)
    return report


if __name__ == "__main__":
    address, seconds, *keys = sys.argv[1:]
    print(json.dumps(asdict(asyncio.run(run_users(address, float(seconds), keys)))))
