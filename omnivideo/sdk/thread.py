"""A conversation of a Studio: the turn runs in a thread of the operating system, so that it can be cancelled."""

import asyncio
import queue
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path

from omnivideo.agent.thread import Thread
from omnivideo.contracts import Artifact
from omnivideo.errors import JobCancelled
from omnivideo.manifests import parse_manifest
from omnivideo.ports import ObjectStore
from omnivideo.sdk.options import Source, to_source_file
from omnivideo.sdk.result import Result
from omnivideo.turns import QuestionAsked, Think, TurnCompleted, TurnEvent

POLL_SECONDS = 0.2  # of a wait for the next event: Python handles a Ctrl-C only between two waits
Received = TurnEvent | BaseException | None


class StudioThread(Thread):
    """A thread with the methods of a service's: `client.ClientThread` and `async_client.AsyncThread`.

    A turn is cancelled by leaving its loop (`break`), by Ctrl-C, and by cancelling the task that iterates over
    `asend`. The thread is then as it was before the turn.
    """

    store: ObjectStore

    @classmethod
    def wrap(cls, thread: Thread, store: ObjectStore) -> "StudioThread":
        wrapped = cls(thread.graph, thread.id, thread.attach_file, thread.text_limits)
        wrapped.store = store
        return wrapped

    def fork(self, turn: int, name: str | None = None) -> "StudioThread":
        """Return a new thread that starts with the first `turn` turns of this one."""
        return self.wrap(super().fork(turn, name), self.store)

    def send(  # type: ignore[override]
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

        The text sent after a QuestionAsked is the reply. Raises an InvalidInput that names the option, and another
        error if the turn fails, which leaves the thread as it was.
        """
        options = {"think": think, "check": check, "seed": seed, "steps": steps, "guidance_scale": guidance_scale}
        turn = RunningTurn(self, text, attachments, options)
        try:
            while (event := turn.receive()) is not None:
                yield event
        finally:
            turn.cancel()

    async def asend(  # type: ignore[override]
        self,
        text: str,
        attachments: Sequence[Source | Artifact] = (),
        *,
        think: Think = "auto",
        check: int = 1,
        seed: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> AsyncIterator[TurnEvent]:
        """Run a turn as `send` does, from an event loop."""
        options = {"think": think, "check": check, "seed": seed, "steps": steps, "guidance_scale": guidance_scale}
        turn = RunningTurn(self, text, attachments, options)
        try:
            while (event := await asyncio.to_thread(turn.receive)) is not None:
                yield event
        finally:
            turn.request_cancel()
            await asyncio.shield(asyncio.to_thread(turn.cancel))

    def run_turn(
        self, text: str, attachments: Sequence[Source | Artifact], options: Mapping[str, object]
    ) -> Iterator[TurnEvent]:
        with tempfile.TemporaryDirectory() as folder:
            # Each has a folder of its own, since two arrays have the same name.
            folders = [Path(folder, str(index)) for index, _ in enumerate(attachments)]
            yield from super().send(text, [*map(store_source, attachments, folders)], **options)

    def fetch_artifact(self, artifact: Artifact) -> Result:
        """Return an artifact of this thread."""
        data, suffix = self.store.get(artifact.key), artifact.key.rpartition(".")[2]
        manifest = None if artifact.manifest is None else parse_manifest(self.store.get(artifact.manifest))
        return Result(manifest, data=data, suffix=suffix, fps=artifact.fps)


def store_source(source: Source | Artifact, folder: Path) -> str | Path | Artifact:
    """Return a source as an artifact or a path; the content of anything else is written into a new folder."""
    if isinstance(source, str | Path | Artifact):
        return source
    source_file = to_source_file(source, "attachments")
    folder.mkdir()
    path = folder / source_file.name
    path.write_bytes(source_file.read())
    return path


class RunningTurn:
    """A turn that runs in a thread of its own until it ends or is cancelled."""

    def __init__(
        self, thread: StudioThread, text: str, attachments: Sequence[Source | Artifact], options: Mapping[str, object]
    ):
        self.thread = thread
        self.arguments = (text, attachments, options)
        self.received: queue.SimpleQueue[Received] = queue.SimpleQueue()
        self.cancelled = threading.Event()
        self.runner = threading.Thread(target=self.run, daemon=True, name="turn")
        self.runner.start()

    def run(self) -> None:
        last: Received = None
        try:
            num_turns = self.thread.get_progress().num_turns
            events = self.thread.run_turn(*self.arguments)
            for event in events:
                is_last = isinstance(event, TurnCompleted | QuestionAsked)
                if self.cancelled.is_set() and not is_last:
                    self.thread.cancel()  # an earlier request may have preceded the turn
                    events.close()  # type: ignore[attr-defined]
                    if self.thread.has_unfinished_turn():
                        self.thread.roll_back(num_turns)
                    return
                self.received.put(event)
        except JobCancelled as error:
            last = None if self.cancelled.is_set() else error
        except BaseException as error:
            last = error
        finally:
            if last is not None:
                self.received.put(last)
            self.received.put(None)

    def receive(self) -> TurnEvent | None:
        """Return the next event, or None at the end. Raises the error of the turn."""
        while True:
            try:
                received = self.received.get(timeout=POLL_SECONDS)
                break
            except queue.Empty:
                continue
        if isinstance(received, BaseException):
            raise received
        return received

    def request_cancel(self) -> None:
        self.cancelled.set()
        self.thread.cancel()
        self.received.put(None)  # for a thread that still waits in `receive`

    def cancel(self) -> None:
        """Cancel the turn unless it has ended, and wait until the thread can take another one."""
        self.request_cancel()
        self.runner.join()
