"""Submit jobs at a constant rate, from a separate process that uses little CPU time.

python -m benchmarks.load HOST PORT KEY RATE SECONDS    prints {"seconds": ..., "latencies": [...], "errors": [...]}

Requests are sent on schedule (an open loop), even if earlier ones are not answered yet. A connection carries one at a
time.
"""

import asyncio
import json
import sys
import time

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def send_request(connection: Connection, request: bytes) -> tuple[int, bytes]:
    """Send a request over a persistent connection and return the status and body of the response."""
    reader, writer = connection
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    return int(head.split(b" ", 2)[1]), await reader.readexactly(int(length.partition(b":")[2]))


async def generate_load(host: str, port: int, key: str, rate: float, seconds: float) -> dict[str, object]:
    """Submit `rate` jobs per second and return the latencies, measured from the scheduled times, and the errors."""
    idle_connections: list[Connection] = []
    latencies: list[float] = []
    errors: list[str] = []

    async def submit(seed: int, due: float) -> None:
        body = json.dumps({"prompt": "a red ball", "seed": seed}).encode()
        head = f"POST /v1/videos HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\nContent-Length: {len(body)}"
        request = f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + body
        try:
            connection = idle_connections.pop() if idle_connections else await asyncio.open_connection(host, port)
            status, response = await asyncio.wait_for(send_request(connection, request), 60)
        except (OSError, EOFError, TimeoutError) as error:
            errors.append(repr(error))
            return
        idle_connections.append(connection)
        latencies.append(time.perf_counter() - due)
        if status != 200:
            errors.append(response[:100].decode())

    start, tasks = time.perf_counter(), []
    for seed in range(int(rate * seconds)):
        due = start + seed / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(submit(seed, due)))
    await asyncio.gather(*tasks)
    return {"seconds": time.perf_counter() - start, "latencies": latencies, "errors": errors}


if __name__ == "__main__":
    host, port, key, rate, seconds = sys.argv[1:]
    print(json.dumps(asyncio.run(generate_load(host, int(port), key, float(rate), float(seconds)))))
