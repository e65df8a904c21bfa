"""The service's commands: serve, worker, mllm, migrate, keys, sweep.  Settings come from the environment."""

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console

from omnivideo.cpu_threads import configure_cpu_threads
from omnivideo.errors import InvalidInput, MissingDependency
from omnivideo.settings import load_settings

if TYPE_CHECKING:
    from omnivideo.wiring import ServiceWiring

app = typer.Typer()
keys_cli = typer.Typer(no_args_is_help=True, help="API keys.")
mllm_cli = typer.Typer(no_args_is_help=True, help="The language model's own server.")
app.add_typer(keys_cli, name="keys")
app.add_typer(mllm_cli, name="mllm")
console = Console()
error_console = Console(stderr=True)

HostOption = Annotated[str, typer.Option(help="Address to listen on.")]
PortOption = Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda:N.")]
HomeOption = Annotated[Optional[Path], typer.Option(help="Folder of what is embedded.")]  # noqa: UP045
WeightsOption = Annotated[Optional[Path], typer.Option(help="Folder of weights, if not the shipped one.")]  # noqa: UP045


def build_wiring(device: str = "auto", home: Path | None = None, weights: Path | None = None) -> "ServiceWiring":
    """The rooms that the environment names; the packages that they need are asked for by name."""
    settings = load_settings(home=home, weights=str(weights) if weights else None)
    try:
        import alembic  # noqa: F401
        import sqlalchemy  # noqa: F401

        from omnivideo.wiring import ServiceWiring
    except ImportError as error:
        raise MissingDependency(f"the service needs {error.name}: pip install 'omnivideo[serve,worker]'") from None
    return ServiceWiring(settings, device)


class JSONLogFormatter(logging.Formatter):
    """One object a line: what a log store can search."""

    standard_fields = set(vars(logging.makeLogRecord({}))) | {"message", "asctime"}

    def format(self, record: logging.LogRecord) -> str:
        told = {"time": self.formatTime(record), "level": record.levelname, "logger": record.name}
        told |= {"message": record.getMessage()}
        told |= {name: value for name, value in vars(record).items() if name not in self.standard_fields}
        if record.exc_info:
            told["trace"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str)


def configure_logging(component: str) -> None:
    """Logs to stderr, as JSON where nobody watches; traces to where OTEL_EXPORTER_OTLP_ENDPOINT says, if it does."""
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s")
    handler.setFormatter(plain if sys.stderr.isatty() else JSONLogFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for chatty in ("httpx", "httpcore2", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
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


def run_server(create_application: Callable[[], Any], host: str, port: int) -> None:
    """Runs an HTTP application until it is told to end."""
    try:
        import uvicorn
    except ImportError:
        raise MissingDependency("a server needs: pip install 'omnivideo[serve]'") from None
    # Idle connections are the client's to close: at uvicorn's 5 s a request can meet a connection as it goes.
    uvicorn.run(
        create_application(), host=host, port=port, log_config=None, access_log=False, timeout_graceful_shutdown=10,
        timeout_keep_alive=75,
    )  # fmt: skip


@app.command()
def serve(
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    device: DeviceOption = "auto",
    home: HomeOption = None,
    weights: WeightsOption = None,
) -> None:
    """The HTTP service; alone, it is the whole service on SQLite, a folder and a worker of its own."""
    configure_logging("api")
    wiring = build_wiring(device, home, weights)
    if host not in ("127.0.0.1", "localhost", "::1") and not wiring.settings.admin_key:
        raise InvalidInput("OMNIVIDEO_ADMIN_KEY", "it is empty; who can reach the service from outside needs a key")
    try:
        from omnivideo.api.app import create_app
    except ImportError as error:
        raise MissingDependency(f"the service needs {error.name}: pip install 'omnivideo[serve,worker]'") from None
    try:
        run_server(lambda: create_app(wiring.start_background_services(wiring.build_service_context())), host, port)
    finally:
        wiring.close()


@app.command()
def worker(
    device: DeviceOption = "auto",
    weights: WeightsOption = None,
    workers_per_host: Annotated[int, typer.Option(min=1, help="Workers that share this machine's CPUs.")] = 1,
) -> None:
    """Draws what waits, for services that share a broker; one for each device."""
    configure_cpu_threads(workers_per_host)
    settings = load_settings()
    if not settings.broker:
        raise InvalidInput("OMNIVIDEO_BROKER", "it is empty; give redis://... or amqp://... (serve alone needs none)")
    try:
        from omnivideo.backends.queue.celery import serve_celery_worker as run
    except ImportError as error:
        raise MissingDependency(f"a worker needs {error.name}: pip install 'omnivideo[worker]'") from None

    def build_worker() -> tuple[Any, float]:
        configure_logging("worker")  # in the child: neither threads nor connections outlive a fork
        return build_wiring(device, weights=weights).worker, settings.heartbeat_timeout

    run(settings.broker, build_worker)


@mllm_cli.command("serve")
def mllm_serve(
    host: HostOption = "127.0.0.1",
    port: PortOption = 8001,
    device: DeviceOption = "auto",
    weights: WeightsOption = None,
    engine: Annotated[str, typer.Option(help="auto (vLLM where it is installed), vllm or transformers.")] = "auto",
    tensor_parallel_size: Annotated[int, typer.Option(help="vLLM: GPUs that share the model.")] = 1,
    gpu_memory_utilization: Annotated[float, typer.Option(help="vLLM: share of the GPU's memory.")] = 0.9,
    cpu_kvcache_gib: Annotated[int, typer.Option(help="vLLM on a CPU: GiB for the cache.")] = 1,
    dtype: Annotated[str, typer.Option(help="vLLM: auto, float32, float16 or bfloat16.")] = "auto",
    quantization: Annotated[Optional[str], typer.Option(help="vLLM: a method, such as fp8.")] = None,  # noqa: UP045
    lora: Annotated[Optional[Path], typer.Option(help="vLLM: a folder as PEFT saves it.")] = None,  # noqa: UP045
    max_model_len: Annotated[Optional[int], typer.Option(help="vLLM: tokens of a request at the most.")] = None,  # noqa: UP045
    max_num_seqs: Annotated[int, typer.Option(help="vLLM: requests answered at a time.")] = 16,
) -> None:
    """Answers for many services that have no language model in their process: vLLM's server, or a plain one."""
    configure_cpu_threads(tensor_parallel_size)
    configure_logging("mllm")
    from omnivideo.backends.mllm import launch
    from omnivideo.models.device import pick_device
    from omnivideo.models.weights import checkpoint
    from omnivideo.models.weights.checkpoint import find_shipped_weights

    settings = load_settings(weights=str(weights) if weights else None)
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
    if server_command := launch.build_command(device, folder, port, host, engine, serving_options):
        launch.exec_command(server_command)
    from omnivideo.backends.mllm.local import LocalMLLM
    from omnivideo.backends.mllm.server import LRUObjectStore, create_mllm_app

    omni = checkpoint.load(folder, pick_device(device))
    run_server(lambda: create_mllm_app(LocalMLLM(omni, LRUObjectStore())), host, port)


@mllm_cli.callback()
def mllm_help() -> None:
    """The language model's own server."""


@app.command()
def migrate() -> None:
    """Brings the database to this version's schema; serve and worker do it too."""
    build_wiring().engine.dispose()
    console.print("the database is at the newest schema")


@app.command()
def sweep(home: HomeOption = None) -> None:
    """Removes artifacts that nothing refers to, once they are older than OMNIVIDEO_ARTIFACT_LIFETIME_SECONDS."""
    removed_keys = build_wiring(home=home).sweep_store()
    console.print(f"{len(removed_keys)} removed")


@keys_cli.command("add")
def add_api_key(name: Annotated[str, typer.Argument(help="Whose it is.")]) -> None:
    """Makes a key and prints it, this once."""
    from omnivideo.storage.database.keys import APIKeyRepository

    key_id, key = APIKeyRepository(build_wiring().engine).create_key(name)
    console.print(f"{key_id}  {key}", highlight=False, soft_wrap=True)


@keys_cli.command("list")
def list_api_keys() -> None:
    """All keys, without their secrets."""
    from omnivideo.storage.database.keys import APIKeyRepository

    for row in APIKeyRepository(build_wiring().engine).list_keys():
        console.print(
            f"{row['id']}  {row['name']}{'  revoked' if row['revoked'] else ''}", highlight=False, markup=False
        )


@keys_cli.command("revoke")
def revoke_api_key(key_id: str) -> None:
    """From now on nobody gets in with it."""
    from omnivideo.storage.database.keys import APIKeyRepository

    if not APIKeyRepository(build_wiring().engine).revoke_key(key_id):
        raise InvalidInput("key", f"there is no {key_id!r}")
    console.print("revoked")
