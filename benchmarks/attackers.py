"""The clients of benchmarks/hostile.py that attack a service, in a process of their own with low priority.

python -m benchmarks.attackers ATTACK ADDRESS KEY MEDIA_FILE     runs until it is terminated

Real attackers have machines of their own, so these may only use what the service and its users leave of this one.
"""

import asyncio
import itertools
import json
import os
import resource
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import httpx

HALF_OPEN_CONNECTIONS, SLOW_UPLOADS, DOWNLOADS, CLIENTS = 1500, 60, 60, 4
BODY_BYTES, PART_BYTES = 30 * 2**20, 64 * 2**10
TURN_CHARS, MESSAGE_CHARS = 4000, 60_000
BATCHES, BATCH_LINES, WEBHOOKS, BULK_JOBS = 9, 200, 20, 1000
HOSTILE_UNITS = (" ", "and ", ", ", "a-", "the ", "make it ", "<x", "or ", "put the ", "\n", "'", ".")


class Attacker:
    """Sends the requests of one attack; `key` belongs to the attacker, and `media` is slow to decode."""

    def __init__(self, address: str, key: str, media: Path):
        self.url, self.media = httpx.URL(address), media
        self.client = httpx.AsyncClient(
            base_url=address, headers={"Authorization": f"Bearer {key}"}, trust_env=False, timeout=60,
            limits=httpx.Limits(max_connections=None),
        )  # fmt: skip

    async def repeat(self, action: Callable[[int], Awaitable[object]], clients: int) -> None:
        """Let some clients repeat an action, each one after its own last."""

        async def run(client: int) -> None:
            for number in itertools.count(client, clients):
                with suppress(OSError, EOFError, httpx.HTTPError):
                    await action(number)
                await asyncio.sleep(0.05)

        await asyncio.gather(*(run(client) for client in range(clients)))

    async def send_texts(self) -> None:
        """Send turns and chats whose texts made patterns take quadratic or cubic time."""

        async def send(number: int) -> None:
            unit = HOSTILE_UNITS[number % len(HOSTILE_UNITS)]
            thread = (await self.client.post("/v1/threads")).json()
            text = "a" + (unit * TURN_CHARS)[: TURN_CHARS - 2] + "b"
            await self.client.post(f"/v1/threads/{thread['id']}/turns", json={"text": text, "steps": 1})
            tags = "".join(f"<a{index}>" for index in range(MESSAGE_CHARS // 8))
            await self.client.post(
                "/v1/chat/completions", json={"model": "tiny", "messages": [{"role": "user", "content": tags}]}
            )

        await self.repeat(send, CLIENTS)

    async def send_bodies(self) -> None:
        """Send 30 MB of nested arrays without a key."""
        body = b"[" * BODY_BYTES

        async def send(number: int) -> None:
            reader, writer = await asyncio.open_connection(self.url.host, self.url.port)
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
            try:
                for start in range(0, len(body), PART_BYTES):
                    writer.write(body[start : start + PART_BYTES])
                    await writer.drain()
                await asyncio.wait_for(reader.read(1000), 30)
            finally:
                writer.close()

        await self.repeat(send, CLIENTS)

    async def upload_slowly(self) -> None:
        """Keep 60 uploads going that take 3 s to send, and long to decode."""
        data = self.media.read_bytes()

        async def send_parts(form: bytes) -> AsyncIterator[bytes]:
            for start in range(0, len(form), max(1, len(form) // 6)):
                await asyncio.sleep(0.5)
                yield form[start : start + max(1, len(form) // 6)]

        async def send(number: int) -> None:
            head = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nuser_data\r\n--b\r\n'
            head += b'Content-Disposition: form-data; name="file"; filename="a.mp4"\r\n\r\n'
            # The bytes differ, so no result of another upload can be used.
            form = head + data + b"\0" * (number % 1000) + b"\r\n--b--\r\n"
            headers = {"Content-Type": "multipart/form-data; boundary=b"}
            await self.client.post("/v1/files", content=send_parts(form), headers=headers)

        await self.repeat(send, SLOW_UPLOADS)

    async def open_connections(self) -> None:
        """Keep 1,500 connections open on which half a request was sent."""

        async def send(number: int) -> None:
            reader, writer = await asyncio.open_connection(self.url.host, self.url.port)
            try:
                writer.write(b"GET /v1/videos HTTP/1.1\r\nHost: x\r\n")
                await reader.read(1)
            finally:
                writer.close()

        await self.repeat(send, HALF_OPEN_CONNECTIONS)

    async def download(self) -> None:
        """Keep 60 downloads going, each of which needs the store."""
        files = {"file": ("a.txt", b"text")}
        with suppress(httpx.HTTPError, KeyError):
            stored = (await self.client.post("/v1/files", data={"purpose": "user_data"}, files=files)).json()
            print("ready", flush=True)  # the store may hang from now on
            await self.repeat(lambda number: self.client.get(f"/v1/files/{stored['id']}/content"), DOWNLOADS)

    async def submit(self) -> None:
        """Submit clips, which notifies workers."""
        body = {"prompt": "a red ball", "num_inference_steps": 1, "size": "32x32", "num_frames": 5}
        await self.repeat(lambda number: self.client.post("/v1/videos", json=body | {"seed": number}), CLIENTS)

    async def send_bulk(self) -> None:
        """Create nine batches of chats and pictures, 20 webhooks that do not answer, and 1,000 clips."""
        server = await asyncio.start_server(lambda reader, writer: asyncio.sleep(3600), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        for number in range(WEBHOOKS):
            hook = {"url": f"http://127.0.0.1:{port}/{number}"}
            await self.client.post("/v1/webhooks", json=hook)
        for number in range(BATCHES):
            path, body = [
                (
                    "/v1/chat/completions",
                    {"model": "tiny", "messages": [{"role": "user", "content": "what can you do?"}]},
                ),
                ("/v1/images/generations", {"prompt": "a red ball", "num_inference_steps": 1, "n": 4}),
            ][number % 2]
            lines = [
                json.dumps({"custom_id": f"{number}-{line}", "method": "POST", "url": path, "body": body})
                for line in range(BATCH_LINES)
            ]
            files = {"file": ("lines.jsonl", "\n".join(lines).encode())}
            stored = (await self.client.post("/v1/files", data={"purpose": "batch"}, files=files)).json()
            batch = {"input_file_id": stored["id"], "endpoint": path, "completion_window": "24h"}
            response = await self.client.post("/v1/batches", json=batch)
            assert response.status_code == 200, response.text
        clip = {"prompt": "a red ball", "num_inference_steps": 1, "size": "32x32", "num_frames": 5}
        for seed in range(BULK_JOBS):
            await self.client.post("/v1/videos", json=clip | {"seed": seed})
        await asyncio.sleep(3600)


ATTACKS: dict[str, Callable[[Attacker], Awaitable[None]]] = {
    "hostile text": Attacker.send_texts,
    "30 MB bodies without a key": Attacker.send_bodies,
    "60 slow uploads": Attacker.upload_slowly,
    "1,500 half-open connections": Attacker.open_connections,
    "a hanging S3 server": Attacker.download,
    "a broker that is down": Attacker.submit,
    "a bulk owner": Attacker.send_bulk,
}


async def attack(name: str, address: str, key: str, media: Path) -> None:
    await ATTACKS[name](Attacker(address, key, media))


if __name__ == "__main__":
    os.nice(10)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    name, address, key, media = sys.argv[1:]
    with suppress(KeyboardInterrupt):
        asyncio.run(attack(name, address, key, Path(media)))
