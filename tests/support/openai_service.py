"""Helpers for the tests of the OpenAI-compatible routes: the service, clients, media and batches."""

import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import httpx
import numpy as np
import openai
from PIL import Image

from omnivideo.api.routes.batches import BatchLineHandler
from omnivideo.backends.batches.runner import BatchRunner
from omnivideo.backends.webhooks import check_reachable
from omnivideo.errors import InvalidInput
from omnivideo.media.artifacts import encode_clip
from omnivideo.media.thumbnails import create_picture_renderer
from omnivideo.storage.database.jobs import JobRepository
from tests.support.api_server import build_scripted_wiring, run_api_server

KEY = "an-admin-key-for-tests"
QUICK = {"num_inference_steps": 1, "num_frames": 5}
SMALL = {"size": "32x32", "extra_body": QUICK}


@contextmanager
def run_service(folder, omni, **options) -> Iterator[tuple]:
    """Run a service over an untrained model; yield its wiring, its context and its address."""
    wiring = build_scripted_wiring(folder, omni, admin_key=KEY, **({"disconnect_grace_seconds": 1.0} | options))
    context = wiring.build_service_context()
    render = create_picture_renderer(wiring.store)
    context.render_thumbnail = lambda owner, *arguments: render(*arguments)
    context.check_webhook_url = partial(check_reachable, internal_hosts=("localhost",))
    wiring.build_service_context = lambda: context  # type: ignore[method-assign]
    with run_api_server(wiring) as address:
        yield wiring, context, address


def make_client(service, key: str = KEY) -> openai.OpenAI:
    """Return the unmodified openai client."""
    http = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(base_url=f"{service[2]}/v1", api_key=key, max_retries=0, http_client=http, timeout=60)


def make_http_client(service, **options) -> httpx.Client:
    """Return an HTTP client for requests that the openai client does not offer."""
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.Client(base_url=service[2], headers=headers, timeout=60, trust_env=False, **options)


def refer_to_video(video_id: str, **fields: object) -> dict:
    """Return the arguments that name a video of the service; the openai client only accepts files for `video`."""
    return {"video": openai.omit, "extra_body": {"video": {"id": video_id}} | fields}


def make_png(colour: int = 200, size: int = 64) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), colour, dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def make_mp4() -> bytes:
    return encode_clip(np.full((9, 64, 64, 3), 90, dtype=np.uint8), 8)[0]


def wait_until(condition, seconds: float = 30.0):
    """Poll `condition` until it is true, and return its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.02)
    return value


@contextmanager
def pause_worker(wiring) -> Iterator[None]:
    """Keep the worker from claiming jobs; it has finished a claim in progress."""
    claim_next_job, is_paused = wiring.worker.jobs.claim_next_job, threading.Event()
    wiring.worker.jobs.claim_next_job = lambda worker, model: is_paused.set()
    try:
        wiring.notify_workers()
        assert is_paused.wait(60)
        yield
    finally:
        wiring.worker.jobs.claim_next_job = claim_next_job
        wiring.notify_workers()


# ---------------------------------------------------------------- batches


def make_lines(count: int, url: str = "/v1/videos", **body) -> bytes:
    """Return the lines of a batch's input file; `body` adds fields to every request."""
    body = {"prompt": "a ball", "size": "32x32"} | (QUICK if url == "/v1/videos" else {"num_inference_steps": 1}) | body
    requests = [{"custom_id": f"line {n}", "method": "POST", "url": url, "body": body} for n in range(count)]
    return b"".join(json.dumps(request).encode() + b"\n" for request in requests)


def answer_chat(owner: str, body: dict, line_key: str) -> dict:
    """Answer a chat request with its own text, or refuse the text "bad"."""
    if body["messages"][0]["content"] == "bad":
        raise InvalidInput("messages", "they are bad")
    return {"object": "chat.completion", "owner": owner, "echo": body["messages"][0]["content"]}


def make_runner(context, **options) -> BatchRunner:
    return BatchRunner(
        context.batches,
        context.files,
        JobRepository(context.jobs.engine),
        context.store,
        context.notify_workers,
        BatchLineHandler(context),
        answer_chat,
        **({"poll_seconds": 0.05} | options),
    )


def create_batch(client, data: bytes, endpoint: str = "/v1/videos"):
    file = client.files.create(file=("lines.jsonl", data), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"for": "tests"}
    )


def wait_for_batch(client, batch, *states: str):
    """Wait until the batch is in one of the states, by default "completed", and return it."""
    return wait_until(
        lambda: (current := client.batches.retrieve(batch.id)).status in (states or ("completed",)) and current
    )


def download_lines(client, file_id: str | None) -> list[dict]:
    """Return the records of an output file; there are none without a file."""
    return [json.loads(line) for line in client.files.content(file_id).read().splitlines()] if file_id else []
