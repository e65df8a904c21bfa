"""An open loop of submits, as a process of its own: what it measures is the service, so it costs next to nothing.

python -m benchmarks.load HOST PORT KEY RATE SECONDS    prints {"seconds": ..., "spent": [...], "wrong": [...]}

Requests leave at their times, whether or not the earlier ones have come back; a connection serves one at a time.
"""

import asyncio
import json
import sys
import time

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def answered(connection: Connection, request: bytes) -> tuple[int, bytes]:
    """Status and body of a request over a connection that is kept."""
    reader, writer = connection
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    return int(head.split(b" ", 2)[1]), await reader.readexactly(int(length.partition(b":")[2]))


async def load(host: str, port: int, key: str, rate: float, seconds: float) -> dict[str, object]:
    free: list[Connection] = []
    spent: list[float] = []
    wrong: list[str] = []

    async def one(at: int, due: float) -> None:
        body = json.dumps({"prompt": "a red ball", "seed": at}).encode()
        head = f"POST /v1/videos HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\nContent-Length: {len(body)}"
        request = f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + body
        try:
            connection = free.pop() if free else await asyncio.open_connection(host, port)
            status, answer = await asyncio.wait_for(answered(connection, request), 60)
        except (OSError, EOFError, TimeoutError) as error:
            wrong.append(repr(error))
            return
        free.append(connection)
        spent.append(time.perf_counter() - due)
        if status != 200:
            wrong.append(answer[:100].decode())

    began, tasks = time.perf_counter(), []
    for at in range(int(rate * seconds)):
        due = began + at / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(at, due)))
    await asyncio.gather(*tasks)
    return {"seconds": time.perf_counter() - began, "spent": spent, "wrong": wrong}


if __name__ == "__main__":
    told = sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4]), float(sys.argv[5])
    print(json.dumps(asyncio.run(load(*told))))
