"""The HTTP service on a free port: a real database, store, queue and worker; the MLLM's answers are scripted."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from omnivideo.api.app import create_app
from omnivideo.backends.decoder.renderer import Renderer
from omnivideo.settings import load_settings
from omnivideo.wiring import ServiceWiring
from tests.backends.queue.test_kill import HalfScripted
from tests.support.servers import free_port


def scripted(home: Path, omni, **given) -> ServiceWiring:
    wiring = ServiceWiring(load_settings(home=home, **given), "cpu")
    wiring.renderer = Renderer(omni, wiring.store, "random")  # type: ignore[misc]
    wiring.mllm = HalfScripted(omni, wiring.store)  # type: ignore[misc]
    return wiring


@contextmanager
def serving(wiring: ServiceWiring, port: int | None = None) -> Iterator[str]:
    """Run the service and yield its address; afterwards, stop it and everything that the wiring has started."""
    port = port or free_port()
    config = uvicorn.Config(
        create_app(wiring.build_service_context()), port=port, log_level="warning", timeout_graceful_shutdown=2
    )
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
