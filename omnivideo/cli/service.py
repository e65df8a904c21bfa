"""The service's commands: serve, worker, mllm, migrate, sweep and keys. Their settings come from the environment."""

import json
import logging
import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from omnivideo.cli.app import SERVER, SERVICE_COMMANDS, DeviceOption, HomeOption, WeightsOption, console
from omnivideo.cpu_threads import configure_cpu_threads
from omnivideo.errors import InvalidInput, MissingDependency
from omnivideo.startup import pause_collection

if TYPE_CHECKING:
    from omnivideo.models.omni import OmniVideoModel
    from omnivideo.settings import ServiceSettings
    from omnivideo.wiring import ServiceWiring

app = typer.Typer()
keys_cli = typer.Typer(no_args_is_help=True)
mllm_cli = typer.Typer(no_args_is_help=True)
VLLM = "vLLM"
MAX_REPETITIONS, REPETITION_SECONDS = 20, 10.0  # of log lines of one kind

HostOption = Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=SERVER)]
PortOption = Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.", rich_help_panel=SERVER)]


def load_service_settings(home: Path | None = None, weights: Path | None = None) -> "ServiceSettings":
    """Return the environment's settings, with the command's options applied."""
    from omnivideo.settings import load_settings  # it loads pydantic-settings, which --help need not wait for

    return load_settings(home=home, weights=str(weights) if weights else None)


def build_wiring(device: str = "auto", home: Path | None = None, weights: Path | None = None) -> "ServiceWiring":
    """Return the wiring that the environment describes; raise MissingDependency if a package is not installed."""
    settings = load_service_settings(home, weights)
    try:
        with pause_collection():
            import alembic  # noqa: F401
            import sqlalchemy  # noqa: F401

            from omnivideo.wiring import ServiceWiring
    except ImportError as error:
        raise MissingDependency(f"the service needs {error.name}: pip install 'omnivideo[serve,worker]'") from None
    return ServiceWiring(settings, device)


class JSONLogFormatter(logging.Formatter):
    """Formats each record as a JSON object on one line, with the fields of its `extra`."""

    standard_fields = set(vars(logging.makeLogRecord({}))) | {"message", "asctime"}

    def format(self, record: logging.LogRecord) -> str:
        fields = {"time": self.formatTime(record), "level": record.levelname, "logger": record.name}
        fields |= {"message": record.getMessage()}
        fields |= {name: value for name, value in vars(record).items() if name not in self.standard_fields}
        if record.exc_info:
            fields["trace"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


class RepetitionFilter(logging.Filter):
    """Lets at most MAX_REPETITIONS warnings or errors of the same kind pass in REPETITION_SECONDS.

    A client that causes an error with every connection would otherwise fill the disk.
    """

    def __init__(self) -> None:
        super().__init__()
        self.window_started_at = -math.inf
        self.counts: Counter[tuple[str, str]] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        if time.monotonic() - self.window_started_at > REPETITION_SECONDS:
            self.window_started_at = time.monotonic()
            self.counts.clear()
        kind = (record.name, str(record.msg)[:200])
        self.counts[kind] += 1
        if self.counts[kind] == MAX_REPETITIONS:
            record.msg = f"{record.msg} (further lines like this are left out for {REPETITION_SECONDS:g} s)"
        return self.counts[kind] <= MAX_REPETITIONS


def configure_logging(component: str) -> None:
    """Log to stderr, as JSON unless it is a terminal, and export traces if OTEL_EXPORTER_OTLP_ENDPOINT is set."""
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s")
    handler.addFilter(RepetitionFilter())
    handler.setFormatter(plain if sys.stderr.isatty() else JSONLogFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for verbose_logger in ("httpx", "httpcore2", "alembic", "celery"):
        logging.getLogger(verbose_logger).setLevel(logging.WARNING)
    if os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        export_traces(component)


def export_traces(component: str) -> None:
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise MissingDependency(
            "traces need: pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"
        ) from None
    provider = TracerProvider(resource=Resource.create({"service.name": f"omnivideo-{component}"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


def run_server(
    create_application: Callable[[], Any], host: str, port: int, trusted_proxies: Collection[str] = ()
) -> None:
    """Run an HTTP application until the process receives SIGINT or SIGTERM."""
    try:
        import uvicorn

        from omnivideo.api.connections import RESERVED_FILES, ConnectionLimits, create_protocol, raise_file_limit
    except ImportError:
        raise MissingDependency("a server needs: pip install 'omnivideo[serve]'") from None
    limits = ConnectionLimits(max(16, raise_file_limit() - RESERVED_FILES), trusted_proxies=trusted_proxies)
    # uvicorn sends itself the signal again after it has shut down: the caller's clean-up must still run then.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # The client should be the one to close an idle connection. With uvicorn's default of 5 s, a request can be sent on
    # a connection that the server is closing.
    uvicorn.run(
        create_application(),
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=10,
        timeout_keep_alive=75,
        http=create_protocol(limits),
        proxy_headers=False,  # the service reads them itself, from the proxies in its settings
    )


@app.command(rich_help_panel=SERVICE_COMMANDS)
def serve(
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    device: DeviceOption = "auto",
    home: HomeOption = None,
    weights: WeightsOption = None,
) -> None:
    """Run the HTTP service. By default, it includes a worker and stores everything in SQLite and a folder."""
    configure_logging("api")
    wiring = build_wiring(device, home, weights)
    if host not in ("127.0.0.1", "localhost", "::1") and not wiring.settings.admin_key:
        raise InvalidInput("OMNIVIDEO_ADMIN_KEY", "it is empty; a service for other machines needs a key")
    try:
        with pause_collection():
            from omnivideo.api.app import create_app
    except ImportError as error:
        raise MissingDependency(f"the service needs {error.name}: pip install 'omnivideo[serve,worker]'") from None
    try:
        run_server(
            lambda: create_app(wiring.start_background_services(wiring.build_service_context())),
            host,
            port,
            wiring.settings.trusted_proxies,
        )
    finally:
        wiring.close()


@app.command(rich_help_panel=SERVICE_COMMANDS)
def worker(
    device: DeviceOption = "auto",
    weights: WeightsOption = None,
    workers_per_host: Annotated[int, typer.Option(min=1, help="Workers that share this machine's CPUs.")] = 1,
) -> None:
    """Render the jobs of services that share a broker; start one worker for each device."""
    configure_cpu_threads(workers_per_host)
    settings = load_service_settings()
    if not settings.broker:
        raise InvalidInput("OMNIVIDEO_BROKER", "it is empty; give redis://... or amqp://...")
    try:
        from omnivideo.backends.queue.celery import serve_celery_worker
    except ImportError as error:
        raise MissingDependency(f"a worker needs {error.name}: pip install 'omnivideo[worker]'") from None

    def build_worker() -> tuple[Any, float]:
        configure_logging("worker")  # in the child process, because threads and connections do not survive a fork
        return build_wiring(device, weights=weights).worker, settings.heartbeat_timeout

    serve_celery_worker(settings.broker, build_worker)


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
) -> None:
    """Serve the MLLM over HTTP for services that do not load it themselves, with vLLM or with transformers."""
    configure_cpu_threads(tensor_parallel_size)
    configure_logging("mllm")
    from omnivideo.backends.mllm import launch
    from omnivideo.models.weights.lora import check_lora
    from omnivideo.models.weights.shipped import find_shipped_weights

    settings = load_service_settings(weights=weights)
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
    from omnivideo.backends.mllm.local import LocalMLLM
    from omnivideo.models.device import pick_device
    from omnivideo.models.weights import checkpoint
    from omnivideo.models.weights.lora import merge_lora

    omni = checkpoint.load(folder, pick_device(device), settings.precision, contents="mllm")
    log_placement(omni)
    if lora is not None:
        merge_lora(getattr(omni.mllm, "llm", omni.mllm), lora)
    run_server(lambda: create_mllm_app(LocalMLLM(omni, LRUObjectStore())), host, port)


def log_placement(omni: "OmniVideoModel") -> None:
    if omni.placement:
        logging.getLogger("omnivideo.mllm").info("placement of %s: %s", omni.preset.name, omni.placement.describe())


@mllm_cli.callback()
def describe_mllm_commands() -> None:
    """Serve the MLLM in a separate process."""


@app.command(rich_help_panel=SERVICE_COMMANDS)
def migrate() -> None:
    """Upgrade the database and the conversations to this version, as serve and worker also do when they start."""
    from omnivideo.storage.checkpointer import open_checkpointer

    wiring = build_wiring()
    wiring.engine.dispose()
    open_checkpointer(wiring.settings).conn.close()  # type: ignore[attr-defined]
    console.print("the database has the latest schema")


@app.command(rich_help_panel=SERVICE_COMMANDS)
def sweep(home: HomeOption = None) -> None:
    """Remove artifacts that nothing refers to and that are older than OMNIVIDEO_ARTIFACT_LIFETIME_SECONDS."""
    removed_keys = build_wiring(home=home).sweep_store()
    console.print(f"{len(removed_keys)} artifacts removed")


@keys_cli.command("add")
def add_api_key(name: Annotated[str, typer.Argument(help="Name of the key's owner.")]) -> None:
    """Create a key and print it. It cannot be shown again."""
    from omnivideo.storage.database.keys import APIKeyRepository

    key_id, key = APIKeyRepository(build_wiring().engine).create_key(name)
    console.print(f"{key_id}  {key}", highlight=False, soft_wrap=True)


@keys_cli.command("list")
def list_api_keys() -> None:
    """List all keys by id and name."""
    from omnivideo.storage.database.keys import APIKeyRepository

    for row in APIKeyRepository(build_wiring().engine).list_keys():
        revoked = "  revoked" if row["revoked"] else ""
        console.print(f"{row['id']}  {row['name']}{revoked}", highlight=False, markup=False)


@keys_cli.command("revoke")
def revoke_api_key(key_id: Annotated[str, typer.Argument(help="Id of the key, as `keys list` prints it.")]) -> None:
    """Revoke a key, so that requests with it are refused."""
    from omnivideo.storage.database.keys import APIKeyRepository

    if not APIKeyRepository(build_wiring().engine).revoke_key(key_id):
        raise InvalidInput("key", f"there is no key {key_id!r}")
    console.print("revoked")


@keys_cli.callback()
def describe_key_commands() -> None:
    """Create, list and revoke API keys."""


app.add_typer(keys_cli, name="keys", rich_help_panel=SERVICE_COMMANDS)
app.add_typer(mllm_cli, name="mllm", rich_help_panel=SERVICE_COMMANDS)
