"""MinIO in the store's place, by compose.minio.yaml. No MinIO server is run: its settings are run against rclone."""

import urllib.request
from pathlib import Path
from typing import Any

import yaml

from omnivideo.api.bulkheads import BoundedObjectStore, Bulkhead
from omnivideo.settings import load_settings
from omnivideo.wiring import ServiceWiring
from tests.support.compose_files import DEPLOY, REQUIRED, interpolate
from tests.support.s3_server import ACCESS_KEY, SECRET_KEY, s3_server

GIVEN = {"OMNIVIDEO_S3_ACCESS_KEY": ACCESS_KEY, "OMNIVIDEO_S3_SECRET_KEY": SECRET_KEY}
RESET = object()


class Override:
    """A value that replaces the one below it instead of being merged."""

    def __init__(self, value: Any):
        self.value = value


class ComposeLoader(yaml.SafeLoader):
    """Reads compose's tags for the merging of files."""


ComposeLoader.add_constructor("!reset", lambda loader, node: RESET)
ComposeLoader.add_constructor(
    "!override",
    lambda loader, node: Override(
        loader.construct_mapping(node, deep=True) if isinstance(node, yaml.MappingNode)
        else loader.construct_sequence(node, deep=True)
    ),
)  # fmt: skip


def merge(below: Any, above: Any) -> Any:
    """Merge two values of compose files: mappings by key, while sequences and texts replace each other.

    Compose appends some sequences; the files here mark those of which that is not wanted.
    """
    if isinstance(above, Override):
        return above.value
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    merged = below | {name: merge(below.get(name), value) for name, value in above.items()}
    return {name: value for name, value in merged.items() if value is not RESET}


def load(name: str, **given: str) -> Any:
    return yaml.load(interpolate((DEPLOY / name).read_text(), REQUIRED | GIVEN | given), ComposeLoader)


def test_minio_takes_the_place_of_the_store() -> None:
    stack = load("compose.yaml")
    added = load("compose.minio.yaml")
    sequences = [name for name, value in added["services"]["s3"].items() if isinstance(value, list)]
    assert not sequences  # compose would append them
    merged = merge(stack, added)
    store = merged["services"]["s3"]
    assert {name: value for name, value in merged["services"].items() if name != "s3"} == {
        name: value for name, value in stack["services"].items() if name != "s3"
    }
    assert "GARAGE" not in str(store) and "configs" not in store and "garage" not in str(store)
    for kept in ("ports", "networks", "user", "read_only", "cap_drop", "deploy", "tmpfs", "restart"):
        assert store[kept] == stack["services"]["s3"][kept]
    assert store["ports"][0].endswith(":" + store["command"][-1].removeprefix(":"))  # it listens where clients ask
    assert "minio" in merged["volumes"] and store["volumes"] == ["minio:/data"]
    assert store["healthcheck"]["test"] == ["CMD", "mc", "ready", "local"]
    assert store["healthcheck"]["interval"] == stack["services"]["s3"]["healthcheck"]["interval"]
    assert "FROM quay.io/minio/minio:RELEASE.2025" in store["build"]["dockerfile_inline"]
    own = merge(stack, load("compose.minio.yaml", MINIO_IMAGE="registry.test/minio:1"))["services"]["s3"]
    assert "FROM registry.test/minio:1\n" in own["build"]["dockerfile_inline"]


def test_the_service_uses_what_minio_is_given(tmp_path: Path) -> None:
    merged = merge(load("compose.yaml", OMNIVIDEO_S3_REGION="eu-west-1"),
                   load("compose.minio.yaml", OMNIVIDEO_S3_REGION="eu-west-1"))  # fmt: skip
    minio, api = (merged["services"][name]["environment"] for name in ("s3", "api"))
    assert (minio["MINIO_ROOT_USER"], minio["MINIO_ROOT_PASSWORD"]) == (ACCESS_KEY, SECRET_KEY)
    assert minio["MINIO_SITE_REGION"] == api["OMNIVIDEO_S3_REGION"] == "eu-west-1"
    with s3_server(tmp_path) as server:
        names = ("s3_bucket", "s3_access_key", "s3_secret_key", "s3_region")
        settings = {name: api[f"OMNIVIDEO_{name.upper()}"] for name in names}
        assert api["OMNIVIDEO_S3"] == "http://s3:3900"
        wiring = ServiceWiring(load_settings(s3=server.address, home=tmp_path / "home", **settings))
        key = wiring.store.put(b"clip", "mp4")
        assert wiring.store.get(key) == b"clip"
        bounded = BoundedObjectStore(wiring.store, Bulkhead("store", 1))  # what the routes use
        for store in (wiring.store, bounded):
            with urllib.request.urlopen(store.presign_url(key, 60)) as response:
                assert response.read() == b"clip"
        assert wiring.store.sweep({key}, 0.0) == []
        wiring.close()
