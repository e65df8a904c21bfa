"""A stand-in for the Hugging Face hub on this machine: the routes that huggingface_hub uses to download a repository.

    GET  /api/models/OWNER/NAME/revision/REVISION?blobs=true     the commit, and the files with their checksums
    HEAD /OWNER/NAME/resolve/COMMIT/FILE                         etag, size and commit
    GET  /OWNER/NAME/resolve/COMMIT/FILE                         the bytes, from an offset if the request has a Range

It can cut a connection after some bytes, send wrong bytes, and refuse a repository.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE_BYTES = 2000  # a larger file is stored in LFS and has a SHA-256
COMMIT = "c0ffee" + "0" * 34


class Hub:
    """The repositories, and what goes wrong with them."""

    def __init__(self, folder: Path):
        self.folder = folder  # OWNER/NAME/FILE
        self.commits: dict[str, str] = {}  # of a repository's main branch; COMMIT by default
        self.cut_after: dict[str, int] = {}  # bytes after which the connection for a file is cut, once
        self.changed_bytes: set[str] = set()  # files that are sent with another last byte
        self.gated: set[str] = set()
        self.requests: list[tuple[str, str, str]] = []  # method, path, range

    def list_files(self, repository: str) -> list[Path]:
        return sorted(path for path in (self.folder / repository).rglob("*") if path.is_file())

    def get_commit(self, repository: str) -> str:
        return self.commits.get(repository, COMMIT)


def describe_blob(data: bytes) -> dict[str, object]:
    """Return a file's entry in the listing, without its name."""
    blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()
    entry: dict[str, object] = {"size": len(data), "blobId": blob}
    if len(data) > LARGE_BYTES:
        entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


class HubHandler(BaseHTTPRequestHandler):
    """Answers one request."""

    hub: Hub

    def log_message(self, *args: object) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self.answer(send_body=True)

    def do_HEAD(self) -> None:
        self.answer(send_body=False)

    def answer(self, send_body: bool) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        if path.startswith("api/models/"):
            self.send_listing(path.removeprefix("api/models/"))
            return
        repository, _, rest = path.partition("/resolve/")
        commit, _, file = rest.partition("/")
        self.send_file(repository, commit, file, send_body)

    def send_error_code(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_listing(self, path: str) -> None:
        repository, _, revision = path.partition("/revision/")
        if repository in self.hub.gated:
            return self.send_error_code(403, "GatedRepo")
        if not (self.hub.folder / repository).is_dir():
            return self.send_error_code(404, "RepoNotFound")
        if revision not in ("", "main", self.hub.get_commit(repository)):
            return self.send_error_code(404, "RevisionNotFound")
        siblings = [
            {"rfilename": file.relative_to(self.hub.folder / repository).as_posix()} | describe_blob(file.read_bytes())
            for file in self.hub.list_files(repository)
        ]
        body = {"_id": "1", "id": repository, "sha": self.hub.get_commit(repository), "siblings": siblings, "tags": []}
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def send_file(self, repository: str, commit: str, file: str, send_body: bool) -> None:
        source = self.hub.folder / repository / file
        if not source.is_file():
            return self.send_error_code(404, "EntryNotFound")
        data = source.read_bytes()
        entry = describe_blob(data)
        lfs = entry.get("lfs")
        etag = lfs["sha256"] if isinstance(lfs, dict) else entry["blobId"]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        body = data[:-1] + b"?" if f"{repository}/{file}" in self.hub.changed_bytes else data
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if not send_body:
            return None
        cut = self.hub.cut_after.pop(f"{repository}/{file}", None)
        self.wfile.write(body[start:cut])
        if cut is not None:
            self.wfile.flush()
            self.connection.close()
        return None


@contextmanager
def serve_hub(hub: Hub) -> Iterator[str]:
    """Serve the hub on a free port, and yield its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (HubHandler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
