"""Batches and webhooks with the unmodified openai client, including runners that die midway."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai
import pytest

from omnivideo.backends.webhooks import WebhookSender
from omnivideo.storage.database.jobs import JobRepository
from tests.support.openai_service import (
    SMALL,
    create_batch,
    download_lines,
    make_client,
    make_lines,
    make_runner,
    pause_worker,
    wait_for_batch,
    wait_until,
)

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


@pytest.fixture
def runner(context):
    runner = make_runner(context).start()
    yield runner
    runner.stop()


def test_a_batch_generates_videos(client, runner):
    invalid_line = make_lines(1, num_frames=10).replace(b"line 0", b"wrong")
    batch = create_batch(client, make_lines(3) + b"\n" + invalid_line)
    assert batch.status == "validating" and batch.metadata == {"for": "tests"}
    done = wait_for_batch(client, batch)
    counts = done.request_counts
    assert (counts.total, counts.completed, counts.failed) == (4, 3, 1)
    good, bad = download_lines(client, done.output_file_id), download_lines(client, done.error_file_id)
    assert [line["custom_id"] for line in good] == ["line 0", "line 1", "line 2"]
    for line in good:
        assert line["response"]["status_code"] == 200 and line["error"] is None
        assert client.videos.download_content(line["response"]["body"]["id"]).read()
    (line,) = bad
    assert line["custom_id"] == "wrong" and line["response"]["status_code"] == 400
    assert line["response"]["body"]["error"]["param"] == "num_frames"
    assert done.in_progress_at <= done.finalizing_at <= done.completed_at and done.expires_at
    assert client.files.retrieve(done.output_file_id).purpose == "batch_output"
    assert next(batch.id for batch in client.batches.list(limit=1)) == batch.id


def test_batches_generate_images_and_answer_chats(client, http, runner):
    images = create_batch(client, make_lines(2, "/v1/images/generations", n=2), "/v1/images/generations")
    chat_lines = b"".join(
        make_lines(1, "/v1/chat/completions", messages=[{"role": "user", "content": text}]).replace(
            b"line 0", text.encode()
        )
        for text in ("hello", "bad")
    )
    chat = create_batch(client, chat_lines, "/v1/chat/completions")
    for line in download_lines(client, wait_for_batch(client, images).output_file_id):
        urls = [image["url"] for image in line["response"]["body"]["data"]]
        assert len(urls) == 2 and all(http.get(url).headers["content-type"] == "image/png" for url in urls)
    done = wait_for_batch(client, chat)
    assert download_lines(client, done.output_file_id)[0]["response"]["body"]["echo"] == "hello"
    assert download_lines(client, done.error_file_id)[0]["response"]["body"]["error"]["param"] == "messages"


INVALID_LINES = [
    (b"{", "line: it is not valid JSON"),
    (b"[1]", "line: it is not a JSON object"),
    (b"{}", "custom_id: it is required"),
    (make_lines(1).replace(b"POST", b"GET"), "method: allowed: POST"),
    (make_lines(1, "/v1/images/generations"), "url: it is /v1/images/generations"),
    (make_lines(1).replace(b"/v1/videos", b"http://127.0.0.1/"), "url: allowed: /v1/videos, "),
    (make_lines(1).replace(b"line 0", b"line 1"), "custom_id: 'line 1' is already used by an earlier line"),
    (b'{"a":' * 20_000, "line: it is not valid JSON"),
]  # fmt: skip


def test_invalid_lines_fail_the_batch_with_their_numbers(client, runner):
    data = make_lines(2) + b"\n".join(line.strip() for line, _ in INVALID_LINES)
    failed = wait_for_batch(client, create_batch(client, data), "failed")
    assert [error.line for error in failed.errors.data] == [index + 3 for index in range(len(INVALID_LINES))]
    for error, (_, text) in zip(failed.errors.data, INVALID_LINES, strict=True):
        assert error.message.startswith(text)
    assert not failed.output_file_id and failed.failed_at


def test_a_batch_without_lines_or_with_too_many_is_refused(client, runner, monkeypatch):
    monkeypatch.setattr("omnivideo.backends.batches.runner.MAX_BATCH_LINES", 3)
    empty, full = (wait_for_batch(client, create_batch(client, data), "failed") for data in (b"\n \n", make_lines(4)))
    assert [batch.errors.data[0].code for batch in (empty, full)] == ["empty", "too_many_lines"]


def test_a_batch_is_cancelled(client, service, context):
    runner = make_runner(context, max_open_jobs=2).start()
    try:
        with pause_worker(service[0]):
            batch = create_batch(client, make_lines(5))
            wait_until(lambda: client.batches.retrieve(batch.id).status == "in_progress")
            assert client.batches.cancel(batch.id).status == "cancelling"
            done = wait_for_batch(client, batch, "cancelled")
    finally:
        runner.stop()
    assert done.request_counts.failed == 5 and not done.output_file_id
    assert {line["error"]["code"] for line in download_lines(client, done.error_file_id)} == {"batch_cancelled"}
    assert client.batches.cancel(batch.id).status == "cancelled"


def test_a_batch_expires(client, service, context, monkeypatch):
    runner = make_runner(context, max_open_jobs=2)
    with pause_worker(service[0]):
        batch = create_batch(client, make_lines(4))
        for _ in range(3):
            runner.run_once()
        monkeypatch.setattr("omnivideo.backends.batches.runner.COMPLETION_WINDOW_SECONDS", -1.0)
        wait_until(lambda: (runner.run_once(), client.batches.retrieve(batch.id).status == "expired")[1])
    done = client.batches.retrieve(batch.id)
    assert {line["error"]["code"] for line in download_lines(client, done.error_file_id)} == {"batch_expired"}
    assert len(download_lines(client, done.error_file_id)) == 4 and done.expired_at


def test_a_batch_waits_for_free_places_in_the_queue(client, context):
    runner = make_runner(context)
    runner.jobs.max_open_jobs_per_owner = 1
    runner.start()
    try:
        done = wait_for_batch(client, create_batch(client, make_lines(4)))
    finally:
        runner.stop()
    assert len(download_lines(client, done.output_file_id)) == 4 and not done.error_file_id


def die_after(method):
    """Return the method with a KeyboardInterrupt at its end, which no caller catches, so that the caller dies."""

    def run_and_die(*arguments, **keywords):
        method(*arguments, **keywords)
        raise KeyboardInterrupt

    return run_and_die


def test_a_batch_of_a_dead_runner_is_taken_over_and_no_line_is_processed_twice(client, context, monkeypatch):
    """Each runner dies after a few rounds, at a different call, without any cleanup or notification."""
    submitted_ids: list[str] = []
    submit = JobRepository.submit
    monkeypatch.setattr(
        JobRepository, "submit", lambda self, job, *rest: submit(self, job, *rest) and not submitted_ids.append(job.id)
    )
    # More runners die here without any progress than a batch may lose.
    monkeypatch.setattr("omnivideo.storage.database.batches.MAX_RUNNER_LOSSES", 1000)
    batch = create_batch(client, make_lines(10))
    for attempt in range(60):
        runner = make_runner(context, max_open_jobs=4, heartbeat_timeout_seconds=0.05)
        method_names = (
            "save_line_outcomes",
            "update_batch_counts",
            "transition_batch",
            "delete_line_outcomes",
            "create_file",
        )
        fatal_method = method_names[attempt % len(method_names)]
        store = context.files if fatal_method == "create_file" else context.batches
        with monkeypatch.context() as patched:
            patched.setattr(store, fatal_method, die_after(getattr(store, fatal_method)))
            try:
                for _ in range(4):
                    runner.run_once()
                    time.sleep(0.01)
            except KeyboardInterrupt:
                pass
        for name in list(runner.active_batches):  # as the operating system does with the locks of a dead process
            runner.release_batch(name)
        time.sleep(0.06)
        if client.batches.retrieve(batch.id).status == "completed":
            break
    done = client.batches.retrieve(batch.id)
    assert done.status == "completed" and attempt > 3
    assert [line["custom_id"] for line in download_lines(client, done.output_file_id)] == [
        f"line {index}" for index in range(10)
    ]
    assert len(submitted_ids) == len(set(submitted_ids)) == 10 and (
        done.request_counts.completed,
        done.error_file_id,
    ) == (10, None)


def test_two_runners_complete_all_batches(client, context):
    runners = [make_runner(context).start() for _ in range(2)]
    try:
        batches = [create_batch(client, make_lines(3)) for _ in range(3)]
        for batch in batches:
            assert len(download_lines(client, wait_for_batch(client, batch).output_file_id)) == 3
    finally:
        for runner in runners:
            runner.stop()


# ---------------------------------------------------------------- webhooks


class WebhookReceiver(BaseHTTPRequestHandler):
    """Record webhooks in the server's `requests`; answer with its `statuses` first, and with 200 afterwards."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, dict(self.headers.items()), body))
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        self.send_response(status)
        self.send_header("Location", f"http://localhost:{self.server.server_address[1]}/elsewhere")
        self.send_header("Content-Length", "1000000000")
        self.end_headers()
        self.close_connection = True

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def receiver():
    server = ThreadingHTTPServer(("127.0.0.1", 0), WebhookReceiver)
    server.daemon_threads, server.block_on_close, server.requests, server.statuses = True, False, [], []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    server.address = f"http://localhost:{server.server_address[1]}"
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def sender(context):
    sender = WebhookSender(
        context.webhooks, context.jobs, ("localhost",), poll_seconds=0.05, first_retry_seconds=0.1
    ).start()
    yield sender
    sender.stop()


def test_a_webhook_reports_completed_and_failed_videos(client, service, receiver, sender, monkeypatch):
    hook = client.webhooks.create(
        name="mine", url=f"{receiver.address}/a?b=c", event_types=["video.completed", "video.failed"]
    )
    assert hook.signing_secret.startswith("whsec_")
    (listed,) = client.webhooks.list()
    assert listed.id == hook.id and not hasattr(listed, "signing_secret")
    done = client.videos.create_and_poll(prompt="a ball", **SMALL)
    with monkeypatch.context() as patched:
        patched.setattr(service[0].worker.renderer, "prepare_job", lambda job: (_ for _ in ()).throw(MemoryError))
        failed = client.videos.create_and_poll(prompt="a ball", **SMALL)
    wait_until(lambda: len(receiver.requests) == 2)
    client.webhooks.delete(hook.id)
    for (path, headers, body), video, kind in zip(
        receiver.requests, (done, failed), ("video.completed", "video.failed"), strict=True
    ):
        event = client.webhooks.unwrap(body, headers, secret=hook.signing_secret)
        assert (path, event.type, event.data.id, event.object) == ("/a?b=c", kind, video.id, "event")
        assert event.id == headers["webhook-id"] and abs(event.created_at - time.time()) < 60
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.unwrap(body + b" ", headers, secret=hook.signing_secret)


def test_a_webhook_is_retried_and_follows_no_redirect(client, receiver, sender):
    receiver.statuses[:] = [500, 302, 404]
    hook = client.webhooks.create(name="mine", url=receiver.address, event_types=["video.completed"])
    client.videos.create_and_poll(prompt="a ball", **SMALL)
    wait_until(lambda: len(receiver.requests) == 4)
    time.sleep(0.3)
    client.webhooks.delete(hook.id)
    assert {path for path, _, _ in receiver.requests} == {"/"} and len(receiver.requests) == 4
    assert len({headers["webhook-id"] for _, headers, _ in receiver.requests}) == 1
    assert len({body for _, _, body in receiver.requests}) == 1


def test_an_end_is_announced_once_even_if_the_sender_dies(client, context, receiver):
    hook = client.webhooks.create(name="mine", url=receiver.address, event_types=["video.completed"])
    sender = WebhookSender(context.webhooks, context.jobs, ("localhost",))
    sender.announce_ended_jobs()
    client.videos.create_and_poll(prompt="a ball", **SMALL)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(context.jobs, "mark_announced", lambda ids: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sender.announce_ended_jobs()
    others = [WebhookSender(context.webhooks, context.jobs, ("localhost",)) for _ in range(2)]
    for other in others:
        other.announce_ended_jobs()
    for other in others:
        other.send_due_deliveries()
    wait_until(lambda: receiver.requests)
    for other in others:
        other.executor.shutdown()
        other.send_due_deliveries()
    time.sleep(0.1)
    client.webhooks.delete(hook.id)
    assert len(receiver.requests) == 1


# ---------------------------------------------------------------- owners in turn


def test_chat_lines_and_many_batches_of_one_owner_delay_no_other_owner(service, client, context):
    """One owner has nine chat batches whose lines take long; the other's batch of one line is done meanwhile."""
    release = threading.Event()
    runner = make_runner(context)
    runner.answer_chat = lambda owner, body, line_key: release.wait(60) and {"object": "chat.completion"}
    runner.start()
    lines = make_lines(3, "/v1/chat/completions", messages=[{"role": "user", "content": "hello"}])
    try:
        bulk = [create_batch(client, lines, "/v1/chat/completions") for _ in range(9)]
        _, key = context.api_keys.create_key("somebody else")
        with make_client(service, key) as other:
            batch = create_batch(other, make_lines(1))
            assert wait_for_batch(other, batch).request_counts.completed == 1
        assert not release.is_set()
        release.set()
        assert all(wait_for_batch(client, batch).request_counts.completed == 3 for batch in bulk)
        release.clear()
        create_batch(client, lines, "/v1/chat/completions")
        wait_until(lambda: runner.chat_executor.num_threads)
        stopping_at = time.monotonic()
    finally:
        runner.stop()
    assert time.monotonic() - stopping_at < 5  # a line that is being answered does not delay the stop
    release.set()


def test_a_number_of_images_in_words_is_read_once(client, runner, context):
    """The ids of a line's jobs and the jobs themselves come from the same parsed request."""
    batch = create_batch(client, make_lines(1, "/v1/images/generations", n="3"), "/v1/images/generations")
    done = wait_for_batch(client, batch)
    (line,) = download_lines(client, done.output_file_id)
    assert len(line["response"]["body"]["data"]) == 3
    statuses, _ = context.jobs.list_owned_jobs("admin", "image", None, 100, True)
    assert len([status for status in statuses if status.created_at >= batch.created_at]) == 3
