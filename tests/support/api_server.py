"""Run the HTTP service, with a real database, store, queue and worker and scripted answers, and the MLLM server."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from omnivideo.api.app import create_app
from omnivideo.backends.decoder.renderer import Renderer
from omnivideo.backends.mllm.server import create_mllm_app
from omnivideo.settings import load_settings
from omnivideo.wiring import ServiceWiring
from tests.support.servers import free_port
from tests.support.twins import MLLMWithScriptedText


def build_scripted_wiring(home: Path, omni, **settings) -> ServiceWiring:
    """Return the wiring of a service whose MLLM gives scripted answers."""
    wiring = ServiceWiring(load_settings(home=home, **settings), "cpu")
    wiring.renderer = Renderer(omni, wiring.store, "random")  # type: ignore[misc]
    wiring.mllm = MLLMWithScriptedText(omni, wiring.store)  # type: ignore[misc]
    return wiring


@contextmanager
def run_api_server(wiring: ServiceWiring, port: int | None = None) -> Iterator[str]:
    """Run the service and yield its address; afterwards, stop it and everything that the wiring has started."""
    port = port or free_port()
    app = create_app(wiring.build_service_context())
    config = uvicorn.Config(app, port=port, log_level="warning", timeout_graceful_shutdown=2, proxy_headers=False)
    server = uvicorn.Server(config)
    server_thread = threading.Thread(target=server.run, daemon=True)
    server_thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.started
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        server_thread.join(10)
        wiring.close()


@contextmanager
def run_mllm_server(mllm, port: int, key: str = "") -> Iterator[None]:
    """Run our own MLLM server on a port; clients must send the key, if there is one."""
    server = uvicorn.Server(uvicorn.Config(create_mllm_app(mllm, key), port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.02)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(10)
