"""The Studio's face over HTTP: threads, clips, edits, questions and batches of a service somewhere else.

`Client` is the implementation; `AsyncClient` runs its calls in threads of its own, so that there is one of each.
"""

import asyncio
import base64
import functools
import json
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
from pydantic import TypeAdapter

from omnivideo.batch import Item, Outcome, items
from omnivideo.contracts import Artifact, Event, Finished, Question, Step, Turn, check_prompt
from omnivideo.errors import Busy, InvalidInput, JobFailed, ModelAway, NotStored, OmniVideoError, StoreError

EVENT: TypeAdapter[Event] = TypeAdapter(Event)
TRIES = 5  # of a request; all are safe to repeat, for those that make something carry an idempotency key
LOOK = 0.1  # seconds between two looks at a clip, where the service does not say
WORDS = {"frames": "num_frames", "steps": "num_inference_steps"}
Value = TypeVar("Value")


@dataclass(frozen=True)
class RemoteResult:
    """A clip (mp4) or a still (png) as the service made it."""

    data: bytes
    suffix: str

    @property
    def frames(self) -> np.ndarray:
        """uint8 [F, H, W, 3]."""
        from omnivideo.backends.decoder.video import read_media

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"made.{self.suffix}"
            path.write_bytes(self.data)
            return read_media(path).frames

    def save(self, path: str | Path) -> Path:
        path = Path(path)
        if path.suffix.lower() != f".{self.suffix}":
            raise InvalidInput("output", f"it is a .{self.suffix}; name a file that ends so")
        try:
            path.write_bytes(self.data)
        except OSError as error:
            raise InvalidInput("output", f"{path.name} cannot be written: {error.strerror}") from None
        return path

    def _repr_html_(self) -> str:
        data = base64.b64encode(self.data).decode()
        if self.suffix == "png":
            return f'<img src="data:image/png;base64,{data}" width="256">'
        return f'<video src="data:video/mp4;base64,{data}" width="256" controls loop autoplay muted></video>'


class Client:
    """A service at `address`, with the API key that it asks for; what it refuses is raised as an OmniVideoError."""

    def __init__(self, address: str = "http://127.0.0.1:8000", key: str | None = None, timeout: float = 60.0):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=address, headers=headers, timeout=timeout)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.http.close()

    # ------------------------------------------------------------ conversations

    def thread(self, name: str | None = None, create: bool = False) -> "RemoteThread":
        """A conversation: a new one, or the one of that id (made if `create`)."""
        if name is not None:
            try:
                self.ask("GET", f"/v1/threads/{name}")
                return RemoteThread(self, name)
            except NotStored:
                if not create:
                    raise InvalidInput("thread", f"there is no thread {name!r}") from None
        made = self.ask("POST", "/v1/threads", json={} if name is None else {"id": name}).json()
        return RemoteThread(self, made["id"])

    # ------------------------------------------------------------ single clips

    def generate(
        self, prompt: str, *, image: bool = False, on_step: Callable[[Step], None] = lambda step: None, **given: Any
    ) -> RemoteResult:
        """A clip, or a still if `image`; `given` as for Studio.generate.  `on_step` hears of a clip's progress."""
        wanted = {"prompt": check_prompt("prompt", prompt)} | wire(given)
        if image or given.get("frames") == 1:
            wanted.pop("num_frames", None)
            return self.picture("/v1/images/generations", json=wanted)
        return self.clip(on_step, "/v1/videos", json=wanted)

    def edit(
        self, source: str | Path, instruction: str, *,
        on_step: Callable[[Step], None] = lambda step: None, **given: Any,
    ) -> RemoteResult:  # fmt: skip
        """The source changed as told; an image stays an image, a clip a clip."""
        wanted = {"prompt": check_prompt("instruction", instruction)} | wire(given)
        form = {name: str(value) for name, value in wanted.items()}
        name, data, still = self.read(source)
        if still:
            return self.picture("/v1/images/edits", data=form, files={"image": (name, data)})
        return self.clip(on_step, "/v1/videos/edits", data=form, files={"video": (name, data)})

    def understand(
        self, source: str | Path, question: str, *, on_text: Callable[[str], None] = lambda piece: None
    ) -> str:
        """The answer to a question about an image or a clip."""
        thread, said = self.thread(), []
        for event in thread.send(check_prompt("question", question), [source], think="off"):
            if event.kind == "text":
                said.append(event.piece)
                on_text(event.piece)
        return "".join(said).strip()

    def read(self, source: str | Path) -> tuple[str, bytes, bool]:
        """Name, bytes, and whether it is a still."""
        from omnivideo.backends.decoder.video import measure_media

        path = Path(source)
        return path.name, path.read_bytes(), measure_media(path).kind == "image"

    def picture(self, path: str, **body: Any) -> RemoteResult:
        body_json = {"json": body.pop("json") | {"response_format": "b64_json"}} if "json" in body else {}
        made = self.ask("POST", path, timeout=600.0, **body_json, **body).json()
        return RemoteResult(base64.b64decode(made["data"][0]["b64_json"]), "png")

    def clip(self, on_step: Callable[[Step], None], path: str, **body: Any) -> RemoteResult:
        video = self.ask("POST", path, **body).json()
        began, shown = time.monotonic(), -1
        while video["status"] in ("queued", "in_progress"):
            answer = self.ask("GET", f"/v1/videos/{video['id']}")
            video = answer.json()
            if (done := video["progress"]) != shown:
                shown, spent = done, time.monotonic() - began
                on_step(Step(step=done, steps=100, left=spent / done * (100 - done) if done else 0.0))
            if video["status"] in ("queued", "in_progress"):
                time.sleep(int(answer.headers.get("openai-poll-after-ms", 1000 * LOOK)) / 1000)
        if video["status"] != "completed":
            error = video.get("error") or {"code": "cancelled", "message": "the clip was cancelled"}
            raise JobFailed(error["code"], error["message"])
        return RemoteResult(self.ask("GET", f"/v1/videos/{video['id']}/content").content, "mp4")

    # ------------------------------------------------------------ many

    def batch(self, prompts: Iterable[str | dict[str, Any]], folder: str | Path) -> Iterator[Outcome]:
        """Draws each prompt on the service's batch lane into the folder, with results.jsonl; run again, it follows
        the batch that it began, and fetches what is not there yet."""
        from omnivideo.batch import RESULTS, finished

        wanted, folder = items(prompts), Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        done = finished(folder)
        left = [item for item in wanted if item.id not in done]
        yield from (Outcome(item.id, None, None) for item in wanted if item.id in done)
        if not left:
            return
        answers = self.batch_answers(left, folder)
        with (folder / RESULTS).open("a") as results:
            for item in left:
                outcome = self.fetched(item, answers[item.id], folder)
                results.write(json.dumps(vars(outcome) | {"prompt": item.prompt}) + "\n")
                results.flush()
                yield outcome

    def batch_answers(self, wanted: list[Item], folder: Path) -> dict[str, Any]:
        """The service's answer to each item.  The batch's id is kept, so that another call follows the same one."""
        kept = folder / ".batch.json"
        names = [item.id for item in wanted]
        known = json.loads(kept.read_text()) if kept.exists() else {}
        if known.get("items") != names:
            known = {"items": names, "id": self.begin_batch(wanted)}
            kept.write_text(json.dumps(known))
        while True:
            batch = self.ask("GET", f"/v1/batches/{known['id']}").json()
            if batch["status"] in ("completed", "failed", "expired", "cancelled"):
                break
            time.sleep(5 * LOOK)
        lines: dict[str, Any] = {}
        for name in ("output_file_id", "error_file_id"):
            if batch.get(name):
                text = self.ask("GET", f"/v1/files/{batch[name]}/content").text
                lines |= {(line := json.loads(raw))["custom_id"]: line for raw in text.splitlines()}
        return {name: lines.get(name, {"error": {"message": f"the batch is {batch['status']}"}}) for name in names}

    def begin_batch(self, wanted: list[Item]) -> str:
        lines = [json.dumps(line_of(item)) for item in wanted]
        file = ("batch.jsonl", "\n".join(lines).encode())
        made = self.ask("POST", "/v1/files", data={"purpose": "batch"}, files={"file": file}).json()
        body = {"input_file_id": made["id"], "endpoint": "/v1/videos", "completion_window": "24h"}
        return str(self.ask("POST", "/v1/batches", json=body).json()["id"])

    def fetched(self, item: Item, line: dict[str, Any], folder: Path) -> Outcome:
        error = line.get("error") or line["response"]["body"].get("error")
        if error:
            return Outcome(item.id, None, error["message"])
        name = f"{item.id}.mp4"
        video = line["response"]["body"]["id"]
        (folder / name).write_bytes(self.ask("GET", f"/v1/videos/{video}/content").content)
        return Outcome(item.id, name, None)

    # ------------------------------------------------------------ requests

    def ask(self, method: str, path: str, **given: Any) -> httpx.Response:
        """One request, tried again while the service is away or full.  Raises OmniVideoError."""
        headers = {"Idempotency-Key": uuid.uuid4().hex} if method == "POST" else {}
        error: OmniVideoError = StoreError("service: it cannot be reached; is it running, and is the address right?")
        for attempt in range(TRIES):
            pause = min(8.0, 0.25 * 2**attempt)
            try:
                answer = self.http.request(method, path, headers=headers, **given)
                if answer.status_code < 400:
                    return answer
                error = told(answer)
                if answer.status_code not in (429, 502, 503, 504):
                    raise error
                pause = float(answer.headers.get("Retry-After", pause))
            except httpx.TransportError:
                pass
            if attempt + 1 < TRIES:
                time.sleep(min(pause, 30.0))
        raise error


class RemoteThread:
    """One conversation of a service, with the face of agent.thread.Thread."""

    def __init__(self, client: Client, name: str):
        self.client = client
        self.id = name
        self.path = f"/v1/threads/{name}"

    def send(self, text: str, attachments: Sequence[str | Path] = (), **options: Any) -> Iterator[Event]:
        """Runs a turn and gives its events as they happen, through cut connections; the last is Finished or Question.

        `options` may hold think, check, seed, steps and guidance_scale.
        """
        parts = [{"file_id": self.upload(Path(path))} for path in attachments]
        body = {"text": text, "attachments": parts} | options
        turn = self.client.ask("POST", f"{self.path}/turns", json=body).json()["id"]
        yield from self.follow(turn)

    def upload(self, path: Path) -> str:
        try:
            file = (path.name, path.read_bytes())
        except OSError as error:
            raise InvalidInput("attachments", f"{path.name!r} cannot be read: {error.strerror}") from None
        made = self.client.ask("POST", "/v1/files", data={"purpose": "vision"}, files={"file": file})
        return str(made.json()["id"])

    def follow(self, turn: str) -> Iterator[Event]:
        """A turn's events from the first on; raises what ended it early."""
        last = 0
        for attempt in range(TRIES):
            try:
                for number, event in self.events(turn, last):
                    last = number
                    yield event
                break
            except httpx.TransportError:
                time.sleep(0.25 * 2**attempt)
        shown = self.client.ask("GET", f"{self.path}/turns/{turn}").json()
        if shown["state"] == "failed":
            raise JobFailed(shown["error"]["code"] or "failed", shown["error"]["message"])
        if shown["state"] == "cancelled":
            raise JobFailed("cancelled", "the turn was cancelled")

    def events(self, turn: str, after: int) -> Iterator[tuple[int, Event]]:
        headers, number, data = {"Last-Event-ID": str(after)}, after, ""
        with self.client.http.stream("GET", f"{self.path}/turns/{turn}/events", headers=headers) as answer:
            if answer.status_code >= 400:
                answer.read()
                raise told(answer)
            for line in answer.iter_lines():
                name, _, value = line.partition(": ")
                if name == "id":
                    number = int(value)
                elif name == "data":
                    data = value
                elif not line and data:
                    yield number, EVENT.validate_json(data)
                    data = ""

    def fork(self, turn: int, name: str | None = None) -> "RemoteThread":
        body = {"turn": turn} | ({"id": name} if name else {})
        return RemoteThread(self.client, self.client.ask("POST", f"{self.path}/forks", json=body).json()["id"])

    def whole(self) -> dict[str, Any]:
        found: dict[str, Any] = self.client.ask("GET", self.path).json()
        return found

    def history(self) -> list[Turn]:
        return [Turn(**one) for one in self.whole()["turns"]]

    def artifacts(self) -> list[Artifact]:
        return [Artifact(**one) for one in self.whole()["artifacts"]]

    def question(self) -> str | None:
        asked: str | None = self.whole()["question"]
        return asked

    def lineage(self, key: str | None = None) -> list[Artifact]:
        query = {"artifact": key} if key else {}
        return [Artifact(**one) for one in self.client.ask("GET", f"{self.path}/lineage", params=query).json()]

    def fetch(self, artifact: Artifact) -> RemoteResult:
        """An artifact's bytes."""
        answer = self.client.ask("GET", f"{self.path}/artifacts/{artifact.key}")
        return RemoteResult(answer.content, artifact.key.rpartition(".")[2])


def wire(given: dict[str, Any]) -> dict[str, Any]:
    """Settings in the wire's words."""
    width, height = given.pop("width", None), given.pop("height", None)
    named = {WORDS.get(name, name): value for name, value in given.items() if value is not None}
    return named | ({"size": f"{width}x{height}"} if width and height else {})


def line_of(item: Item) -> dict[str, Any]:
    given = item.model_dump(exclude={"id", "prompt", "image"})
    if item.image:
        raise InvalidInput(item.id, "a batch of the service draws clips; leave out image")
    body = {"prompt": item.prompt} | wire(given)
    return {"custom_id": item.id, "method": "POST", "url": "/v1/videos", "body": body}


def told(answer: httpx.Response) -> OmniVideoError:
    """The service's refusal as our own error."""
    try:
        error = answer.json()["error"]
        message, param = str(error["message"]), error.get("param")
    except (ValueError, KeyError, TypeError):
        return StoreError(f"service: it answers {answer.status_code}, and not as omnivideo does")
    match answer.status_code:
        case 404:
            return NotStored(message)
        case 429:
            return Busy(message, float(answer.headers.get("Retry-After", 1)))
        case 503:
            return ModelAway(message)
    if param:
        return InvalidInput(param, message.removeprefix(f"{param}: "))
    return JobFailed(error.get("code") or "failed", message)


class AsyncClient:
    """`Client` for an event loop: `await client.generate(...)`, `async for event in client.send(thread, ...)`."""

    def __init__(self, *args: Any, **given: Any):
        self.client = Client(*args, **given)
        self.pool = ThreadPoolExecutor(8, thread_name_prefix="omnivideo")

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.pool.shutdown(wait=False)
        self.client.close()

    async def run(self, call: Callable[..., Value], *args: Any, **given: Any) -> Value:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.pool, functools.partial(call, *args, **given))

    async def thread(self, name: str | None = None, create: bool = False) -> RemoteThread:
        return await self.run(self.client.thread, name, create)

    async def generate(self, prompt: str, **given: Any) -> RemoteResult:
        return await self.run(self.client.generate, prompt, **given)

    async def edit(self, source: str | Path, instruction: str, **given: Any) -> RemoteResult:
        return await self.run(self.client.edit, source, instruction, **given)

    async def understand(self, source: str | Path, question: str, **given: Any) -> str:
        return await self.run(self.client.understand, source, question, **given)

    def send(self, thread: RemoteThread, text: str, *args: Any, **options: Any) -> AsyncIterator[Event]:
        return self.each(thread.send(text, *args, **options))

    def batch(self, prompts: Iterable[str | dict[str, Any]], folder: str | Path) -> AsyncIterator[Outcome]:
        return self.each(self.client.batch(prompts, folder))

    async def each(self, found: Iterator[Value]) -> AsyncIterator[Value]:
        nothing = object()
        while (one := await self.run(next, found, nothing)) is not nothing:
            yield one


__all__ = ["AsyncClient", "Client", "Finished", "Question", "RemoteResult", "RemoteThread"]
