"""The service's commands besides serve: worker, mllm, migrate and sweep. Their settings come from the environment."""

import errno
import logging
import signal
import socket
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from omnivideo.cli.app import SERVER, SERVICE_COMMANDS, DeviceOption, HomeOption, WeightsOption, console
from omnivideo.cli.logs import configure_logging, write_logging_configuration
from omnivideo.cpu_threads import configure_cpu_threads, lower_cpu_priority
from omnivideo.errors import InvalidInput, MissingDependency
from omnivideo.startup import exempt_loaded_objects, pause_collection, preload_torch

if TYPE_CHECKING:
    from omnivideo.models.omni import OmniVideoModel
    from omnivideo.settings import ServiceSettings
    from omnivideo.wiring import ServiceWiring

app = typer.Typer()
mllm_cli = typer.Typer(no_args_is_help=True)
STARTUP_FAILURE = 3  # uvicorn's exit status
# asyncio accepts as many connections in a row as its backlog allows, before any of them can be counted and refused.
ACCEPTED_AT_ONCE = 4
PENDING_CONNECTIONS = 2048  # of the kernel
# How long a thread that computes may keep others waiting, in s. The event loop waits so long up to ten times in one
# request; with Python's default of 5 ms, a few threads that compute at once delay every request by a second.
SWITCH_SECONDS = 0.0005
VLLM, LOGS = "vLLM", "Logs"

HostOption = Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=SERVER)]
PortOption = Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.", rich_help_panel=SERVER)]
LogFormatOption = Annotated[
    str | None,
    typer.Option(help="text, json or auto (text in a terminal). Default: OMNIVIDEO_LOG_FORMAT.", rich_help_panel=LOGS),
]
LogLevelOption = Annotated[
    str | None,
    typer.Option(help="debug, info, warning or error. Default: OMNIVIDEO_LOG_LEVEL.", rich_help_panel=LOGS),
]


def load_service_settings(weights: Path | None = None, **overrides: object) -> "ServiceSettings":
    """Return the environment's settings, with the command's options applied."""
    from omnivideo.settings import load_settings  # it loads pydantic-settings, which --help need not wait for

    return load_settings(weights=str(weights) if weights else None, **overrides)


@contextmanager
def explain_missing_packages() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise MissingDependency(f"the service needs {error.name}: pip install 'omnivideo[serve,worker]'") from None


def build_wiring(
    settings: "ServiceSettings | None" = None, device: str = "auto", has_worker: bool = True
) -> "ServiceWiring":
    """Return the wiring of the settings, by default the environment's.

    Raises MissingDependency if a package is not installed.
    """
    settings = settings or load_service_settings()
    with explain_missing_packages(), pause_collection():
        import alembic  # noqa: F401
        import sqlalchemy  # noqa: F401

        from omnivideo.wiring import ServiceWiring
    return ServiceWiring(settings, device, has_worker)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to the address, so that nothing is started if another process has the port."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror:
        raise InvalidInput("host", f"{host!r} is not an address of this machine") from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise InvalidInput("port", f"another process listens on {port}; give another with --port") from None
        field, value = ("port", str(port)) if error.errno == errno.EACCES else ("host", repr(host))
        raise InvalidInput(field, f"this process cannot listen on {value}: {error.strerror}") from None
    return listener


def run_server(
    create_application: Callable[[], Any], listener: socket.socket, trusted_proxies: Collection[str] = ()
) -> None:
    """Run an HTTP application on a bound socket until the process receives SIGINT or SIGTERM."""
    try:
        import uvicorn
        from sse_starlette.sse import AppStatus

        from omnivideo.api.connections import RESERVED_FILES, ConnectionLimits, create_protocol, raise_file_limit
    except ImportError:
        raise MissingDependency("a server needs: pip install 'omnivideo[serve]'") from None

    class StoppingServer(uvicorn.Server):
        """Tells the application when it begins to stop, before it waits for the requests in progress."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            for listening in sockets or ():
                listening.listen(PENDING_CONNECTIONS)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            if begin_stop := getattr(application.state, "begin_stop", None):
                begin_stop()
            await super().shutdown(sockets)

    sys.setswitchinterval(SWITCH_SECONDS)
    limits = ConnectionLimits(max(16, raise_file_limit() - RESERVED_FILES), trusted_proxies=trusted_proxies)
    # uvicorn sends itself the signal again after it has shut down: the caller's clean-up must still run then.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # The client should be the one to close an idle connection. With uvicorn's default of 5 s, a request can be sent on
    # a connection that the server is closing.
    with pause_collection():
        application = create_application()
    config = uvicorn.Config(
        application,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=10,
        timeout_keep_alive=75,
        backlog=ACCEPTED_AT_ONCE,
        http=create_protocol(limits),
        proxy_headers=False,  # the service reads them itself, from the proxies in its settings
    )
    server = StoppingServer(config)
    AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]  # streams of a service that stops end by themselves, and say so
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    if not server.started:
        sys.exit(STARTUP_FAILURE)


@app.command(rich_help_panel=SERVICE_COMMANDS)
def worker(
    device: DeviceOption = "auto",
    weights: WeightsOption = None,
    workers_per_host: Annotated[int, typer.Option(min=1, help="Workers that share this machine's CPUs.")] = 1,
    log_format: LogFormatOption = None,
    log_level: LogLevelOption = None,
) -> None:
    """Render the jobs of services that share a broker; start one worker for each device."""
    configure_cpu_threads(workers_per_host)
    settings = load_service_settings(weights, log_format=log_format, log_level=log_level)
    if not settings.broker:
        raise InvalidInput("OMNIVIDEO_BROKER", "it is empty; give redis://... or amqp://...")
    try:
        from omnivideo.backends.queue.celery import serve_celery_worker
    except ImportError as error:
        raise MissingDependency(f"a worker needs {error.name}: pip install 'omnivideo[worker]'") from None
    configure_logging("worker", settings, with_traces=False)  # threads do not survive a fork; the child exports traces

    def build_worker() -> tuple[Any, float]:
        preload_torch()
        lower_priority_on_cpu(device)
        configure_logging("worker", settings)
        with pause_collection():
            worker = build_wiring(settings, device).worker
            exempt_loaded_objects()
        logging.getLogger("omnivideo.worker").info("ready: %s", worker.renderer.model.preset, extra={"device": device})
        return worker, settings.heartbeat_timeout

    serve_celery_worker(settings.broker, read_queue_name(settings), build_worker)


def read_queue_name(settings: "ServiceSettings") -> str:
    """Return the name of the broker's queue, and close the database again: connections do not survive a fork."""
    from omnivideo.storage.database.repository import retry_while_unavailable

    wiring = build_wiring(settings)
    try:
        return retry_while_unavailable(lambda: wiring.queue_name)
    finally:
        wiring.close()


@mllm_cli.command("serve")
def mllm_serve(
    host: HostOption = "127.0.0.1",
    port: PortOption = 8001,
    device: DeviceOption = "auto",
    weights: WeightsOption = None,
    engine: Annotated[
        str, typer.Option(help="auto (vLLM if it is installed), vllm or transformers.", rich_help_panel=SERVER)
    ] = "auto",
    tensor_parallel_size: Annotated[int, typer.Option(help="GPUs that share the model.", rich_help_panel=VLLM)] = 1,
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="Fraction of the GPU memory to use.", rich_help_panel=VLLM)
    ] = 0.9,
    cpu_kvcache_gib: Annotated[
        int, typer.Option(help="Size of the KV cache on a CPU, in GiB.", rich_help_panel=VLLM)
    ] = 1,
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.", rich_help_panel=VLLM)] = "auto",
    quantization: Annotated[
        str | None, typer.Option(help="Quantization method, such as fp8.", rich_help_panel=VLLM)
    ] = None,
    lora: Annotated[
        Path | None, typer.Option(help="Folder of a LoRA adapter in the format of PEFT.", rich_help_panel=SERVER)
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Maximum number of tokens in a request.", rich_help_panel=VLLM)
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Requests answered at the same time.", rich_help_panel=VLLM)] = 16,
    log_format: LogFormatOption = None,
    log_level: LogLevelOption = None,
) -> None:
    """Serve the MLLM over HTTP for services that do not load it themselves, with vLLM or with transformers."""
    configure_cpu_threads(tensor_parallel_size)
    settings = load_service_settings(weights, log_format=log_format, log_level=log_level)
    configure_logging("mllm", settings)
    from omnivideo.backends.mllm import launch
    from omnivideo.models.weights.lora import check_lora
    from omnivideo.models.weights.shipped import find_shipped_weights

    folder = Path(settings.weights) if settings.weights else find_shipped_weights(settings.preset)
    serving_options = launch.parse_options(
        tensor_parallel_size=tensor_parallel_size,
        gpu_memory_utilization=gpu_memory_utilization,
        cpu_kvcache_gib=cpu_kvcache_gib,
        dtype=dtype,
        quantization=quantization,
        lora=lora,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
    )
    if lora is not None:
        check_lora(lora, launch.find_language_model(folder))
    if server_command := launch.build_command(device, folder, port, host, engine, serving_options):
        server_command.environment.setdefault("VLLM_LOGGING_CONFIG_PATH", write_logging_configuration(settings))
        launch.exec_command(server_command)
    serve_with_transformers(settings, device, folder, lora, host, port)


def serve_with_transformers(
    settings: "ServiceSettings", device: str, folder: Path, lora: Path | None, host: str, port: int
) -> None:
    """Serve the MLLM of a folder in this process. Raises MissingDependency before the model is loaded."""
    try:
        import uvicorn  # noqa: F401

        from omnivideo.backends.mllm.server import LRUObjectStore, create_mllm_app
    except ImportError as error:
        raise MissingDependency(f"the MLLM's server needs {error.name}: pip install 'omnivideo[serve]'") from None
    with pause_collection():
        from omnivideo.backends.mllm.local import LocalMLLM
        from omnivideo.models.device import pick_device
        from omnivideo.models.weights import checkpoint
        from omnivideo.models.weights.lora import merge_lora

    lower_priority_on_cpu(device)
    with listen(host, port) as listener:
        with pause_collection():
            omni = checkpoint.load(folder, pick_device(device), settings.precision, contents="mllm")
        log_placement(omni)
        if lora is not None:
            merge_lora(getattr(omni.mllm, "llm", omni.mllm), lora)
        exempt_loaded_objects()
        run_server(lambda: create_mllm_app(LocalMLLM(omni, LRUObjectStore()), settings.mllm_key), listener)


def lower_priority_on_cpu(device: str) -> None:
    """Let the API, the database and the store come first, if they share the CPUs with a process that computes."""
    from omnivideo.models.device import pick_device

    if pick_device(device).type == "cpu":
        lower_cpu_priority()


def log_placement(omni: "OmniVideoModel") -> None:
    if omni.placement:
        logging.getLogger("omnivideo.mllm").info("placement of %s: %s", omni.preset.name, omni.placement.describe())


@mllm_cli.callback()
def describe_mllm_commands() -> None:
    """Serve the MLLM in a separate process."""


@app.command(rich_help_panel=SERVICE_COMMANDS)
def migrate() -> None:
    """Create or upgrade the tables of the database and the conversations; serve and worker do so only with SQLite."""
    build_wiring().migrate_database()
    console.print("the database has the latest schema")


@app.command(rich_help_panel=SERVICE_COMMANDS)
def sweep(home: HomeOption = None) -> None:
    """Remove what users have deleted, what has ended long ago, and artifacts that nothing refers to."""
    result = build_wiring(load_service_settings(home=home)).leave_out_mllm().sweep()
    console.print(f"{len(result.object_keys)} artifacts removed")


app.add_typer(mllm_cli, name="mllm", rich_help_panel=SERVICE_COMMANDS)
