"""The client of the HTTP service, with the methods of Studio: threads, clips, edits, questions and batches.

Each method is that of `AsyncClient`, which runs in an event loop of the client: there is one implementation.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import Any, TypeVar, Unpack, cast

from omnivideo.contracts import Artifact, Route
from omnivideo.sdk.async_client import AsyncClient
from omnivideo.sdk.async_thread import AsyncThread
from omnivideo.sdk.batch import BatchOutcome
from omnivideo.sdk.options import (
    GenerationOptions,
    SamplingOptions,
    Source,
    StepCallback,
    TextCallback,
    ignore_text,
)
from omnivideo.sdk.result import Result
from omnivideo.turns import QuestionAsked, Think, Turn, TurnCompleted, TurnEvent

POLL_SECONDS = 0.2  # of a wait for a call's end
CANCEL_TIMEOUT_SECONDS = 10.0  # how long an interrupted call waits until it has cleaned up
Value = TypeVar("Value")
END = object()


class EventLoopThread:
    """Runs coroutines in an event loop of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True, name="omnivideo-client")
        self.thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Value]) -> Value:
        """Return the coroutine's result. Ctrl-C cancels it, and waits until it has cleaned up."""
        has_ended = threading.Event()

        async def run_to_end() -> Value:
            try:
                return await coroutine
            finally:
                has_ended.set()

        future = asyncio.run_coroutine_threadsafe(run_to_end(), self.loop)
        try:
            while not future.done():
                wait([future], POLL_SECONDS)  # Python handles a Ctrl-C only between two waits
            return future.result()
        except BaseException:
            if future.cancel():
                has_ended.wait(CANCEL_TIMEOUT_SECONDS)
            raise

    def iterate(self, items: AsyncIterator[Value]) -> Iterator[Value]:
        """Yield the items of an asynchronous iterator, and close it when the loop over them is left."""

        async def receive() -> Value | object:
            return await anext(items, END)

        async def close() -> None:
            if (aclose := getattr(items, "aclose", None)) is not None:
                await aclose()

        try:
            while (item := self.run(receive())) is not END:
                yield cast(Value, item)
        finally:
            if not self.loop.is_closed():
                self.run(close())

    def close(self, close_last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Cancel the calls that still run, await `close_last`, and stop the loop."""

        async def close() -> None:
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.loop.shutdown_asyncgens()
            await close_last()

        if self.loop.is_closed():
            return
        self.run(close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


class Client:
    """The client of the service at `address`. `timeout` is in seconds.

    All methods raise an OmniVideoError if the service refuses a request or cannot be reached. Ctrl-C, and leaving the
    loop over a turn's events, cancel the work on the service.
    """

    def __init__(self, address: str = "http://127.0.0.1:8000", api_key: str | None = None, timeout: float = 60.0):
        self.remote = AsyncClient(address, api_key, timeout)
        self.event_loop = EventLoopThread()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; the calls that still run in other threads are cancelled."""
        self.event_loop.close(self.remote.close)

    def open_thread(self, thread_id: str | None = None, create: bool = False) -> "ClientThread":
        """Return a new thread, or the thread with the given id, which is created if `create` is set.

        Raises InvalidInput if it does not exist.
        """
        return ClientThread(self.event_loop, self.event_loop.run(self.remote.open_thread(thread_id, create)))

    def batch(self, prompts: Iterable[str | dict[str, Any]], folder: str | Path) -> Iterator[BatchOutcome]:
        """Generate each prompt into the folder, with a line in its results.jsonl; skip what an earlier run did.

        It runs as batches of the service, which are cancelled with the call.
        """
        yield from self.event_loop.iterate(self.remote.batch(prompts, folder))

    def route(self, prompt: str, source: Source | None = None) -> Route:
        """Return what the model would answer the request with: text, an image or a video, with its probability."""
        return self.event_loop.run(self.remote.route(prompt, source))

    def generate(
        self,
        prompt: str,
        *,
        image: bool | None = None,
        width: int | None = None,
        height: int | None = None,
        frames: int | None = None,
        fps: float | None = None,
        seconds: float | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        flow_shift: float | None = None,
        negative_prompt: str | None = None,
        seed: int = 0,
        progress: bool | None = None,
        on_step: StepCallback | None = None,
    ) -> Result:
        """Generate an image if `image` is True, a clip if it is False; by default the model decides.

        What is None comes from the preset; a seed of -1 is any seed. In a terminal or a notebook a progress bar is
        shown unless `progress` is False. Raises an InvalidInput that names the option.
        """
        call = self.remote.generate(
            prompt, image=image, width=width, height=height, frames=frames, fps=fps, seconds=seconds, steps=steps,
            guidance_scale=guidance_scale, flow_shift=flow_shift, negative_prompt=negative_prompt, seed=seed,
            progress=progress, on_step=on_step,
        )  # fmt: skip
        return self.event_loop.run(call)

    def generate_many(self, prompt: str, n: int, **options: Unpack[GenerationOptions]) -> list[Result]:
        """Generate `n` results with consecutive seeds, with the options of `generate`."""
        return self.event_loop.run(self.remote.generate_many(prompt, n, **options))

    def edit(
        self,
        source: Source,
        instruction: str,
        *,
        width: int | None = None,
        height: int | None = None,
        frames: int | None = None,
        fps: float | None = None,
        seconds: float | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        flow_shift: float | None = None,
        negative_prompt: str | None = None,
        seed: int = 0,
        progress: bool | None = None,
        on_step: StepCallback | None = None,
    ) -> Result:
        """Edit a source as the instruction says. An image is edited to an image, a clip to a clip of its length.

        The source is a path, a PIL image, an array or a result. The options are those of `generate`.
        """
        call = self.remote.edit(
            source, instruction, width=width, height=height, frames=frames, fps=fps, seconds=seconds, steps=steps,
            guidance_scale=guidance_scale, flow_shift=flow_shift, negative_prompt=negative_prompt, seed=seed,
            progress=progress, on_step=on_step,
        )  # fmt: skip
        return self.event_loop.run(call)

    def edit_many(self, source: Source, instruction: str, n: int, **options: Unpack[SamplingOptions]) -> list[Result]:
        """Edit a source `n` times with consecutive seeds, with the options of `edit`."""
        return self.event_loop.run(self.remote.edit_many(source, instruction, n, **options))

    def animate(
        self,
        source: Source,
        prompt: str,
        *,
        last_image: Source | None = None,
        width: int | None = None,
        height: int | None = None,
        frames: int | None = None,
        fps: float | None = None,
        seconds: float | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        flow_shift: float | None = None,
        negative_prompt: str | None = None,
        seed: int = 0,
        progress: bool | None = None,
        on_step: StepCallback | None = None,
    ) -> Result:
        """Generate a clip that begins with a picture, and with `last_image` also ends with one.

        Pictures are a path, a PIL image, an array or a result. The options are those of `generate`. Raises an
        InvalidInput if the preset's weights cannot do it.
        """
        call = self.remote.animate(
            source, prompt, last_image=last_image, width=width, height=height, frames=frames, fps=fps, seconds=seconds,
            steps=steps, guidance_scale=guidance_scale, flow_shift=flow_shift, negative_prompt=negative_prompt,
            seed=seed, progress=progress, on_step=on_step,
        )  # fmt: skip
        return self.event_loop.run(call)

    def extend(
        self,
        source: Source,
        prompt: str,
        *,
        frames: int | None = None,
        seconds: float | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        flow_shift: float | None = None,
        negative_prompt: str | None = None,
        seed: int = 0,
        progress: bool | None = None,
        on_step: StepCallback | None = None,
    ) -> Result:
        """Continue a clip as the prompt says, and return it with what follows.

        `frames` or `seconds` are added, at the clip's size and frame rate; by default what the model adds in one pass.
        The other options are those of `generate`. Raises an InvalidInput if the preset's weights cannot do it.
        """
        call = self.remote.extend(
            source, prompt, frames=frames, seconds=seconds, steps=steps, guidance_scale=guidance_scale,
            flow_shift=flow_shift, negative_prompt=negative_prompt, seed=seed, progress=progress, on_step=on_step,
        )  # fmt: skip
        return self.event_loop.run(call)

    def understand(
        self,
        source: Source,
        question: str,
        *,
        on_text: TextCallback = ignore_text,
        temperature: float = 0.2,
        top_p: float = 0.6,
        seed: int = 0,
    ) -> str:
        """Answer a question about an image or a clip; call `on_text` with each new piece of the answer."""
        call = self.remote.understand(
            source, question, on_text=on_text, temperature=temperature, top_p=top_p, seed=seed
        )
        return self.event_loop.run(call)


class ClientThread:
    """A thread of a service, with the methods of a Studio's thread.

    Leaving the loop over a turn's events cancels the turn.
    """

    def __init__(self, event_loop: EventLoopThread, remote: AsyncThread):
        self.event_loop = event_loop
        self.remote = remote
        self.id = remote.id

    def send(
        self,
        text: str,
        attachments: Sequence[Source | Artifact] = (),
        *,
        think: Think = "auto",
        check: int = 1,
        seed: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Iterator[TurnEvent]:
        """Run a turn and yield its events as they happen; the last one is TurnCompleted or QuestionAsked.

        A lost connection is resumed without a lost event. The text sent after a QuestionAsked is the reply. Raises an
        InvalidInput that names the option, and JobFailed if the turn fails, which leaves the thread as it was.
        """
        events = self.remote.send(
            text, attachments, think=think, check=check, seed=seed, steps=steps, guidance_scale=guidance_scale
        )
        yield from self.event_loop.iterate(events)

    def fork(self, turn: int, name: str | None = None) -> "ClientThread":
        """Return a new thread that starts with the first `turn` turns of this one."""
        return ClientThread(self.event_loop, self.event_loop.run(self.remote.fork(turn, name)))

    def get_turns(self) -> list[Turn]:
        return self.event_loop.run(self.remote.get_turns())

    def get_artifacts(self) -> list[Artifact]:
        """Return every attached or generated artifact, in order."""
        return self.event_loop.run(self.remote.get_artifacts())

    def get_open_question(self) -> str | None:
        """Return the question that waits for a reply, or None."""
        return self.event_loop.run(self.remote.get_open_question())

    def get_lineage(self, key: str | None = None) -> list[Artifact]:
        """Return an artifact, by default the last one, and the artifacts that it was edited from, newest first."""
        return self.event_loop.run(self.remote.get_lineage(key))

    def fetch_artifact(self, artifact: Artifact) -> Result:
        """Return an artifact of this thread."""
        return self.event_loop.run(self.remote.fetch_artifact(artifact))


__all__ = ["Client", "ClientThread", "QuestionAsked", "TurnCompleted"]
