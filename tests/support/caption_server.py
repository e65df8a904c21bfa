"""A stand-in for the MLLM server that captions clips."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def serve_captions(answer: Callable[[bytes], tuple[int, str]]) -> Iterator[tuple[str, list[bytes]]]:
    """Serve captions and yield the address and the clips received; `answer` maps an mp4 to a status and a body."""
    received_clips: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            received_clips.append(base64.b64decode(body["payload"]["media"][0]["data"]))
            status, text = answer(received_clips[-1])
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", received_clips
        finally:
            server.shutdown()
            thread.join()


CAPTION_ANSWER = (200, '"A texture "\n"moves."\nnull\n')
