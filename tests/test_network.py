"""Every HTTP client has the same idea of proxies and of trust."""

import re
import shutil
import ssl
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from omnivideo import Client
from omnivideo.backends.mllm.remote import RemoteMLLM
from omnivideo.contracts import MLLMRequest
from omnivideo.errors import InvalidInput, ModelUnavailable, StoreError
from omnivideo.network import create_tls_context, find_proxy
from omnivideo.storage.objects.s3 import S3ObjectStore
from tests.support.servers import free_port

PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Remove what this machine says about proxies."""
    for name in (*PROXY_VARIABLES, *map(str.lower, PROXY_VARIABLES), "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    create_tls_context.cache_clear()
    yield monkeypatch
    create_tls_context.cache_clear()


class ProxyHandler(BaseHTTPRequestHandler):
    """Answers as a proxy that reaches a service: it is asked for whole addresses."""

    def do_GET(self) -> None:
        self.server.asked_for.append(self.path)
        self.send_response(404)
        self.end_headers()
        self.wfile.write(b'{"error": {"message": "not here"}}')

    do_POST = do_GET

    def log_message(self, *arguments: object) -> None:
        """Write nothing."""


@pytest.fixture
def proxy():
    """Yield a proxy, which lists what it was asked for."""
    server = HTTPServer(("127.0.0.1", 0), ProxyHandler)
    server.asked_for = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_outside_addresses_are_reached_through_the_proxy(environment, proxy):
    environment.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.server_port}")
    with Client("http://video.example.test") as client, pytest.raises(InvalidInput, match="thread"):
        client.open_thread("nothing")
    mllm = RemoteMLLM("http://mllm.example.test", None)
    assert mllm.fetch_metrics() == ""
    mllm.close()
    store = S3ObjectStore("http://s3.example.test", "omnivideo", "key", "secret")
    with pytest.raises(StoreError):
        store.get("0" * 64 + ".png")
    assert [address.split("/")[2] for address in proxy.asked_for][:3] == [
        "video.example.test", "mllm.example.test", "s3.example.test",
    ]  # fmt: skip


LOCAL = [
    "http://127.0.0.1:8000",
    "http://localhost:8000",
    "http://[::1]:8000",
    "http://mllm:8001",
    "https://x.localhost",
]


@pytest.mark.parametrize("address", LOCAL)
def test_this_machine_and_its_neighbours_are_reached_directly(environment, address):
    for name in ("HTTP_PROXY", "HTTPS_PROXY"):
        environment.setenv(name, "http://proxy.example.test:3128")
    environment.setenv("ALL_PROXY", "socks://127.0.0.1:1080")
    assert find_proxy(address) is None
    Client(address).close()


def test_no_proxy_is_respected(environment):
    environment.setenv("ALL_PROXY", "http://proxy.example.test:3128")
    environment.setenv("NO_PROXY", "inside.test")
    assert find_proxy("https://video.inside.test") is None
    assert find_proxy("https://video.example.test") == "http://proxy.example.test:3128"


@pytest.mark.parametrize(
    ("variable", "proxy", "message"),
    [
        ("ALL_PROXY", "socks://user:secret@127.0.0.1:1080", "the proxy socks://127.0.0.1:1080 cannot be used"),
        ("HTTPS_PROXY", "socks5h://proxy.test", "the proxy socks5h://proxy.test cannot be used"),
        ("HTTPS_PROXY", "http://:notaport", "it is not the address of a proxy"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_named_in_one_line(environment, variable, proxy, message):
    environment.setenv(variable, proxy)
    with pytest.raises(InvalidInput) as raised:
        Client("https://video.example.test")
    allowed = "allowed: an address that begins with http:// or https://, or unset it"
    assert str(raised.value) == f"{variable}: {message}; {allowed}"


def test_an_address_is_checked():
    with pytest.raises(InvalidInput, match="address: 'localhost:8000' is not one"):
        Client("localhost:8000")


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory):
    """Yield the address of a server with a certificate of its own, and the certificate's path."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed: refused certificates were not tested")
    folder, port = tmp_path_factory.mktemp("tls"), free_port()
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-keyout", folder / "key", "-out", folder / "cert"]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert", folder / "key")
    server = HTTPServer(("127.0.0.1", port), ProxyHandler)
    server.asked_for = []
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"https://127.0.0.1:{port}", folder / "cert"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_refused_certificate_is_said_as_such(environment, tls_server):
    address, _ = tls_server
    refusal = r"certificate.* is not trusted \(.*self.signed.*\); trust its authority with SSL_CERT_FILE"
    with Client(address) as client, pytest.raises(StoreError, match=f"service: its {refusal}"):
        client.open_thread()
    mllm = RemoteMLLM(address, None)
    with pytest.raises(ModelUnavailable, match=refusal):
        mllm.route(MLLMRequest(text="a red ball"))
    assert re.fullmatch(f"its {refusal}", mllm.describe_state()) and not mllm.is_ready()  # what /ready says
    mllm.close()
    with pytest.raises(StoreError, match=refusal):
        S3ObjectStore(address, "omnivideo", "key", "secret").get("0" * 64 + ".png")


def test_an_authority_is_trusted_by_every_client(environment, tls_server):
    address, certificate = tls_server
    environment.setenv("SSL_CERT_FILE", str(certificate))
    with Client(address) as client, pytest.raises(InvalidInput, match="there is no thread 'nothing'"):
        client.open_thread("nothing")
    mllm = RemoteMLLM(address, None)
    with pytest.raises(ModelUnavailable, match="does not know our protocol"):
        mllm.route(MLLMRequest(text="a red ball"))
    mllm.close()
    with pytest.raises(StoreError) as raised:
        S3ObjectStore(address, "omnivideo", "key", "secret").get("0" * 64 + ".png")
    assert "certificate" not in str(raised.value)


def test_a_missing_file_of_authorities_is_named(environment, tmp_path):
    environment.setenv("SSL_CERT_FILE", str(tmp_path / "none"))
    with pytest.raises(InvalidInput, match=r"SSL_CERT_FILE: .* cannot be read"):
        create_tls_context()
