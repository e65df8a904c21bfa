"""The stack of deploy/compose.yaml on a container engine of the tests' own, started as docs/operations.md says."""

import json
import secrets
import shutil
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.deploy.stack.compose import Stack, copy_checkout
from tests.deploy.stack.documented import read_commands
from tests.deploy.stack.engine import Engine, EngineMissing, run_engine
from tests.deploy.stack.images import build_images_to_start_from, serve_wheels
from tests.support.compose_files import ROOT
from tests.support.servers import free_port

CACHE = ROOT / ".cache" / "deploy"
NEEDED_DISK_BYTES = 12 * 2**30


@pytest.fixture(scope="session")
def report() -> Iterator[dict[str, str]]:
    """Measured figures by what was measured; they are written to .cache/deploy/results.json."""
    figures: dict[str, str] = {}
    yield figures
    CACHE.mkdir(parents=True, exist_ok=True)
    (CACHE / "results.json").write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures, indent=1))


@pytest.fixture(scope="session")
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    if "deploy" not in request.config.option.markexpr:  # as in `pytest tests/deploy`
        pytest.skip("the images and the stack are tested by `make test-deploy`")
    CACHE.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(CACHE).free < NEEDED_DISK_BYTES and not (CACHE / "engine" / "data").exists():
        pytest.skip("less than 12 GB are free: the images were not built")
    try:
        with run_engine(CACHE / "engine") as engine:
            yield engine
    except EngineMissing as error:
        pytest.skip(f"{error}: the images and the stack were not tested")


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """What an operator fills in, with ports that are free on this machine."""
    api_port, store_port = free_port(), free_port()
    names = ("POSTGRES_PASSWORD", "REDIS_PASSWORD", "GARAGE_RPC_SECRET", "OMNIVIDEO_S3_SECRET_KEY",
             "OMNIVIDEO_ADMIN_KEY", "OMNIVIDEO_MLLM_KEY")  # fmt: skip
    return {name: secrets.token_hex(24) for name in names} | {
        "OMNIVIDEO_S3_ACCESS_KEY": f"GK{secrets.token_hex(12)}",
        "API_ADDRESS": f"127.0.0.1:{api_port}",
        "S3_ADDRESS": f"127.0.0.1:{store_port}",
        "OMNIVIDEO_S3_PUBLIC": f"http://127.0.0.1:{store_port}",
        "OMNIVIDEO_PUBLIC_URL": f"http://127.0.0.1:{api_port}",
    }


@pytest.fixture(scope="session")
def stack(engine: Engine, environment: dict[str, str], report: dict[str, str]) -> Iterator[Stack]:
    """Build the images and start every service, by the commands under "Start" in docs/operations.md."""
    copy_file, start, ask, *_ = read_commands("Start")
    copy_checkout(CACHE / "checkout")
    stack = Stack(engine, CACHE / "checkout")
    mirror = build_images_to_start_from(engine, CACHE)
    with serve_wheels(engine, CACHE) as wheels:
        stack.run(copy_file)
        stack.set_variables(environment | mirror | wheels)
        stack.down()
        try:
            began_at = time.monotonic()
            stack.compose("build")
            report["images built in"] = f"{time.monotonic() - began_at:.0f} s"
            engine.run_docker("image", "prune", "--force")  # those of earlier runs, whose names they have taken
            for service in ("api", "worker", "mllm"):
                size = engine("GET", f"/images/{stack.services[service]['image']}/json")["Size"]
                report[f"image of {service}"] = f"{size / 1e9:.2f} GB"
            for service, seconds in stack.up().items():
                report[f"{service} healthy after"] = f"{seconds:.0f} s"
            stack.run(start)  # it changes nothing, and waits until every service is healthy
            assert json.loads(stack.run(ask))["status"] == "ready"
            yield stack
        finally:
            stack.down()


@pytest.fixture(scope="session")
def key(environment: dict[str, str]) -> str:
    return environment["OMNIVIDEO_ADMIN_KEY"]


@pytest.fixture
def http(stack: Stack, environment: dict[str, str], key: str) -> Iterator[httpx.Client]:
    address, headers = environment["OMNIVIDEO_PUBLIC_URL"], {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=address, headers=headers, timeout=300, trust_env=False) as client:
        yield client
