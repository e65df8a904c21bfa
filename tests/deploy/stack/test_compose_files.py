"""Docker Compose itself reads and merges the files of deploy/."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.deploy.stack.engine import Engine
from tests.support.compose_files import DEPLOY, REQUIRED, ROOT

FILES = sorted(path.name for path in DEPLOY.glob("compose*.yaml"))


def merge(engine: Engine, folder: Path, *names: str) -> dict:
    """Return the services of the files, merged, and check that Compose has nothing to say about them."""
    (folder / "env").write_text("".join(f"{name}={value}\n" for name, value in REQUIRED.items()))
    files = [word for name in names for word in ("-f", str(DEPLOY / name))]
    command = ["docker", "compose", "--env-file", str(folder / "env"), *files, "config", "--format", "json"]
    environment = {name: os.environ[name] for name in ("HOME", "PATH")} | engine.environment
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    services: dict = json.loads(done.stdout)["services"]
    return services


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_read_without_a_warning(engine, tmp_path, name):
    plain = merge(engine, tmp_path, "compose.yaml")
    merged = merge(engine, tmp_path, *dict.fromkeys(["compose.yaml", name]))
    assert plain.keys() <= merged.keys()
    assert (merged == plain) == (name == "compose.yaml")


def test_minio_leaves_nothing_of_the_other_store(engine, tmp_path):
    store = merge(engine, tmp_path, "compose.yaml", "compose.minio.yaml")["s3"]
    assert "garage" not in json.dumps(store).lower() and not store.get("configs")
    assert [volume["target"] for volume in store["volumes"]] == ["/data"]
    assert store["command"] == ["server", "/data", "--address", ":3900"]


def test_secrets_from_files_leave_none_in_variables(engine, tmp_path):
    services = merge(engine, tmp_path, "compose.yaml", "compose.secrets.yaml")
    ours = {name: services[name]["environment"] for name in ("api", "worker", "migrate", "sweep", "mllm")}
    for name, environment in ours.items():
        values = {value for variable, value in environment.items() if not variable.endswith("_FILE")}
        assert not any("x" * 24 in str(value) for value in values), name
