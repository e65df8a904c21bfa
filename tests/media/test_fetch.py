"""Fetch media from a real HTTP server that misbehaves; each test is named after its attack."""

import gzip
import shutil
import socket
import ssl
import subprocess
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from omnivideo.errors import InvalidInput
from omnivideo.media.ingest import fetch_media

HOSTS = ("media.test", ".cdn.test")
BODY = bytes(range(256)) * 40
UNREACHED = "url: the host cannot be reached; allowed: a public address that responds"


class Site(BaseHTTPRequestHandler):
    """Each path is one behaviour; responses are written by hand, so that headers can be false."""

    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers)))
        path = self.path.strip("/").replace("-", "_").partition("?")[0]
        with suppress(BrokenPipeError, ConnectionResetError):  # the client has closed the connection
            getattr(self, path.partition("/")[0])(path.partition("/")[2])

    def log_message(self, *_: object) -> None:
        pass

    def send(self, *lines: str, body: bytes = b"") -> None:
        self.wfile.write("\r\n".join(["HTTP/1.1 200 OK", *lines, "", ""]).encode() + body)

    def good(self, _: str) -> None:
        self.send("Content-Type: image/png", f"Content-Length: {len(BODY)}", body=BODY)

    def typed(self, rest: str) -> None:
        kind = rest.replace("_", "-")
        self.send(f"Content-Type: {kind}; charset=x" if kind else "X: y", "Content-Length: 1", body=b"a")

    def unsized(self, _: str) -> None:
        self.send("Content-Type: video/mp4", body=BODY)

    def chunks(self, _: str) -> None:
        self.send("Content-Type: video/mp4", "Content-Length: 5", "Transfer-Encoding: chunked")
        for _ in range(1000):
            self.wfile.write(b"400\r\n" + bytes(1024) + b"\r\n")

    def short_length(self, _: str) -> None:
        self.send("Content-Type: video/mp4", "Content-Length: 5", body=BODY)

    def long_length(self, _: str) -> None:
        self.send("Content-Type: video/mp4", "Content-Length: 9000", body=b"a")

    def vast(self, _: str) -> None:
        self.send("Content-Type: video/mp4", f"Content-Length: {10**15}")

    def endless(self, _: str) -> None:
        self.send("Content-Type: video/mp4")
        while True:
            self.wfile.write(bytes(65536))

    def zipped(self, rest: str) -> None:
        bomb = gzip.compress(bytes(10**7))
        self.send("Content-Type: image/png", f"Content-Encoding: {rest}", f"Content-Length: {len(bomb)}", body=bomb)

    def trickle(self, _: str) -> None:
        self.send("Content-Type: image/png", "Content-Length: 10000")
        self.drip(b"a")

    def slow_head(self, _: str) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        self.drip(b"X: y\r\n")

    def drip(self, drop: bytes) -> None:
        for _ in range(200):
            self.wfile.write(drop)
            time.sleep(0.05)

    def silent(self, _: str) -> None:
        time.sleep(10)

    def long_head(self, _: str) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            self.wfile.write(b"X: " + b"y" * 65536 + b"\r\n")

    def no_http(self, _: str) -> None:
        self.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n")

    def status(self, rest: str) -> None:
        self.wfile.write(f"HTTP/1.1 {rest} X\r\nContent-Length: 0\r\n\r\n".encode())

    def hop(self, rest: str) -> None:
        """Redirect to the next smaller number, and finally to the valid file."""
        self.to("/good" if rest == "1" else f"/hop/{int(rest) - 1}")

    def away(self, _: str) -> None:
        self.to(self.server.away)

    def to(self, location: str) -> None:
        self.wfile.write(f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode())


@pytest.fixture(scope="module")
def server():
    served = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    served.daemon_threads, served.block_on_close = True, False
    served.seen = []
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield served
    served.shutdown()
    thread.join()
    served.server_close()


@pytest.fixture
def get(server):
    """Return a function that fetches a path; every allowed name resolves to 127.0.0.1, which is permitted."""
    port = server.server_address[1]

    def fetch(
        path: str, *, host: str = "media.test", max_bytes: int = 20_000, seconds: float = 5, **options: object
    ) -> bytes:
        usual = {"extra_ports": [port], "permitted_addresses": ["127.0.0.1"], "resolve": lambda name: ["127.0.0.1"]}
        return fetch_media(f"http://{host}:{port}/{path}", HOSTS, max_bytes, seconds, **(usual | options))

    server.seen.clear()
    return fetch


def fetch_refusal(get, path: str, **options: object) -> str:
    """Return the text of the refusal; check that it is one line with the field and without an address."""
    with pytest.raises(InvalidInput) as caught:
        get(path, **options)
    text = str(caught.value)
    assert text.startswith("url: ") and "\n" not in text and "127.0.0" not in text and "0x" not in text
    return text


# ---------------------------------------------------------------- valid responses


@pytest.mark.parametrize("path", ["good", "unsized", "good?a=b&c=%20d", "hop/1", "hop/3"])
def test_a_body_is_fetched(get, path):
    assert get(path) == BODY and get(path, max_bytes=len(BODY)) == BODY


def test_requests_send_no_credentials(get, server):
    get("good?a=b#fragment", host="a.cdn.test")
    path, headers = server.seen[-1]
    assert path == "/good?a=b" and headers["Host"] == f"a.cdn.test:{server.server_address[1]}"
    assert headers["Accept-Encoding"] == "identity" and not {"Cookie", "Authorization", "Referer"} & set(headers)


@pytest.mark.parametrize("kind", ["image/x-icon", "VIDEO/mp4", "application/octet-stream", "binary/octet-stream"])
def test_media_types_are_accepted(get, kind):
    assert get(f"typed/{kind}") == b"a"


# ---------------------------------------------------------------- attacks by the response


@pytest.mark.parametrize("kind", ["", "text/html", "application/x-python-pickle", "audio/mpeg", "image", "x/image/png"])
def test_attack_type_that_is_not_media(get, kind):
    assert "is not an image or video by its Content-Type; allowed: image/*" in fetch_refusal(get, f"typed/{kind}")


@pytest.mark.parametrize("path", ["good", "unsized", "chunks", "endless", "vast"])
def test_attack_body_above_the_cap(get, path):
    assert "has more than 9999 bytes; allowed: 1 to 9999" in fetch_refusal(get, path, max_bytes=9999)


def test_attack_content_length_that_lies(get):
    assert get("short-length") == BODY[:5]
    assert "has more than 9999 bytes" in fetch_refusal(get, "chunks", max_bytes=9999)
    assert "is incomplete" in fetch_refusal(get, "long-length")


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "GZIP", "gzip,identity"])
def test_attack_gzip_bomb(get, coding):
    assert "is sent compressed; allowed: the file without compression" in fetch_refusal(get, f"zipped/{coding}")


@pytest.mark.parametrize("path", ["trickle", "slow-head", "silent"])
def test_attack_slow_answer(get, path):
    started = time.monotonic()
    assert "takes more than 0.4 seconds; allowed: " in fetch_refusal(get, path, seconds=0.4)
    assert time.monotonic() - started < 4


@pytest.mark.parametrize("path", ["long-head", "no-http"])
def test_attack_answer_that_is_not_http(get, path):
    assert "is incomplete or is not HTTP; allowed: a complete response" in fetch_refusal(get, path)


@pytest.mark.parametrize("status", [204, 206, 304, 401, 404, 500])
def test_other_statuses_are_refused(get, status):
    assert f"responds with status {status}; allowed: 200" in fetch_refusal(get, f"status/{status}")


# ---------------------------------------------------------------- attacks by redirect


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("http://127.0.0.1/", "host that"),
        ("http://169.254.169.254/latest/meta-data/", "host that"),
        ("http://[::1]/", "host that"),
        ("http://[::ffff:10.0.0.1]/", "host that"),
        ("http://2130706433/", "host that"),
        ("//evil.test/", "host that"),
        ("http://user:password@media.test/", "user name"),
        ("file:///etc/passwd", "another scheme"),
        ("gopher://media.test/", "another scheme"),
        ("http://media.test:22/", "another port"),
        ("http://media.test\\@evil.test/", "is not a URL"),
        ("http://[media.test/", "is not a URL"),
        ("http://m\u00e9dia.test/", "is not a URL"),
    ],
)
def test_attack_redirect(get, server, location, message):
    server.away = location
    assert message in fetch_refusal(get, "away")
    assert len(server.seen) == 1


def test_attack_redirect_to_an_allowed_name_at_an_internal_address(get, server):
    server.away = f"http://inner.cdn.test:{server.server_address[1]}/good"
    inside = {"media.test": ["127.0.0.1"], "inner.cdn.test": ["169.254.169.254"]}
    assert fetch_refusal(get, "away", resolve=inside.__getitem__) == UNREACHED
    assert len(server.seen) == 1


def test_attack_redirect_without_end(get, server):
    assert "is redirected more than 3 times; allowed: " in fetch_refusal(get, "hop/4")
    assert len(server.seen) == 4


# ---------------------------------------------------------------- attacks by name resolution


def test_attack_rebinding(get, server):
    """The name resolves to a permitted address at first, and to an internal one afterwards."""
    answers = iter([["127.0.0.1"], ["127.0.0.2"], ["127.0.0.2"]])
    assert get("good", resolve=lambda name: next(answers)) == BODY
    assert next(answers) == ["127.0.0.2"]


def test_attack_rebinding_between_the_check_and_the_connection(get, monkeypatch):
    asked, real = [], socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **more: asked.append(host) or real(host, *rest, **more)
    )
    assert get("good") == BODY
    assert set(asked) == {"127.0.0.1"}


def test_attack_rebinding_at_a_redirect(get, server):
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])
    assert fetch_refusal(get, "hop/1", resolve=lambda name: next(answers)) == UNREACHED
    assert len(server.seen) == 1


def test_attack_port_scan_closed_and_refused_ports_give_the_same_error(get):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound but not listening, so connections are refused
        closed = held.getsockname()[1]
        url, rest = f"http://media.test:{closed}/", {"extra_ports": [closed], "resolve": lambda name: ["127.0.0.1"]}
        for permitted in (["127.0.0.1"], []):
            with pytest.raises(InvalidInput) as caught:
                fetch_media(url, HOSTS, 100, 2, permitted_addresses=permitted, **rest)
            assert str(caught.value) == UNREACHED


def test_the_second_address_is_tried(get):
    assert (
        get("good", permitted_addresses=["127.0.0.1", "127.0.0.9", "::1"], resolve=lambda _: ["::1", "127.0.0.1"])
        == BODY
    )


def test_attack_proxy_from_the_environment(get, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert get("good") == BODY


# ---------------------------------------------------------------- TLS


@pytest.fixture(scope="module")
def secure(tmp_path_factory):
    """Yield the port of the same site with a self-signed certificate for media.test, and a context that trusts it."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed, so there is no certificate; fetching over TLS was not tested")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-keyout", "key", "-out", "cert", "-subj", "/CN=media.test", "-addext", "subjectAltName=DNS:media.test"],
        cwd=folder, check=True, capture_output=True, timeout=30,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert", folder / "key")
    served = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    served.daemon_threads, served.block_on_close = True, False
    served.seen, served.handle_error = [], lambda *_: None
    served.socket = context.wrap_socket(served.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield served.server_address[1], ssl.create_default_context(cafile=folder / "cert")
    served.shutdown()
    thread.join()
    served.server_close()


def fetch_over_tls(secure, host: str, **options: object) -> bytes:
    port, trusted = secure
    usual = {
        "extra_ports": [port],
        "permitted_addresses": ["127.0.0.1"],
        "resolve": lambda _: ["127.0.0.1"],
        "tls_context": trusted,
    }
    return fetch_media(f"https://{host}:{port}/good", HOSTS, 20_000, 5, **(usual | options))


def test_tls_connects_to_the_checked_address(secure):
    assert fetch_over_tls(secure, "media.test") == BODY


@pytest.mark.parametrize(("host", "options"), [("a.cdn.test", {}), ("media.test", {"tls_context": None})])
def test_attack_invalid_certificate(secure, host, options):
    """Try a name that the certificate does not include, and a certificate that is not trusted."""
    with pytest.raises(InvalidInput) as caught:
        fetch_over_tls(secure, host, **options)
    assert str(caught.value) == UNREACHED
