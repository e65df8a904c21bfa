"""The Studio's face over HTTP: threads, clips, edits, questions and batches of a service somewhere else.

`Client` is the implementation; `AsyncClient` runs its calls in threads of its own, so that there is one of each.
"""

import base64
import json
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
from pydantic import TypeAdapter

from omnivideo.contracts import Artifact, QuestionAsked, StepProgress, Turn, TurnCompleted, TurnEvent, check_prompt
from omnivideo.errors import (
    ArtifactNotFound,
    InvalidInput,
    JobFailed,
    ModelUnavailable,
    OmniVideoError,
    ServiceBusy,
    StoreError,
)
from omnivideo.sdk.batch import BatchItem, BatchOutcome, parse_items

EVENT_ADAPTER: TypeAdapter[TurnEvent] = TypeAdapter(TurnEvent)
MAX_ATTEMPTS = 5  # of a request; all are safe to repeat, for those that make something carry an idempotency key
POLL_SECONDS = 0.1  # seconds between two looks at a clip, where the service does not say
WIRE_FIELD_NAMES = {"frames": "num_frames", "steps": "num_inference_steps"}
Value = TypeVar("Value")


@dataclass(frozen=True)
class RemoteResult:
    """A clip (mp4) or a still (png) as the service made it."""

    data: bytes
    suffix: str

    @property
    def frames(self) -> np.ndarray:
        """uint8 [F, H, W, 3]."""
        from omnivideo.media.read import read_media

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

    def __init__(self, address: str = "http://127.0.0.1:8000", api_key: str | None = None, timeout: float = 60.0):
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.http = httpx.Client(base_url=address, headers=headers, timeout=timeout)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.http.close()

    # ------------------------------------------------------------ conversations

    def open_thread(self, thread_id: str | None = None, create: bool = False) -> "RemoteThread":
        """A conversation: a new one, or the one of that id (made if `create`)."""
        if thread_id is not None:
            try:
                self.send_request("GET", f"/v1/threads/{thread_id}")
                return RemoteThread(self, thread_id)
            except ArtifactNotFound:
                if not create:
                    raise InvalidInput("thread", f"there is no thread {thread_id!r}") from None
        made = self.send_request("POST", "/v1/threads", json={} if thread_id is None else {"id": thread_id}).json()
        return RemoteThread(self, made["id"])

    # ------------------------------------------------------------ single clips

    def generate(
        self,
        prompt: str,
        *,
        image: bool = False,
        on_step: Callable[[StepProgress], None] = lambda step: None,
        **overrides: Any,
    ) -> RemoteResult:
        """A clip, or a still if `image`; `overrides` as for Studio.generate.  `on_step` hears of a clip's progress."""
        fields = {"prompt": check_prompt("prompt", prompt)} | to_wire_fields(overrides)
        if image or overrides.get("frames") == 1:
            fields.pop("num_frames", None)
            return self.request_image("/v1/images/generations", json=fields)
        return self.request_clip(on_step, "/v1/videos", json=fields)

    def edit(
        self, source: str | Path, instruction: str, *,
        on_step: Callable[[StepProgress], None] = lambda step: None, **overrides: Any,
    ) -> RemoteResult:  # fmt: skip
        """The source changed as told; an image stays an image, a clip a clip."""
        fields = {"prompt": check_prompt("instruction", instruction)} | to_wire_fields(overrides)
        form = {name: str(value) for name, value in fields.items()}
        name, data, still = self.read_source(source)
        if still:
            return self.request_image("/v1/images/edits", data=form, files={"image": (name, data)})
        return self.request_clip(on_step, "/v1/videos/edits", data=form, files={"video": (name, data)})

    def understand(
        self, source: str | Path, question: str, *, on_text: Callable[[str], None] = lambda piece: None
    ) -> str:
        """The answer to a question about an image or a clip."""
        thread, pieces = self.open_thread(), []
        for event in thread.send(check_prompt("question", question), [source], think="off"):
            if event.kind == "text":
                pieces.append(event.delta)
                on_text(event.delta)
        return "".join(pieces).strip()

    def read_source(self, source: str | Path) -> tuple[str, bytes, bool]:
        """Name, bytes, and whether it is a still."""
        from omnivideo.media.read import measure_media

        path = Path(source)
        return path.name, path.read_bytes(), measure_media(path).kind == "image"

    def request_image(self, path: str, **request: Any) -> RemoteResult:
        body_json = {"json": request.pop("json") | {"response_format": "b64_json"}} if "json" in request else {}
        made = self.send_request("POST", path, timeout=600.0, **body_json, **request).json()
        return RemoteResult(base64.b64decode(made["data"][0]["b64_json"]), "png")

    def request_clip(self, on_step: Callable[[StepProgress], None], path: str, **request: Any) -> RemoteResult:
        video = self.send_request("POST", path, **request).json()
        began, shown = time.monotonic(), -1
        while video["status"] in ("queued", "in_progress"):
            answer = self.send_request("GET", f"/v1/videos/{video['id']}")
            video = answer.json()
            if (done := video["progress"]) != shown:
                shown, spent = done, time.monotonic() - began
                on_step(StepProgress(step=done, steps=100, eta_seconds=spent / done * (100 - done) if done else 0.0))
            if video["status"] in ("queued", "in_progress"):
                time.sleep(int(answer.headers.get("openai-poll-after-ms", 1000 * POLL_SECONDS)) / 1000)
        if video["status"] != "completed":
            error = video.get("error") or {"code": "cancelled", "message": "the clip was cancelled"}
            raise JobFailed(error["code"], error["message"])
        return RemoteResult(self.send_request("GET", f"/v1/videos/{video['id']}/content").content, "mp4")

    # ------------------------------------------------------------ many

    def batch(self, prompts: Iterable[str | dict[str, Any]], folder: str | Path) -> Iterator[BatchOutcome]:
        """Draws each prompt on the service's batch lane into the folder, with results.jsonl; run again, it follows
        the batch that it began, and fetches what is not there yet."""
        from omnivideo.sdk.batch import RESULTS_FILE, load_finished_ids

        wanted, folder = parse_items(prompts), Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        done = load_finished_ids(folder)
        remaining = [item for item in wanted if item.id not in done]
        yield from (BatchOutcome(item.id, None, None) for item in wanted if item.id in done)
        if not remaining:
            return
        answers = self.wait_for_batch(remaining, folder)
        with (folder / RESULTS_FILE).open("a") as results:
            for item in remaining:
                outcome = self.download_outcome(item, answers[item.id], folder)
                results.write(json.dumps(vars(outcome) | {"prompt": item.prompt}) + "\n")
                results.flush()
                yield outcome

    def wait_for_batch(self, items: list[BatchItem], folder: Path) -> dict[str, Any]:
        """The service's answer to each item.  The batch's id is kept, so that another call follows the same one."""
        state_path = folder / ".batch.json"
        names = [item.id for item in items]
        batch_state = json.loads(state_path.read_text()) if state_path.exists() else {}
        if batch_state.get("items") != names:
            batch_state = {"items": names, "id": self.submit_batch(items)}
            state_path.write_text(json.dumps(batch_state))
        while True:
            batch = self.send_request("GET", f"/v1/batches/{batch_state['id']}").json()
            if batch["status"] in ("completed", "failed", "expired", "cancelled"):
                break
            time.sleep(5 * POLL_SECONDS)
        lines: dict[str, Any] = {}
        for name in ("output_file_id", "error_file_id"):
            if batch.get(name):
                text = self.send_request("GET", f"/v1/files/{batch[name]}/content").text
                lines |= {(line := json.loads(raw))["custom_id"]: line for raw in text.splitlines()}
        return {name: lines.get(name, {"error": {"message": f"the batch is {batch['status']}"}}) for name in names}

    def submit_batch(self, items: list[BatchItem]) -> str:
        lines = [json.dumps(to_batch_line(item)) for item in items]
        file = ("batch.jsonl", "\n".join(lines).encode())
        made = self.send_request("POST", "/v1/files", data={"purpose": "batch"}, files={"file": file}).json()
        body = {"input_file_id": made["id"], "endpoint": "/v1/videos", "completion_window": "24h"}
        return str(self.send_request("POST", "/v1/batches", json=body).json()["id"])

    def download_outcome(self, item: BatchItem, line: dict[str, Any], folder: Path) -> BatchOutcome:
        error = line.get("error") or line["response"]["body"].get("error")
        if error:
            return BatchOutcome(item.id, None, error["message"])
        name = f"{item.id}.mp4"
        video = line["response"]["body"]["id"]
        (folder / name).write_bytes(self.send_request("GET", f"/v1/videos/{video}/content").content)
        return BatchOutcome(item.id, name, None)

    # ------------------------------------------------------------ requests

    def send_request(self, method: str, path: str, **request_options: Any) -> httpx.Response:
        """One request, tried again while the service is away or full.  Raises OmniVideoError."""
        headers = {"Idempotency-Key": uuid.uuid4().hex} if method == "POST" else {}
        error: OmniVideoError = StoreError("service: it cannot be reached; is it running, and is the address right?")
        for attempt in range(MAX_ATTEMPTS):
            pause = min(8.0, 0.25 * 2**attempt)
            try:
                answer = self.http.request(method, path, headers=headers, **request_options)
                if answer.status_code < 400:
                    return answer
                error = error_from_response(answer)
                if answer.status_code not in (429, 502, 503, 504):
                    raise error
                pause = float(answer.headers.get("Retry-After", pause))
            except httpx.TransportError:
                pass
            if attempt + 1 < MAX_ATTEMPTS:
                time.sleep(min(pause, 30.0))
        raise error


class RemoteThread:
    """One conversation of a service, with the face of agent.thread.Thread."""

    def __init__(self, client: Client, thread_id: str):
        self.client = client
        self.id = thread_id
        self.path = f"/v1/threads/{thread_id}"

    def send(self, text: str, attachments: Sequence[str | Path] = (), **options: Any) -> Iterator[TurnEvent]:
        """Runs a turn and gives its events as they happen, through cut connections; the last is TurnCompleted or
        QuestionAsked.

        `options` may hold think, check, seed, steps and guidance_scale.
        """
        parts = [{"file_id": self.upload_file(Path(path))} for path in attachments]
        body = {"text": text, "attachments": parts} | options
        turn = self.client.send_request("POST", f"{self.path}/turns", json=body).json()["id"]
        yield from self.follow_turn(turn)

    def upload_file(self, path: Path) -> str:
        try:
            file = (path.name, path.read_bytes())
        except OSError as error:
            raise InvalidInput("attachments", f"{path.name!r} cannot be read: {error.strerror}") from None
        made = self.client.send_request("POST", "/v1/files", data={"purpose": "vision"}, files={"file": file})
        return str(made.json()["id"])

    def follow_turn(self, turn_id: str) -> Iterator[TurnEvent]:
        """A turn's events from the first on; raises what ended it early."""
        last = 0
        for attempt in range(MAX_ATTEMPTS):
            try:
                for number, event in self.stream_events(turn_id, last):
                    last = number
                    yield event
                break
            except httpx.TransportError:
                time.sleep(0.25 * 2**attempt)
        shown = self.client.send_request("GET", f"{self.path}/turns/{turn_id}").json()
        if shown["state"] == "failed":
            raise JobFailed(shown["error"]["code"] or "failed", shown["error"]["message"])
        if shown["state"] == "cancelled":
            raise JobFailed("cancelled", "the turn was cancelled")

    def stream_events(self, turn_id: str, after_event_id: int) -> Iterator[tuple[int, TurnEvent]]:
        headers, number, data = {"Last-Event-ID": str(after_event_id)}, after_event_id, ""
        with self.client.http.stream("GET", f"{self.path}/turns/{turn_id}/events", headers=headers) as answer:
            if answer.status_code >= 400:
                answer.read()
                raise error_from_response(answer)
            for line in answer.iter_lines():
                name, _, value = line.partition(": ")
                if name == "id":
                    number = int(value)
                elif name == "data":
                    data = value
                elif not line and data:
                    yield number, EVENT_ADAPTER.validate_json(data)
                    data = ""

    def fork(self, turn: int, thread_id: str | None = None) -> "RemoteThread":
        body = {"after_turn": turn} | ({"id": thread_id} if thread_id else {})
        return RemoteThread(self.client, self.client.send_request("POST", f"{self.path}/forks", json=body).json()["id"])

    def fetch_detail(self) -> dict[str, Any]:
        found: dict[str, Any] = self.client.send_request("GET", self.path).json()
        return found

    def get_turns(self) -> list[Turn]:
        return [Turn(**turn) for turn in self.fetch_detail()["turns"]]

    def get_artifacts(self) -> list[Artifact]:
        return [Artifact(**artifact) for artifact in self.fetch_detail()["artifacts"]]

    def get_open_question(self) -> str | None:
        asked: str | None = self.fetch_detail()["question"]
        return asked

    def get_lineage(self, artifact_key: str | None = None) -> list[Artifact]:
        query = {"artifact": artifact_key} if artifact_key else {}
        return [
            Artifact(**artifact)
            for artifact in self.client.send_request("GET", f"{self.path}/lineage", params=query).json()
        ]

    def fetch_artifact(self, artifact: Artifact) -> RemoteResult:
        """An artifact's bytes."""
        answer = self.client.send_request("GET", f"{self.path}/artifacts/{artifact.key}")
        return RemoteResult(answer.content, artifact.key.rpartition(".")[2])


def to_wire_fields(overrides: dict[str, Any]) -> dict[str, Any]:
    """Settings in the wire's words."""
    width, height = overrides.pop("width", None), overrides.pop("height", None)
    fields = {WIRE_FIELD_NAMES.get(name, name): value for name, value in overrides.items() if value is not None}
    return fields | ({"size": f"{width}x{height}"} if width and height else {})


def to_batch_line(item: BatchItem) -> dict[str, Any]:
    overrides = item.model_dump(exclude={"id", "prompt", "image"})
    if item.image:
        raise InvalidInput(item.id, "a batch of the service draws clips; leave out image")
    body = {"prompt": item.prompt} | to_wire_fields(overrides)
    return {"custom_id": item.id, "method": "POST", "url": "/v1/videos", "body": body}


def error_from_response(response: httpx.Response) -> OmniVideoError:
    """The service's refusal as our own error."""
    try:
        error = response.json()["error"]
        message, param = str(error["message"]), error.get("param")
    except (ValueError, KeyError, TypeError):
        return StoreError(f"service: it answers {response.status_code}, and not as omnivideo does")
    match response.status_code:
        case 404:
            return ArtifactNotFound(message)
        case 429:
            return ServiceBusy(message, float(response.headers.get("Retry-After", 1)))
        case 503:
            return ModelUnavailable(message)
    if param:
        return InvalidInput(param, message.removeprefix(f"{param}: "))
    return JobFailed(error.get("code") or "failed", message)


__all__ = ["Client", "QuestionAsked", "RemoteResult", "RemoteThread", "TurnCompleted"]
