"""The examples of the README and of docs/service.md run against a service; only the port is changed."""

import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from omnivideo.presets import PRESETS, TINY
from tests.support import client_table
from tests.support.api_server import build_scripted_wiring, run_api_server
from tests.support.client_features import FEATURES
from tests.support.client_programs import CLIENTS
from tests.support.client_services import SERVICES

ROOT = Path(__file__).parents[2]
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "docs/service.md")}
HERE = re.compile(r"(?:http://)?(?:localhost|127\.0\.0\.1):8000")


@pytest.fixture(scope="module")
def address(omni, tmp_path_factory):
    steps = {task: chosen.model_copy(update={"steps": 2}) for task, chosen in TINY.sampling.items()}
    with pytest.MonkeyPatch.context() as quick:
        quick.setitem(PRESETS, "tiny", TINY.model_copy(update={"sampling": steps}))
        quick.setattr(omni, "preset", PRESETS["tiny"])
        with run_api_server(build_scripted_wiring(tmp_path_factory.mktemp("service"), omni)) as address:
            yield address


@pytest.mark.parametrize("page", PAGES)
def test_the_curl_examples_generate_a_clip(page, address, tmp_path):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed; the shell examples of the service were not tested")
    lines = re.findall(r"^curl .*$", PAGES[page], flags=re.M)
    *waiting, posted, downloaded = (HERE.sub(address, line) for line in lines)
    for line in waiting:
        subprocess.run(["bash", "-c", line], capture_output=True, check=True, timeout=60)
    made = subprocess.run(["bash", "-c", posted], capture_output=True, text=True, check=True, timeout=60)
    video = json.loads(made.stdout)
    assert video["object"] == "video", video
    until = time.monotonic() + 60
    while video["status"] != "completed" and time.monotonic() < until:
        time.sleep(0.1)
        video = httpx.get(f"{address}/v1/videos/{video['id']}", trust_env=False).json()
    command = downloaded.replace("/ID/", f"/{video['id']}/")
    subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, check=True, timeout=60)
    assert (tmp_path / "clip.mp4").read_bytes()[4:8] == b"ftyp"


def test_the_client_example_runs(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", PAGES["docs/service.md"], flags=re.S)
    exec(compile(HERE.sub(address, block), "docs/service.md", "exec"), {})
    assert (tmp_path / "clip.mp4").exists()


def test_the_table_of_clients_is_that_of_the_last_run():
    """`make test-clients` writes both; nobody edits the table, and no failure or other version is in it."""
    results = client_table.load_results()
    assert client_table.split_page(PAGES["docs/service.md"])[1] == client_table.render_table(results)
    pins = {client.name: client.pin for client in CLIENTS}
    for name, entry in results.items():
        assert entry["version"] == pins[name]
        for words in (entry[service] for service in SERVICES if service in entry):
            assert words.keys() <= FEATURES.keys() or words.keys() == {"skipped"}
            assert (
                all(word == "worked" or word.startswith("refused: ") for word in words.values()) or "skipped" in words
            )
