"""A proxy before an S3 server that answers slowly, cuts objects short, or flips a bit of them."""

import http.client
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Mode = Literal["", "slow", "truncate", "corrupt"]
SLOW_SECONDS = 1.0  # before each answer
OBJECT_PATH = re.compile(r"/[^/]+/(?:.*/)?[0-9a-f]{2}/[0-9a-f]{64}\.\w+(?:\?.*)?")


class FaultyS3Proxy:
    """Passes requests on to `port`. `mode` applies to every answer from the time it is set; faults are counted."""

    def __init__(self, port: int):
        self.mode: Mode = ""
        self.num_faults = 0
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_request(self) -> None:
                mode = proxy.mode
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    upstream.putheader(name, value)
                upstream.endheaders(body)
                response = upstream.getresponse()
                data = response.read()
                upstream.close()
                if mode == "slow":
                    proxy.num_faults += 1
                    time.sleep(SLOW_SECONDS)
                is_object = self.command == "GET" and OBJECT_PATH.fullmatch(self.path) and response.status < 300
                if mode == "corrupt" and is_object and data:
                    proxy.num_faults += 1
                    middle = len(data) // 2
                    data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
                self.send_response_only(response.status, response.reason)
                for name, value in response.getheaders():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                length = response.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
                self.send_header("Content-Length", length or "0")
                self.end_headers()
                if mode == "truncate" and is_object and data:
                    proxy.num_faults += 1
                    self.wfile.write(data[: len(data) // 2])
                    self.close_connection = True
                elif self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_request

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
