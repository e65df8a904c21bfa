"""The command that runs the HTTP service, and the hidden command of the process that it starts for the turns.

That process also has what no other server of the service has: the MLLM without OMNIVIDEO_MLLM, and a worker without
OMNIVIDEO_BROKER.
"""

import logging
import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from omnivideo.api.turn_process import STOP_SECONDS, Parent, TurnProcess
from omnivideo.cli.app import SERVICE_COMMANDS, DeviceOption, HomeOption, WeightsOption
from omnivideo.cli.logs import configure_logging
from omnivideo.cli.service import (
    SWITCH_SECONDS,
    HostOption,
    LogFormatOption,
    LogLevelOption,
    PortOption,
    build_wiring,
    explain_missing_packages,
    listen,
    load_service_settings,
    run_server,
)
from omnivideo.cpu_threads import lower_cpu_priority
from omnivideo.errors import InvalidInput
from omnivideo.startup import exempt_loaded_objects, pause_collection, preload_torch

if TYPE_CHECKING:
    from omnivideo.settings import ServiceSettings
    from omnivideo.wiring import ServiceWiring

app = typer.Typer()
PROGRAM = [sys.executable, "-m", "omnivideo.cli"]  # of the process that runs the turns
EXIT_TIMEOUT_SECONDS = 5.0  # for what remains after the requests have been answered
WORKER_STOP_SECONDS = 60.0  # a denoising step of a large preset takes a while, and then the clip is given back


@app.command(rich_help_panel=SERVICE_COMMANDS)
def serve(
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    device: DeviceOption = "auto",
    home: HomeOption = None,
    weights: WeightsOption = None,
    log_format: LogFormatOption = None,
    log_level: LogLevelOption = None,
) -> None:
    """Run the HTTP service. By default, it includes a worker and stores everything in SQLite and a folder."""
    settings = load_service_settings(weights, home=home, log_format=log_format, log_level=log_level)
    configure_logging("api", settings)
    if host not in ("127.0.0.1", "localhost", "::1") and not settings.admin_key:
        raise InvalidInput("OMNIVIDEO_ADMIN_KEY", "it is empty; a service for other machines needs a key")
    with listen(host, port) as listener, start_turn_process(settings, device) as (turn_process, settings):
        wiring = build_wiring(settings, has_worker=False)

        def build_application() -> Any:
            turn_process.begin(wiring.notifier)  # it loads the weights while this process imports the rest
            with explain_missing_packages(), pause_collection():
                from omnivideo.api.app import create_app

            application = create_app(wiring.start_background_services(wiring.build_service_context(turn_process)))
            if settings.metrics_port:
                wiring.close_callbacks.append(serve_metrics(host, settings.metrics_port, application))
            exempt_loaded_objects()
            if turn_process.must_start and (status := turn_process.wait_until_started()):
                sys.exit(status)
            wiring.close_callbacks.append(limit_exit_time)
            return application

        try:
            run_server(build_application, listener, settings.trusted_proxies)
        finally:
            wiring.close()


def serve_metrics(host: str, port: int, application: Any) -> Callable[[], None]:
    """Serve an application's metrics on a port of their own, which needs no key. Return what stops it."""
    from prometheus_client import start_http_server

    try:
        server, _ = start_http_server(port, host, application.state.request_metrics.registry)
    except OSError as error:
        message = f"this process cannot listen on {port}: {error.strerror}"
        raise InvalidInput("OMNIVIDEO_METRICS_PORT", message) from None

    def stop() -> None:
        server.shutdown()
        server.server_close()

    return stop


def limit_exit_time() -> None:
    """Let this process end within EXIT_TIMEOUT_SECONDS, although threads of it still wait for other servers.

    Python joins the threads of executors, and LangGraph asks the language model in them. That server may take longer
    than the grace period of a stop, after which the process would be killed. Their turns were given back already.
    """
    timer = threading.Timer(EXIT_TIMEOUT_SECONDS, os._exit, (0,))
    timer.daemon = True
    timer.start()


@contextmanager
def start_turn_process(settings: "ServiceSettings", device: str) -> Iterator[tuple[TurnProcess, "ServiceSettings"]]:
    """Start the process, and stop it afterwards. Yield it, and the settings with the address of its MLLM."""
    options = {
        "home": settings.home, "weights": settings.weights, "log-format": settings.log_format,
        "log-level": settings.log_level, "device": device,
    }  # fmt: skip
    given = [argument for name, value in options.items() if value for argument in (f"--{name}", str(value))]
    command = [*PROGRAM, "run-turns", *given]
    stop_seconds = STOP_SECONDS if settings.broker else WORKER_STOP_SECONDS
    if settings.mllm:
        process = TurnProcess(command, must_start=not settings.broker, stop_seconds=stop_seconds)
        yield from run_process(process, settings)
        return
    # Bound here, so that the address stays the same when the process is started again.
    with listen("127.0.0.1", 0) as mllm_socket:
        key, port = secrets.token_urlsafe(32), mllm_socket.getsockname()[1]
        process = TurnProcess(
            [*command, "--mllm-socket", str(mllm_socket.fileno())],
            [mllm_socket.fileno()], key, must_start=True, stop_seconds=stop_seconds,
        )  # fmt: skip
        own_settings = settings.model_copy(update={"mllm": f"http://127.0.0.1:{port}", "mllm_key": key})
        yield from run_process(process, own_settings)


def run_process(process: TurnProcess, settings: "ServiceSettings") -> Iterator[tuple[TurnProcess, "ServiceSettings"]]:
    process.start()
    try:
        yield process, settings
    finally:
        process.stop()


@app.command(hidden=True)
def run_turns(
    home: HomeOption = None,
    device: DeviceOption = "auto",
    weights: WeightsOption = None,
    mllm_socket: Annotated[int | None, typer.Option(help="The socket on which to serve the MLLM.")] = None,
    log_format: LogFormatOption = None,
    log_level: LogLevelOption = None,
) -> None:
    """Run the turns of a service's threads until standard input ends; `omnivideo serve` starts it."""
    parent = Parent()
    settings = load_service_settings(weights, home=home, log_format=log_format, log_level=log_level)
    configure_logging("turns", settings)
    lower_cpu_priority()
    if not settings.broker or mllm_socket is not None:
        preload_torch()
        with explain_missing_packages(), pause_collection():  # while the other process opens the database
            import omnivideo.backends.decoder.worker
            import omnivideo.models.weights.checkpoint  # noqa: F401
    if (key := parent.wait_to_begin()) is None:
        return
    wiring = build_wiring(settings, device)
    try:
        with pause_collection():
            runner = wiring.turn_runner
            if mllm_socket is not None:
                serve_mllm(wiring, key, socket.socket(fileno=mllm_socket))
            if not settings.broker:
                wiring.notify_workers()  # it starts the worker
            exempt_loaded_objects()
        runner.start()
        try:
            parent.exchange_changes(wiring.notifier)
        finally:
            runner.stop()
    finally:
        if settings.broker:  # otherwise this process has a worker, whose clip must be given back
            limit_exit_time()
        wiring.close()


def serve_mllm(wiring: "ServiceWiring", key: str, listener: socket.socket) -> None:
    """Serve this process's MLLM, in a thread, to the process that answers requests."""
    import uvicorn

    from omnivideo.backends.mllm.local import LocalMLLM
    from omnivideo.backends.mllm.server import create_mllm_app

    sys.setswitchinterval(SWITCH_SECONDS)
    mllm = wiring.renderer.mllm
    assert isinstance(mllm, LocalMLLM)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # it is no server of the user's
    config = uvicorn.Config(
        create_mllm_app(mllm, key), log_config=None, access_log=False, lifespan="off", timeout_keep_alive=75
    )
    threading.Thread(
        target=uvicorn.Server(config).run, kwargs={"sockets": [listener]}, daemon=True, name="mllm"
    ).start()
