"""Batches and webhooks with the unmodified openai client, including runners that die in between."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai
import pytest

from omnivideo.backends.webhooks import WebhookSender
from omnivideo.storage.database.jobs import JobRepository
from tests.support.openai_service import SMALL, batch_of, ended, lines, nobody_works, runner_for, told, until

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


@pytest.fixture
def runner(context):
    runner = runner_for(context).start()
    yield runner
    runner.stop()


def test_a_batch_of_videos(client, runner):
    wrong = lines(1, num_frames=8).replace(b"line 0", b"wrong")
    batch = batch_of(client, lines(3) + b"\n" + wrong)
    assert batch.status == "validating" and batch.metadata == {"for": "tests"}
    done = ended(client, batch)
    counts = done.request_counts
    assert (counts.total, counts.completed, counts.failed) == (4, 3, 1)
    good, bad = told(client, done.output_file_id), told(client, done.error_file_id)
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


def test_a_batch_of_images_and_one_of_chat(client, http, runner):
    pictures = batch_of(client, lines(2, "/v1/images/generations", n=2), "/v1/images/generations")
    talk = b"".join(
        lines(1, "/v1/chat/completions", messages=[{"role": "user", "content": text}]).replace(b"line 0", text.encode())
        for text in ("hello", "bad")
    )
    chat = batch_of(client, talk, "/v1/chat/completions")
    for line in told(client, ended(client, pictures).output_file_id):
        urls = [one["url"] for one in line["response"]["body"]["data"]]
        assert len(urls) == 2 and all(http.get(url).headers["content-type"] == "image/png" for url in urls)
    done = ended(client, chat)
    assert told(client, done.output_file_id)[0]["response"]["body"]["said"] == "hello"
    assert told(client, done.error_file_id)[0]["response"]["body"]["error"]["param"] == "messages"


WRONG_LINES = [
    (b"{", "line: it is not valid JSON"),
    (b"[1]", "line: it is not a JSON object"),
    (b"{}", "custom_id: field required"),
    (lines(1).replace(b"POST", b"GET"), "method: input should be 'POST'"),
    (lines(1, "/v1/images/generations"), "url: it is /v1/images/generations"),
    (lines(1).replace(b"/v1/videos", b"http://127.0.0.1/"), "url: input should be"),
    (lines(1).replace(b"line 0", b"line 1"), "custom_id: 'line 1' is already used by an earlier line"),
    (b'{"a":' * 100_000, "line: it is not valid JSON"),
]  # fmt: skip


def test_wrong_lines_fail_the_batch_with_their_numbers(client, runner):
    data = lines(2) + b"\n".join(line.strip() for line, _ in WRONG_LINES)
    failed = ended(client, batch_of(client, data), "failed")
    assert [one.line for one in failed.errors.data] == [at + 3 for at in range(len(WRONG_LINES))]
    for error, (_, text) in zip(failed.errors.data, WRONG_LINES, strict=True):
        assert error.message.startswith(text)
    assert not failed.output_file_id and failed.failed_at


def test_a_batch_without_lines_and_one_with_too_many(client, runner, monkeypatch):
    monkeypatch.setattr("omnivideo.backends.batches.runner.MAX_BATCH_LINES", 3)
    empty, full = (ended(client, batch_of(client, data), "failed") for data in (b"\n \n", lines(4)))
    assert [one.errors.data[0].code for one in (empty, full)] == ["empty", "too_many_lines"]


def test_a_batch_is_cancelled(client, service, context):
    runner = runner_for(context, max_open_jobs=2).start()
    try:
        with nobody_works(service[0]):
            batch = batch_of(client, lines(5))
            until(lambda: client.batches.retrieve(batch.id).status == "in_progress")
            assert client.batches.cancel(batch.id).status == "cancelling"
            done = ended(client, batch, "cancelled")
    finally:
        runner.stop()
    assert done.request_counts.failed == 5 and not done.output_file_id
    assert {line["error"]["code"] for line in told(client, done.error_file_id)} == {"batch_cancelled"}
    assert client.batches.cancel(batch.id).status == "cancelled"


def test_a_batch_expires(client, service, context, monkeypatch):
    runner = runner_for(context, max_open_jobs=2)
    with nobody_works(service[0]):
        batch = batch_of(client, lines(4))
        for _ in range(3):
            runner.run_once()
        monkeypatch.setattr("omnivideo.backends.batches.runner.COMPLETION_WINDOW_SECONDS", -1.0)
        until(lambda: (runner.run_once(), client.batches.retrieve(batch.id).status == "expired")[1])
    done = client.batches.retrieve(batch.id)
    assert {line["error"]["code"] for line in told(client, done.error_file_id)} == {"batch_expired"}
    assert len(told(client, done.error_file_id)) == 4 and done.expired_at


def test_a_batch_waits_for_room(client, context):
    runner = runner_for(context)
    runner.jobs.max_open_jobs_per_owner = 1
    runner.start()
    try:
        done = ended(client, batch_of(client, lines(4)))
    finally:
        runner.stop()
    assert len(told(client, done.output_file_id)) == 4 and not done.error_file_id


def deadly(act):
    """The act, after which its caller is no more: nothing there catches this."""

    def died(*given, **more):
        act(*given, **more)
        raise KeyboardInterrupt

    return died


def test_a_batch_whose_runner_dies_is_taken_over_and_no_line_is_done_twice(client, context, monkeypatch):
    """Each runner dies after a few rounds, in the middle of whatever it does; nothing of it is stopped or told."""
    drawn: list[str] = []
    submit = JobRepository.submit
    monkeypatch.setattr(
        JobRepository, "submit", lambda self, job, *rest: submit(self, job, *rest) and not drawn.append(job.id)
    )
    batch = batch_of(client, lines(10))
    for at in range(60):
        runner = runner_for(context, max_open_jobs=4, heartbeat_timeout_seconds=0.05)
        acts = ("save_line_outcomes", "update_batch_counts", "transition_batch", "delete_line_outcomes", "create_file")
        dies = acts[at % len(acts)]
        store = context.files if dies == "create_file" else context.batches
        with monkeypatch.context() as mortal:
            mortal.setattr(store, dies, deadly(getattr(store, dies)))
            try:
                for _ in range(4):
                    runner.run_once()
                    time.sleep(0.01)
            except KeyboardInterrupt:
                pass
        for name in list(runner.active_batches):  # the system closes a dead process's files
            runner.release_batch(name)
        time.sleep(0.06)
        if client.batches.retrieve(batch.id).status == "completed":
            break
    done = client.batches.retrieve(batch.id)
    assert done.status == "completed" and at > 3
    assert [line["custom_id"] for line in told(client, done.output_file_id)] == [f"line {at}" for at in range(10)]
    assert len(drawn) == len(set(drawn)) == 10 and (done.request_counts.completed, done.error_file_id) == (10, None)


def test_two_runners_share_what_there_is(client, context):
    runners = [runner_for(context).start() for _ in range(2)]
    try:
        batches = [batch_of(client, lines(3)) for _ in range(3)]
        for batch in batches:
            assert len(told(client, ended(client, batch).output_file_id)) == 3
    finally:
        for runner in runners:
            runner.stop()


# ---------------------------------------------------------------- webhooks


class Ear(BaseHTTPRequestHandler):
    """Hears webhooks; the server's `answers` are the first statuses, 200 afterwards."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.heard.append((self.path, dict(self.headers.items()), body))
        status = self.server.answers.pop(0) if self.server.answers else 200
        self.send_response(status)
        self.send_header("Location", f"http://localhost:{self.server.server_address[1]}/elsewhere")
        self.send_header("Content-Length", "1000000000")
        self.end_headers()
        self.close_connection = True

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def ear():
    served = ThreadingHTTPServer(("127.0.0.1", 0), Ear)
    served.daemon_threads, served.block_on_close, served.heard, served.answers = True, False, [], []
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    served.address = f"http://localhost:{served.server_address[1]}"
    yield served
    served.shutdown()
    thread.join()
    served.server_close()


@pytest.fixture
def sender(context):
    sender = WebhookSender(
        context.webhooks, context.jobs, ("localhost",), poll_seconds=0.05, first_retry_seconds=0.1
    ).start()
    yield sender
    sender.stop()


def test_a_webhook_tells_of_completed_and_failed_videos(client, service, ear, sender, monkeypatch):
    hook = client.webhooks.create(
        name="mine", url=f"{ear.address}/a?b=c", event_types=["video.completed", "video.failed"]
    )
    assert hook.signing_secret.startswith("whsec_")
    (seen,) = client.webhooks.list()
    assert seen.id == hook.id and not hasattr(seen, "signing_secret")
    done = client.videos.create_and_poll(prompt="a ball", **SMALL)
    with monkeypatch.context() as patched:
        patched.setattr(service[0].worker.renderer, "prepare_job", lambda job: (_ for _ in ()).throw(MemoryError))
        failed = client.videos.create_and_poll(prompt="a ball", **SMALL)
    until(lambda: len(ear.heard) == 2)
    client.webhooks.delete(hook.id)
    for (path, headers, body), video, kind in zip(
        ear.heard, (done, failed), ("video.completed", "video.failed"), strict=True
    ):
        event = client.webhooks.unwrap(body, headers, secret=hook.signing_secret)
        assert (path, event.type, event.data.id, event.object) == ("/a?b=c", kind, video.id, "event")
        assert event.id == headers["webhook-id"] and abs(event.created_at - time.time()) < 60
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.unwrap(body + b" ", headers, secret=hook.signing_secret)


def test_a_webhook_is_tried_again_and_never_sent_elsewhere(client, ear, sender):
    ear.answers[:] = [500, 302, 404]
    hook = client.webhooks.create(name="mine", url=ear.address, event_types=["video.completed"])
    client.videos.create_and_poll(prompt="a ball", **SMALL)
    until(lambda: len(ear.heard) == 4)
    time.sleep(0.3)
    client.webhooks.delete(hook.id)
    assert {path for path, _, _ in ear.heard} == {"/"} and len(ear.heard) == 4
    assert len({headers["webhook-id"] for _, headers, _ in ear.heard}) == 1
    assert len({body for _, _, body in ear.heard}) == 1


def test_an_end_is_announced_once_whoever_dies(client, context, ear):
    hook = client.webhooks.create(name="mine", url=ear.address, event_types=["video.completed"])
    sender = WebhookSender(context.webhooks, context.jobs, ("localhost",))
    sender.announce_ended_jobs()
    client.videos.create_and_poll(prompt="a ball", **SMALL)
    with pytest.MonkeyPatch.context() as mortal:
        mortal.setattr(context.jobs, "mark_announced", lambda ids: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sender.announce_ended_jobs()
    others = [WebhookSender(context.webhooks, context.jobs, ("localhost",)) for _ in range(2)]
    for other in others:
        other.announce_ended_jobs()
    for other in others:
        other.send_due_deliveries()
    until(lambda: ear.heard)
    for other in others:
        other.executor.shutdown()
        other.send_due_deliveries()
    time.sleep(0.1)
    client.webhooks.delete(hook.id)
    assert len(ear.heard) == 1
