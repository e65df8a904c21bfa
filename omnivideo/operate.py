"""The service's commands: serve, worker, mllm, migrate, keys, sweep.  Settings come from the environment."""

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console

from omnivideo.errors import InvalidInput, NotInstalled
from omnivideo.settings import service

app = typer.Typer()
keys = typer.Typer(no_args_is_help=True, help="API keys.")
mllm = typer.Typer(no_args_is_help=True, help="The language model's own server.")
app.add_typer(keys, name="keys")
app.add_typer(mllm, name="mllm")
out = Console()
err = Console(stderr=True)

Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda:N.")]
Home = Annotated[Optional[Path], typer.Option(help="Folder of what is embedded.")]  # noqa: UP045
Weights = Annotated[Optional[Path], typer.Option(help="Folder of weights, if not the shipped one.")]  # noqa: UP045


def wiring(device: str = "auto", home: Path | None = None, weights: Path | None = None) -> Any:
    """The rooms that the environment names; the packages that they need are asked for by name."""
    chosen = service(home=home, weights=str(weights) if weights else None)
    try:
        import alembic  # noqa: F401
        import sqlalchemy  # noqa: F401

        from omnivideo.wiring import Wiring
    except ImportError as error:
        raise NotInstalled(f"the service needs {error.name}: pip install 'omnivideo[serve,worker]'") from None
    return Wiring(chosen, device)


class AsJSON(logging.Formatter):
    """One object a line: what a log store can search."""

    plain = set(vars(logging.makeLogRecord({}))) | {"message", "asctime"}

    def format(self, record: logging.LogRecord) -> str:
        told = {"time": self.formatTime(record), "level": record.levelname, "logger": record.name}
        told |= {"message": record.getMessage()}
        told |= {name: value for name, value in vars(record).items() if name not in self.plain}
        if record.exc_info:
            told["trace"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str)


def logged(part: str) -> None:
    """Logs to stderr, as JSON where nobody watches; traces to where OTEL_EXPORTER_OTLP_ENDPOINT says, if it does."""
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s")
    handler.setFormatter(plain if sys.stderr.isatty() else AsJSON())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for chatty in ("httpx", "httpcore2", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    if os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        exported(part)


def exported(part: str) -> None:
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise NotInstalled(
            "traces need: pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"
        ) from None
    provider = TracerProvider(resource=Resource.create({"service.name": f"omnivideo-{part}"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


def listen(make: Callable[[], Any], host: str, port: int) -> None:
    """Runs an HTTP application until it is told to end."""
    try:
        import uvicorn
    except ImportError:
        raise NotInstalled("a server needs: pip install 'omnivideo[serve]'") from None
    # Idle connections are the client's to close: at uvicorn's 5 s a request can meet a connection as it goes.
    uvicorn.run(
        make(), host=host, port=port, log_config=None, access_log=False, timeout_graceful_shutdown=10,
        timeout_keep_alive=75,
    )  # fmt: skip


@app.command()
def serve(
    host: Host = "127.0.0.1",
    port: Port = 8000,
    device: Device = "auto",
    home: Home = None,
    weights: Weights = None,
) -> None:
    """The HTTP service; alone, it is the whole service on SQLite, a folder and a worker of its own."""
    logged("api")
    rooms = wiring(device, home, weights)
    if host not in ("127.0.0.1", "localhost", "::1") and not rooms.settings.admin_key:
        raise InvalidInput("OMNIVIDEO_ADMIN_KEY", "it is empty; who can reach the service from outside needs a key")
    try:
        from omnivideo.api.app import create_app
    except ImportError as error:
        raise NotInstalled(f"the service needs {error.name}: pip install 'omnivideo[serve,worker]'") from None
    try:
        listen(lambda: create_app(rooms.attended(rooms.rooms())), host, port)
    finally:
        rooms.close()


@app.command()
def worker(device: Device = "auto", weights: Weights = None) -> None:
    """Draws what waits, for services that share a broker; one for each device."""
    chosen = service()
    if not chosen.broker:
        raise InvalidInput("OMNIVIDEO_BROKER", "it is empty; give redis://... or amqp://... (serve alone needs none)")
    try:
        from omnivideo.backends.decoder.workers import serve as run
    except ImportError as error:
        raise NotInstalled(f"a worker needs {error.name}: pip install 'omnivideo[worker]'") from None

    def make() -> tuple[Any, float]:
        logged("worker")  # in the child: neither threads nor connections outlive a fork
        return wiring(device, weights=weights).worker, chosen.lost_after

    run(chosen.broker, make)


@mllm.command("serve")
def mllm_serve(
    host: Host = "127.0.0.1",
    port: Port = 8001,
    device: Device = "auto",
    weights: Weights = None,
    engine: Annotated[str, typer.Option(help="auto (vLLM where it is installed), vllm or transformers.")] = "auto",
    tensor_parallel: Annotated[int, typer.Option(help="vLLM: GPUs that share the model.")] = 1,
    memory: Annotated[float, typer.Option(help="vLLM: share of the GPU's memory.")] = 0.9,
    cache: Annotated[int, typer.Option(help="vLLM on a CPU: GiB for the cache.")] = 1,
    dtype: Annotated[str, typer.Option(help="vLLM: auto, float32, float16 or bfloat16.")] = "auto",
    quantization: Annotated[Optional[str], typer.Option(help="vLLM: a method, such as fp8.")] = None,  # noqa: UP045
    lora: Annotated[Optional[Path], typer.Option(help="vLLM: a folder as PEFT saves it.")] = None,  # noqa: UP045
    longest: Annotated[Optional[int], typer.Option(help="vLLM: tokens of a request at the most.")] = None,  # noqa: UP045
    users: Annotated[int, typer.Option(help="vLLM: requests answered at a time.")] = 16,
) -> None:
    """Answers for many services that have no language model in their process: vLLM's server, or a plain one."""
    logged("mllm")
    from omnivideo.backends.mllm import serving
    from omnivideo.models import checkpoint
    from omnivideo.studio import pick_device, shipped

    chosen = service(weights=str(weights) if weights else None)
    folder = Path(chosen.weights) if chosen.weights else shipped(chosen.preset)
    given = serving.options(
        tensor_parallel=tensor_parallel, memory=memory, cache=cache, dtype=dtype, quantization=quantization,
        lora=lora, longest=longest, users=users,
    )  # fmt: skip
    if started := serving.command(device, folder, port, host, engine, given):
        serving.become(started)
    from omnivideo.backends.mllm.local import LocalMLLM
    from omnivideo.backends.mllm.server import Lately, mllm_app

    omni = checkpoint.load(folder, pick_device(device))
    listen(lambda: mllm_app(LocalMLLM(omni, Lately())), host, port)


@mllm.callback()
def mllm_help() -> None:
    """The language model's own server."""


@app.command()
def migrate() -> None:
    """Brings the database to this version's schema; serve and worker do it too."""
    wiring().engine.dispose()
    out.print("the database is at the newest schema")


@app.command()
def sweep(home: Home = None) -> None:
    """Removes artifacts that nothing refers to, once they are older than OMNIVIDEO_LIFETIME."""
    rooms = wiring(home=home)
    gone = rooms.sweep()
    out.print(f"{len(gone)} removed")


@keys.command("add")
def add(name: Annotated[str, typer.Argument(help="Whose it is.")]) -> None:
    """Makes a key and prints it, this once."""
    from omnivideo.storage.keys import Keys

    made, key = Keys(wiring().engine).add(name)
    out.print(f"{made}  {key}", highlight=False, soft_wrap=True)


@keys.command("list")
def listed() -> None:
    """All keys, without their secrets."""
    from omnivideo.storage.keys import Keys

    for row in Keys(wiring().engine).listed():
        out.print(f"{row['id']}  {row['name']}{'  revoked' if row['revoked'] else ''}", highlight=False, markup=False)


@keys.command("revoke")
def revoke(key_id: str) -> None:
    """From now on nobody gets in with it."""
    from omnivideo.storage.keys import Keys

    if not Keys(wiring().engine).revoke(key_id):
        raise InvalidInput("key", f"there is no {key_id!r}")
    out.print("revoked")
