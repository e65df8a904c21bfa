"""The client of the HTTP service for an event loop."""

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from omnivideo.sdk.batch import BatchOutcome
from omnivideo.sdk.client import Client, RemoteResult, RemoteThread, Value
from omnivideo.turns import TurnEvent

MAX_CONCURRENT_CALLS = 8


class AsyncClient:
    """`Client` for an event loop: `await client.generate(...)`, `async for event in client.send(thread, ...)`.

    It runs the calls of a `Client` in threads, so that there is one implementation. It takes the same arguments.
    """

    def __init__(self, address: str = "http://127.0.0.1:8000", api_key: str | None = None, timeout: float = 60.0):
        self.client = Client(address, api_key, timeout)
        self.executor = ThreadPoolExecutor(MAX_CONCURRENT_CALLS, thread_name_prefix="omnivideo")

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.executor.shutdown(wait=False)
        self.client.close()

    async def run_in_thread(self, call: Callable[..., Value], *args: Any, **kwargs: Any) -> Value:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.executor, functools.partial(call, *args, **kwargs))

    async def iterate_in_thread(self, iterator: Iterator[Value]) -> AsyncIterator[Value]:
        exhausted = object()
        while (item := await self.run_in_thread(next, iterator, exhausted)) is not exhausted:
            yield item

    async def open_thread(self, thread_id: str | None = None, create: bool = False) -> RemoteThread:
        return await self.run_in_thread(self.client.open_thread, thread_id, create)

    async def generate(self, prompt: str, **overrides: Any) -> RemoteResult:
        return await self.run_in_thread(self.client.generate, prompt, **overrides)

    async def edit(self, source: str | Path, instruction: str, **overrides: Any) -> RemoteResult:
        return await self.run_in_thread(self.client.edit, source, instruction, **overrides)

    async def understand(self, source: str | Path, question: str, **options: Any) -> str:
        return await self.run_in_thread(self.client.understand, source, question, **options)

    def send(self, thread: RemoteThread, text: str, *args: Any, **options: Any) -> AsyncIterator[TurnEvent]:
        return self.iterate_in_thread(thread.send(text, *args, **options))

    def batch(self, prompts: Iterable[str | dict[str, Any]], folder: str | Path) -> AsyncIterator[BatchOutcome]:
        return self.iterate_in_thread(self.client.batch(prompts, folder))
