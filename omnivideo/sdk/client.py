"""The client of the HTTP service, with the methods of Studio: threads, clips, edits, questions and batches."""

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

from omnivideo.contracts import Artifact, StepProgress, check_prompt
from omnivideo.errors import (
    ArtifactNotFound,
    InvalidInput,
    JobFailed,
    ModelUnavailable,
    OmniVideoError,
    ServiceBusy,
    StoreError,
)
from omnivideo.sdk.batch import BatchFolder, BatchOutcome
from omnivideo.sdk.batch_items import BatchItem, compute_digest, parse_items
from omnivideo.turns import QuestionAsked, Turn, TurnCompleted, TurnEvent

EVENT_ADAPTER: TypeAdapter[TurnEvent] = TypeAdapter(TurnEvent)
MAX_ATTEMPTS = 5  # per request; a repeated POST carries the same idempotency key, so it creates nothing twice
POLL_SECONDS = 0.1  # unless the service suggests an interval
# Our names of settings -> the names in requests.
REQUEST_FIELD_NAMES = {"frames": "num_frames", "steps": "num_inference_steps"}
Value = TypeVar("Value")


@dataclass(frozen=True)
class RemoteResult:
    """The file of a clip (mp4) or an image (png) from the service."""

    data: bytes
    suffix: str

    @property
    def frames(self) -> np.ndarray:
        """The decoded frames, uint8 [F, H, W, 3]."""
        from omnivideo.media.read import read_media

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"result.{self.suffix}"
            path.write_bytes(self.data)
            return read_media(path).frames

    def save(self, path: str | Path) -> Path:
        """Write the file; raise InvalidInput if the suffix does not fit or the file cannot be written."""
        path = Path(path)
        if path.suffix.lower() != f".{self.suffix}":
            raise InvalidInput("output", f"the file's name must end with .{self.suffix}")
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
    """The client of the service at `address`. `timeout` is in seconds.

    All methods raise an OmniVideoError if the service refuses a request or cannot be reached.
    """

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
        """Return a new thread, or the thread with the given id, which is created if `create` is set.

        Raises InvalidInput if it does not exist.
        """
        if thread_id is not None:
            try:
                self.send_request("GET", f"/v1/threads/{thread_id}")
                return RemoteThread(self, thread_id)
            except ArtifactNotFound:
                if not create:
                    raise InvalidInput("thread", f"there is no thread {thread_id!r}") from None
        body = {} if thread_id is None else {"id": thread_id}
        return RemoteThread(self, self.send_request("POST", "/v1/threads", json=body).json()["id"])

    # ------------------------------------------------------------ single clips

    def generate(
        self,
        prompt: str,
        *,
        image: bool = False,
        on_step: Callable[[StepProgress], None] = lambda step: None,
        **overrides: Any,
    ) -> RemoteResult:
        """Generate a clip, or an image if `image` is set, with the overrides of Studio.generate.

        `on_step` is called with the progress of a clip in percent.
        """
        fields = {"prompt": check_prompt("prompt", prompt)} | to_request_fields(overrides)
        if image or overrides.get("frames") == 1:
            fields.pop("num_frames", None)
            return self.request_image("/v1/images/generations", json=fields)
        return self.request_clip(on_step, "/v1/videos", json=fields)

    def edit(
        self,
        source: str | Path,
        instruction: str,
        *,
        on_step: Callable[[StepProgress], None] = lambda step: None,
        **overrides: Any,
    ) -> RemoteResult:
        """Edit a source as the instruction says. An image is edited to an image, a clip to a clip."""
        fields = {"prompt": check_prompt("instruction", instruction)} | to_request_fields(overrides)
        form = {name: str(value) for name, value in fields.items()}
        name, data, is_image = self.read_source(source)
        if is_image:
            return self.request_image("/v1/images/edits", data=form, files={"image": (name, data)})
        return self.request_clip(on_step, "/v1/videos/edits", data=form, files={"video": (name, data)})

    def understand(
        self, source: str | Path, question: str, *, on_text: Callable[[str], None] = lambda piece: None
    ) -> str:
        """Answer a question about an image or a clip; call `on_text` with each piece of the answer."""
        thread, pieces = self.open_thread(), []
        for event in thread.send(check_prompt("question", question), [source], think="off"):
            if event.kind == "text":
                pieces.append(event.delta)
                on_text(event.delta)
        return "".join(pieces).strip()

    def read_source(self, source: str | Path) -> tuple[str, bytes, bool]:
        """Return the source's name, its bytes, and whether it is an image."""
        from omnivideo.media.read import measure_media

        path = Path(source)
        return path.name, path.read_bytes(), measure_media(path).kind == "image"

    def request_image(self, path: str, **request: Any) -> RemoteResult:
        body_json = {"json": request.pop("json") | {"response_format": "b64_json"}} if "json" in request else {}
        images = self.send_request("POST", path, timeout=600.0, **body_json, **request).json()["data"]
        return RemoteResult(base64.b64decode(images[0]["b64_json"]), "png")

    def request_clip(self, on_step: Callable[[StepProgress], None], path: str, **request: Any) -> RemoteResult:
        """Create a video, poll it until it has ended, and download it. Raises JobFailed."""
        video = self.send_request("POST", path, **request).json()
        started_at, last_progress = time.monotonic(), -1
        while video["status"] in ("queued", "in_progress"):
            response = self.send_request("GET", f"/v1/videos/{video['id']}")
            video = response.json()
            if (progress := video["progress"]) != last_progress:
                last_progress, elapsed = progress, time.monotonic() - started_at
                eta_seconds = elapsed / progress * (100 - progress) if progress else 0.0
                on_step(StepProgress(step=progress, steps=100, eta_seconds=eta_seconds))
            if video["status"] in ("queued", "in_progress"):
                time.sleep(int(response.headers.get("openai-poll-after-ms", 1000 * POLL_SECONDS)) / 1000)
        if video["status"] != "completed":
            error = video.get("error") or {"code": "cancelled", "message": "the clip was cancelled"}
            raise JobFailed(error["code"], error["message"])
        return RemoteResult(self.send_request("GET", f"/v1/videos/{video['id']}/content").content, "mp4")

    # ------------------------------------------------------------ batches

    def batch(self, prompts: Iterable[str | dict[str, Any]], folder: str | Path) -> Iterator[BatchOutcome]:
        """Generate each prompt as a batch of the service, and download the clips into the folder, with a results.jsonl.

        When called again with the same prompts, continue with the same batch and skip the clips that already exist.
        """
        items, folder = parse_items(prompts), Path(folder)
        results = BatchFolder(folder)
        remaining = [item for item in items if not results.is_done(item)]
        yield from (BatchOutcome(item.id, None, None) for item in items if results.is_done(item))
        if not remaining:
            return
        lines_by_id = self.wait_for_batch(remaining, folder)
        for item in remaining:
            outcome = self.download_outcome(item, lines_by_id[item.id], folder)
            results.record(item, outcome)
            yield outcome

    def wait_for_batch(self, items: list[BatchItem], folder: Path) -> dict[str, Any]:
        """Return the output or error line of each item, by the item's id.

        The batch's id is stored in the folder, so that another call waits for the same batch.
        """
        state_path = folder / ".batch.json"
        item_ids = [item.id for item in items]
        requests = [[item.id, compute_digest(item)] for item in items]
        batch_state = json.loads(state_path.read_text()) if state_path.exists() else {}
        if batch_state.get("requests") != requests:
            batch_state = {"requests": requests, "id": self.submit_batch(items)}
            state_path.write_text(json.dumps(batch_state))
        while True:
            batch = self.send_request("GET", f"/v1/batches/{batch_state['id']}").json()
            if batch["status"] in ("completed", "failed", "expired", "cancelled"):
                break
            time.sleep(5 * POLL_SECONDS)
        lines: dict[str, Any] = {}
        for file_field in ("output_file_id", "error_file_id"):
            if batch.get(file_field):
                text = self.send_request("GET", f"/v1/files/{batch[file_field]}/content").text
                lines |= {(line := json.loads(raw))["custom_id"]: line for raw in text.splitlines()}
        missing_line = {"error": {"message": f"the batch is {batch['status']}"}}
        return {item_id: lines.get(item_id, missing_line) for item_id in item_ids}

    def submit_batch(self, items: list[BatchItem]) -> str:
        lines = [json.dumps(to_batch_line(item)) for item in items]
        file = ("batch.jsonl", "\n".join(lines).encode())
        upload = self.send_request("POST", "/v1/files", data={"purpose": "batch"}, files={"file": file}).json()
        body = {"input_file_id": upload["id"], "endpoint": "/v1/videos", "completion_window": "24h"}
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
        """Send a request, and retry while the service is unavailable or busy. Raises OmniVideoError."""
        headers = {"Idempotency-Key": uuid.uuid4().hex} if method == "POST" else {}
        error: OmniVideoError = StoreError("service: it cannot be reached; is it running, and is the address right?")
        for attempt in range(MAX_ATTEMPTS):
            pause = min(8.0, 0.25 * 2**attempt)
            try:
                response = self.http.request(method, path, headers=headers, **request_options)
                if response.status_code < 400:
                    return response
                error = error_from_response(response)
                is_temporary = response.status_code in (429, 502, 503, 504) or "Retry-After" in response.headers
                if not is_temporary:
                    raise error
                pause = float(response.headers.get("Retry-After", pause))
            except httpx.TransportError:
                pass
            if attempt + 1 < MAX_ATTEMPTS:
                time.sleep(min(pause, 30.0))
        raise error


class RemoteThread:
    """A thread of a service, with the methods of agent.thread.Thread."""

    def __init__(self, client: Client, thread_id: str):
        self.client = client
        self.id = thread_id
        self.path = f"/v1/threads/{thread_id}"

    def send(self, text: str, attachments: Sequence[str | Path] = (), **options: Any) -> Iterator[TurnEvent]:
        """Run a turn and yield its events as they happen; the last is TurnCompleted or QuestionAsked.

        A lost connection is resumed without a lost event. `options` are think, check, seed, steps and guidance_scale.
        """
        parts = [{"file_id": self.upload_file(Path(path))} for path in attachments]
        body = {"text": text, "attachments": parts} | options
        yield from self.follow_turn(self.client.send_request("POST", f"{self.path}/turns", json=body).json()["id"])

    def upload_file(self, path: Path) -> str:
        try:
            file = (path.name, path.read_bytes())
        except OSError as error:
            raise InvalidInput("attachments", f"{path.name!r} cannot be read: {error.strerror}") from None
        upload = self.client.send_request("POST", "/v1/files", data={"purpose": "vision"}, files={"file": file})
        return str(upload.json()["id"])

    def follow_turn(self, turn_id: str) -> Iterator[TurnEvent]:
        """Yield a turn's events from the first one; raise JobFailed if the turn failed or was cancelled."""
        last_event_id = 0
        for attempt in range(MAX_ATTEMPTS):
            try:
                for number, event in self.stream_events(turn_id, last_event_id):
                    last_event_id = number
                    yield event
                break
            except httpx.TransportError:
                time.sleep(0.25 * 2**attempt)
        turn = self.client.send_request("GET", f"{self.path}/turns/{turn_id}").json()
        if turn["state"] == "failed":
            raise JobFailed(turn["error"]["code"] or "failed", turn["error"]["message"])
        if turn["state"] == "cancelled":
            raise JobFailed("cancelled", "the turn was cancelled")

    def stream_events(self, turn_id: str, after_event_id: int) -> Iterator[tuple[int, TurnEvent]]:
        """Yield (id, event) of the turn's server-sent events with ids above `after_event_id`."""
        headers, number, data = {"Last-Event-ID": str(after_event_id)}, after_event_id, ""
        with self.client.http.stream("GET", f"{self.path}/turns/{turn_id}/events", headers=headers) as response:
            if response.status_code >= 400:
                response.read()
                raise error_from_response(response)
            for line in response.iter_lines():
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
        detail: dict[str, Any] = self.client.send_request("GET", self.path).json()
        return detail

    def get_turns(self) -> list[Turn]:
        return [Turn(**turn) for turn in self.fetch_detail()["turns"]]

    def get_artifacts(self) -> list[Artifact]:
        return [Artifact(**artifact) for artifact in self.fetch_detail()["artifacts"]]

    def get_open_question(self) -> str | None:
        question: str | None = self.fetch_detail()["question"]
        return question

    def get_lineage(self, artifact_key: str | None = None) -> list[Artifact]:
        query = {"artifact": artifact_key} if artifact_key else {}
        lineage = self.client.send_request("GET", f"{self.path}/lineage", params=query).json()
        return [Artifact(**artifact) for artifact in lineage]

    def fetch_artifact(self, artifact: Artifact) -> RemoteResult:
        """Download an artifact."""
        response = self.client.send_request("GET", f"{self.path}/artifacts/{artifact.key}")
        return RemoteResult(response.content, artifact.key.rpartition(".")[2])


def to_request_fields(overrides: dict[str, Any]) -> dict[str, Any]:
    """Return settings under the names that requests use, without those that are None."""
    return {REQUEST_FIELD_NAMES.get(name, name): value for name, value in overrides.items() if value is not None}


def to_batch_line(item: BatchItem) -> dict[str, Any]:
    if item.image:
        raise InvalidInput(item.id, "a batch of the service generates clips only; leave out image")
    body = {"prompt": item.prompt} | to_request_fields(item.get_settings())
    return {"custom_id": item.id, "method": "POST", "url": "/v1/videos", "body": body}


def error_from_response(response: httpx.Response) -> OmniVideoError:
    """Return the error in omnivideo/errors.py that corresponds to an error response."""
    try:
        error = response.json()["error"]
        message, param = str(error["message"]), error.get("param")
    except (ValueError, KeyError, TypeError):
        return StoreError(f"service: it answered {response.status_code} with an unknown body; is it omnivideo?")
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
