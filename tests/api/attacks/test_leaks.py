"""What errors must not reveal, and whose files a key or a digest does not open."""

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from omnivideo.storage.objects.local import LocalObjectStore
from tests.support.attacks import INTERNAL_DETAIL, assert_refused
from tests.support.openai_service import KEY, download_lines, make_lines, make_runner, wait_for_batch, wait_until


@pytest.mark.parametrize("path", ["/v1/videos", "/v1/images/generations", "/v1/files"])
def test_no_traceback_in_an_answer(service, monkeypatch, path):
    """An internal error contains the request id and no details."""
    details = f"at {object()!r} in {Path(__file__).resolve()}"

    def broken(*arguments, **options):
        raise ZeroDivisionError(details)

    monkeypatch.setattr(service[1].jobs, "submit", broken)
    monkeypatch.setattr(service[1].files, "create_file", broken)
    headers = {"Authorization": f"Bearer {KEY}"}
    form = (
        {"files": {"file": b"x"}, "data": {"purpose": "user_data"}}
        if path == "/v1/files"
        else {"json": {"prompt": "a"}}
    )
    with httpx.Client(base_url=service[2], headers=headers, trust_env=False) as http:
        answer = http.post(path, **form)
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal"
    assert not INTERNAL_DETAIL.search(answer.text) and answer.headers["x-request-id"]


def test_no_traceback_in_a_job_or_a_batch(service, client, http, context, monkeypatch):
    def broken(job):
        raise ZeroDivisionError(f"at {object()!r} in {Path(__file__).resolve()}")

    file = client.files.create(file=("a.jsonl", make_lines(1)), purpose="batch")
    runner = make_runner(context).start()
    try:
        with monkeypatch.context() as patched:
            patched.setattr(service[0].worker.renderer, "prepare_job", broken)
            video = http.post("/v1/videos", json={"prompt": "a"}).json()["id"]
            batch = client.batches.create(input_file_id=file.id, endpoint="/v1/videos", completion_window="24h")
            (line,) = download_lines(client, wait_for_batch(client, batch).error_file_id)
            failed = wait_until(lambda: (now := http.get(f"/v1/videos/{video}")).json()["status"] == "failed" and now)
    finally:
        runner.stop()
    assert failed.json()["error"]["code"] == "internal" and not INTERNAL_DETAIL.search(failed.text)
    assert line["response"]["body"]["error"]["code"] == "internal" and not INTERNAL_DETAIL.search(json.dumps(line))


def test_an_object_key_does_not_open_the_files_of_others(http, context):
    """Files are opened by their ids only, and only by their owner; knowing a digest is not enough."""
    key = context.store.put(b"secret", "bin")
    assert isinstance(context.store.store, LocalObjectStore)
    for path in (f"/v1/files/{key}/content", f"/v1/videos/{key}/content"):
        assert http.get(path).status_code == 404
    assert_refused(
        http.post("/v1/videos", json={"prompt": "a", "input_reference": {"file_id": key}}), "input_reference.file_id"
    )


def test_the_api_process_loads_no_torch():
    program = """
import sys
from omnivideo.api import generation, request_body
from omnivideo.api.routes import batches, files, images, videos, webhooks
from omnivideo.backends import webhooks
from omnivideo.backends.batches import runner
from omnivideo.media import thumbnails
from omnivideo.storage.database import batches, files, webhooks
print(sorted({"torch", "diffusers", "transformers", "celery"} & set(sys.modules)))
"""
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert completed.stdout.strip() == "[]"
