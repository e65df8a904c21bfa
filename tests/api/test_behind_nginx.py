"""A front end of another origin in a real browser, and nginx with TLS, as documented, in another network namespace."""

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from tests.support.browser import chromium
from tests.support.openai_service import KEY
from tests.support.proxy import HOST_ADDRESS, IN_NAMESPACE, PROXY_ADDRESS, proxy_network, run_nginx

PAGE = Path(__file__).parents[1] / "support" / "front_end.html"
PORT = 8000  # in the documented configuration
MAX_UPLOAD_BYTES = 2**20


@contextmanager
def run_service(folder: Path, **settings: str):
    """Run `omnivideo serve` with the shipped weights, where only the proxy reaches it."""
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "OMNIVIDEO_HOME": str(folder / "home"),
        "OMNIVIDEO_ADMIN_KEY": KEY, "OMNIVIDEO_TRUSTED_PROXIES": PROXY_ADDRESS,
    } | settings  # fmt: skip
    command = [sys.executable, "-m", "omnivideo.cli", "serve", "--host", HOST_ADDRESS, "--port", str(PORT)]
    with (folder / "service.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        with httpx.Client(trust_env=False) as http:
            while True:
                try:
                    if http.get(f"http://{HOST_ADDRESS}:{PORT}/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                assert process.poll() is None and time.monotonic() < deadline, (folder / "service.log").read_text()
                time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait(60)


class FrontEndServer(ThreadingHTTPServer):
    """Serves the page and its settings, and receives what it saw."""

    def __init__(self) -> None:
        super().__init__((HOST_ADDRESS, 0), FrontEndHandler)
        self.origin = f"http://{HOST_ADDRESS}:{self.server_port}"
        self.settings, self.report = dict[str, object](), dict[str, dict]()
        self.is_done = threading.Event()


class FrontEndHandler(BaseHTTPRequestHandler):
    server: FrontEndServer

    def do_GET(self) -> None:
        is_page = self.path == "/"
        self.answer(PAGE.read_bytes() if is_page else json.dumps(self.server.settings).encode(), is_page)

    def do_POST(self) -> None:
        self.server.report = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer(b"{}", False)
        self.server.is_done.set()

    def answer(self, data: bytes, is_page: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8" if is_page else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


def open_page(front_end: FrontEndServer, folder: Path, options: list[str]) -> None:
    """Open the page in headless Chromium, and wait until it has reported what it saw.

    Chromium runs beside the proxy: it drops its connections when an interface of its namespace appears or goes, and
    another program, such as Docker, may add one to this machine at any time.
    """
    common = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-proxy-server",
        f"--user-data-dir={folder / 'profile'}",
    ]
    command = [
        *IN_NAMESPACE,
        chromium(),
        *common,
        "--autoplay-policy=no-user-gesture-required",
        *options,
        front_end.origin,
    ]
    with (folder / "browser.log").open("wb") as log:
        process = subprocess.Popen([*command[:-1], "--remote-debugging-port=0", command[-1]], stdout=log, stderr=log)
    try:
        assert front_end.is_done.wait(240), (folder / "browser.log").read_text()[-3000:]
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Return what the page saw, and the requests in nginx's log."""
    folder = tmp_path_factory.mktemp("proxy")
    chromium()
    with proxy_network(), run_nginx(folder) as (address, options):
        front_end = FrontEndServer()
        threading.Thread(target=front_end.serve_forever, daemon=True).start()
        settings = {
            "OMNIVIDEO_PUBLIC_URL": address, "OMNIVIDEO_CORS_ORIGINS": front_end.origin,
            "OMNIVIDEO_MAX_UPLOAD_BYTES": str(MAX_UPLOAD_BYTES),
        }  # fmt: skip
        front_end.settings = {"address": address, "key": KEY, "maxUploadBytes": MAX_UPLOAD_BYTES}
        with run_service(folder, **settings):
            open_page(front_end, folder, options)
    front_end.shutdown()
    front_end.server_close()
    return front_end.report | {"log": (folder / "access.log").read_text().splitlines(), "address": address}


def test_every_step_of_the_page_succeeded(report):
    assert not {name: result for name, result in report.items() if isinstance(result, dict) and "failed" in result}
    statuses = [line.rpartition(" ")[2] for line in report["log"]]
    assert statuses and all(status < "500" for status in statuses)
    assert any(line.startswith("OPTIONS /v1/chat/completions 200") for line in report["log"]), "the page asked first"


def test_links_lead_through_the_proxy_and_show_media(report):
    for address in (report["preview"], report["clip"], report["images"]["url"]):
        assert address.startswith(f"{report['address']}/v1/") and "signature=" in address
    media = report["media"]
    assert media["picture"] == {"width": 64, "height": 64} and len(media["pictureWithPixels"]["pixel"]) == 4
    for clip in (media["clip"], media["clipOfAnotherOrigin"]):
        assert clip["width"] == clip["height"] == 64 and clip["time"] == pytest.approx(clip["duration"] / 2)
    assert report["images"]["shown"] == {"width": 640, "height": 360}
    assert (report["videos"]["shown"]["width"], report["videos"]["sync"]) == (640, [200, "video/mp4"])


def test_links_are_signed_where_keys_are_on(report):
    links = report["links"]
    assert links["signed"][:2] == [200, "video/mp4"] and links["withKey"] == 200
    assert (links["forged"]["status"], links["forged"]["error"]["code"]) == (403, "invalid_link")
    assert (links["bare"]["status"], links["bare"]["error"]["code"]) == (401, "invalid_api_key")


def test_events_arrive_while_they_happen(report):
    for times in (report["chat"]["times"], report["events"]["times"]):
        assert len(set(times)) >= 8 and times[-1] - times[0] > 300, times
    ids = report["events"]["ids"]
    assert ids == list(range(1, len(ids) + 1)), "a stream continues after the last event"
    assert (report["events"]["last"], report["events"]["after"]) == ("done", 204)


def test_ranges_heads_and_caches(report):
    ranges = report["ranges"]
    size = ranges["size"]
    assert ranges["part"] == [206, f"bytes 4-7/{size}", "ftyp"]
    assert ranges["last"] == [206, f"bytes {size - 3}-{size - 1}/{size}", 3]
    assert ranges["outside"] == [416, f"bytes */{size}"]
    assert ranges["head"] == [200, size, ranges["etag"], 0] and ranges["unchanged"] == [304, 304]
    assert report["cache"][0] == report["cache"][1] > 0
    preview = report["preview"].removeprefix(report["address"]).partition("?")[0]
    assert f"GET {preview} 304" in report["log"], "the browser's own cache asks whether it is current"


def test_files_are_uploaded_and_refused_in_words(report):
    uploads = report["uploads"]
    assert uploads["file"]["bytes"] == uploads["size"] == uploads["sent"] > 0 and "picture.png" in uploads["name"]
    assert uploads["edited"] == {"width": 64, "height": 64}
    for refused in (uploads["tooLarge"], uploads["tooLargeJSON"]):
        assert (refused["status"], refused["error"]["code"]) == (413, "too_large")
        assert str(MAX_UPLOAD_BYTES) in refused["error"]["message"]
    assert (uploads["unreadable"]["status"], uploads["unreadable"]["error"]["param"]) == (400, "file")


def test_a_page_can_read_every_refusal(report):
    statuses = {name: refused["status"] for name, refused in report["errors"].items()}
    assert statuses == {"wrongKey": 401, "wrongKeyPost": 401, "missing": 404, "invalid": 400, "method": 405}
    for refused in report["errors"].values():
        assert refused["error"]["message"] and len(refused["headers"]["x-request-id"]) == 32
    assert "GET" in report["errors"]["method"]["headers"]["allow"]
