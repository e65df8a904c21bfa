"""Attacks through URLs: requests and webhooks that point into the operator's network (SSRF)."""

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from omnivideo.backends.webhooks import WebhookSender, check_reachable, parse_webhook_url, send_event, sign_event
from omnivideo.errors import InvalidInput
from omnivideo.media.fetch import resolve_addresses
from tests.support.attacks import INTERNAL_DETAIL, INTERNAL_HOSTS, assert_refused
from tests.support.openai_service import download_lines, make_lines, make_png, make_runner, wait_for_batch, wait_until


class RecordingHandler(BaseHTTPRequestHandler):
    """A service in the internal network that records the requests it gets."""

    def do_GET(self) -> None:
        self.server.seen.append(self.path)
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.end_headers()
        self.wfile.write(make_png())

    do_POST = do_GET

    def log_message(self, *args: object) -> None: ...


@pytest.fixture(scope="module")
def inner():
    """Yield a running service in the internal network; its `seen` lists the requested paths."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), RecordingHandler)
    server.daemon_threads, server.block_on_close, server.seen = True, False, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("host", INTERNAL_HOSTS)
def test_ssrf_through_an_input_reference(http, inner, host):
    url = f"http://{host}:{inner.server_address[1]}/a.png"
    body = {"prompt": "a", "input_reference": {"image_url": url}}
    assert_refused(http.post("/v1/videos", json=body), "input_reference.image_url")
    assert_refused(http.post("/v1/images/edits", json={"prompt": "a", "image": {"image_url": url}}), "image.image_url")
    assert not inner.seen


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://x/a.png", "/etc/passwd", "data:text/html;base64,AAAA", "http:a"]
)
def test_malformed_url(http, url):
    message = assert_refused(
        http.post("/v1/videos", json={"prompt": "a", "input_reference": {"image_url": url}}),
        "input_reference.image_url",
    )
    assert "root:" not in message


def test_ssrf_through_batch_lines(client, context, inner):
    urls = [f"http://{host}:{inner.server_address[1]}/a.png" for host in INTERNAL_HOSTS] + ["file:///etc/passwd"]
    data = b"".join(
        make_lines(1, input_reference={"image_url": url}).replace(b"line 0", str(index).encode())
        for index, url in enumerate(urls)
    )
    file = client.files.create(file=("a.jsonl", data), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/videos", completion_window="24h")
    runner = make_runner(context).start()
    try:
        done = wait_for_batch(client, batch)
    finally:
        runner.stop()
    failed_lines = download_lines(client, done.error_file_id)
    assert len(failed_lines) == len(urls) and not done.output_file_id and not inner.seen
    for line in failed_lines:
        error = line["response"]["body"]["error"]
        assert error["param"] == "input_reference.image_url" and not INTERNAL_DETAIL.search(json.dumps(error))


def test_batch_line_with_another_url(client, context, inner):
    url = f"http://127.0.0.1:{inner.server_address[1]}/v1/videos"
    file = client.files.create(file=("a.jsonl", make_lines(1, url)), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/videos", completion_window="24h")
    runner = make_runner(context).start()
    try:
        failed = wait_for_batch(client, batch, "failed")
    finally:
        runner.stop()
    assert failed.errors.data[0].param == "url" and not inner.seen


@pytest.mark.parametrize("host", INTERNAL_HOSTS)
@pytest.mark.parametrize("port", ["", "inner"])
def test_ssrf_through_a_webhooks_url(http, inner, host, port):
    url = f"http://{host}{':' + str(inner.server_address[1]) if port else ''}/"
    assert_refused(http.post("/v1/webhooks", json={"url": url}), "url")
    assert not inner.seen


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "gopher://1.1.1.1/", "https://u:p@1.1.1.1/", "https://1.1.1.1:22/", "https://1.1.1.1\\@x/",
     "https://[1.1.1.1/", "https://1.1.1.1/a b", "https://1.1.1.1/\r\nX: y", "//1.1.1.1", "https://", "https://ä.test/"],
)  # fmt: skip
def test_webhook_url_with_another_scheme_port_or_form(http, url):
    assert_refused(http.post("/v1/webhooks", json={"url": url}), "url")


def test_webhook_host_that_later_resolves_to_an_internal_address(context, inner, monkeypatch):
    """The host was public when the webhook was created. Each delivery resolves it again and uses that address."""
    answers = iter([["1.1.1.1"], ["127.0.0.1"]])
    monkeypatch.setattr("omnivideo.backends.webhooks.resolve_addresses", lambda host: next(answers))
    check_reachable("http://hook.test/")
    with pytest.raises(Exception, match=r"^$"):
        send_event("http://hook.test/", "whsec_AAAA", "evt_1", {"a": 1}, ())
    assert not inner.seen and parse_webhook_url("http://hook.test/", ())[1] == "hook.test"
    with pytest.raises(InvalidInput):
        send_event(f"http://hook.test:{inner.server_address[1]}/", "whsec_AAAA", "evt_1", {"a": 1}, ())


def test_redirect_of_a_webhook_to_an_internal_address(context, inner):
    """A redirect is not followed, and its body is not read."""
    port = inner.server_address[1]

    class RedirectingHandler(RecordingHandler):
        def do_POST(self) -> None:
            self.send_response(307)
            self.send_header("Location", f"http://127.0.0.1:{port}/")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), RedirectingHandler)
    server.daemon_threads, server.block_on_close = True, False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        url = f"http://localhost:{server.server_address[1]}/"
        assert send_event(url, "whsec_AAAA", "evt_1", {"a": 1}, ("localhost",)) == 307
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert not inner.seen


def test_webhook_that_never_answers(context, monkeypatch):
    monkeypatch.setattr("omnivideo.backends.webhooks.DELIVERY_TIMEOUT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started_at = time.monotonic()
        with pytest.raises(Exception, match=r"^$|timed out"):
            send_event(f"http://localhost:{silent.getsockname()[1]}/", "whsec_AAAA", "evt_1", {}, ("localhost",))
        assert time.monotonic() - started_at < 3
    assert resolve_addresses("localhost")


def test_signatures_follow_the_standard():
    """The expected signature is the example in the specification of standardwebhooks.com."""
    body = b'{"test": 2432232314}'
    signature = sign_event("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body)
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_the_sender_continues_after_an_error(context):
    sender = WebhookSender(context.webhooks, context.jobs, poll_seconds=0.01)
    calls = []
    sender.jobs = type("Broken", (), {"list_unannounced_jobs": lambda *arguments: calls.append(1) or 1 / 0})()
    sender.start()
    wait_until(lambda: len(calls) > 2)
    sender.stop()
