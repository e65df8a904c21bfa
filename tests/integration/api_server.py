"""The HTTP service on a free port: real database, store, queue and worker over an untrained model; what that model
would say is scripted."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from omnivideo.api.app import create_app
from omnivideo.backends.decoder.painter import Painter
from omnivideo.settings import service
from omnivideo.wiring import Wiring
from tests.integration.servers import free_port
from tests.integration.test_kill import HalfScripted


def scripted(home: Path, omni, **given) -> Wiring:
    wiring = Wiring(service(home=home, **given), "cpu")
    wiring.painter = Painter(omni, wiring.store, "random")  # type: ignore[misc]
    wiring.mllm = HalfScripted(omni, wiring.store)  # type: ignore[misc]
    return wiring


@contextmanager
def serving(wiring: Wiring, port: int | None = None) -> Iterator[str]:
    """The service's address; it is stopped, and all that it began ended, afterwards."""
    port = port or free_port()
    config = uvicorn.Config(create_app(wiring.rooms()), port=port, log_level="warning", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    running = threading.Thread(target=server.run, daemon=True)
    running.start()
    until = time.monotonic() + 20
    while not server.started and time.monotonic() < until:
        time.sleep(0.02)
    assert server.started
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        running.join(10)
        wiring.close()
