"""The stack of deploy/compose.yaml on a container engine of the tests' own."""

import json
import secrets
import shutil
import time
from collections.abc import Iterator

import httpx
import pytest
import yaml

from tests.deploy.stack.compose import Stack
from tests.deploy.stack.engine import Engine, EngineMissing, run_engine
from tests.deploy.stack.images import build_our_images, build_stand_ins
from tests.support.compose_files import DEPLOY, ROOT, interpolate
from tests.support.servers import free_port

CACHE = ROOT / ".cache" / "deploy"
NEEDED_DISK_BYTES = 12 * 2**30
OURS = ("api", "worker", "mllm")


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
    """An .env file's values, with ports that are free on this machine."""
    api_port, store_port = free_port(), free_port()
    names = ("POSTGRES_PASSWORD", "REDIS_PASSWORD", "GARAGE_RPC_SECRET", "OMNIVIDEO_S3_SECRET_KEY",
             "OMNIVIDEO_ADMIN_KEY", "OMNIVIDEO_MLLM_KEY")  # fmt: skip
    return {name: secrets.token_hex(24) for name in names} | {
        "OMNIVIDEO_S3_ACCESS_KEY": f"GK{secrets.token_hex(12)}",
        "API_ADDRESS": f"127.0.0.1:{api_port}-{api_port + 3}",
        "S3_ADDRESS": f"127.0.0.1:{store_port}",
        "OMNIVIDEO_S3_PUBLIC": f"http://127.0.0.1:{store_port}",
        "OMNIVIDEO_PUBLIC_URL": f"http://127.0.0.1:{api_port}",
    }


@pytest.fixture(scope="session")
def stack(engine: Engine, environment: dict[str, str], report: dict[str, str]) -> Iterator[Stack]:
    """Build the images and start every service."""
    model = yaml.safe_load(interpolate((DEPLOY / "compose.yaml").read_text(), environment))
    services = model["services"]
    for service in OURS:
        started_at = time.monotonic()
        image = services[service]["image"]
        build_our_images(engine, CACHE, {image: services[service]["build"]})
        size = engine("GET", f"/images/{image}/json")["Size"]
        report[f"image of {service}"] = f"{size / 1e9:.2f} GB, {time.monotonic() - started_at:.0f} s"
    build_stand_ins(engine, CACHE, {name: services[name]["image"] for name in ("redis", "postgres", "s3")})
    stack = Stack(engine, environment)
    stack.down()
    try:
        for service, seconds in stack.up().items():
            report[f"{service} healthy after"] = f"{seconds:.0f} s"
        yield stack
    finally:
        stack.down()


@pytest.fixture(scope="session")
def key(environment: dict[str, str]) -> str:
    return environment["OMNIVIDEO_ADMIN_KEY"]


@pytest.fixture
def http(stack: Stack, key: str) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=stack.address("api", 8000), headers=headers, timeout=300, trust_env=False) as client:
        yield client
