"""The openai package runs against our service in a separate environment, without our package."""

import subprocess
import venv

import pytest

from tests.support.api_server import build_scripted_wiring, run_api_server

KEY = "a-key-for-the-tests"
SCRIPT = """
import sys
from importlib.util import find_spec
from openai import OpenAI

assert find_spec("omnivideo") is None and find_spec("torch") is None
client = OpenAI(base_url=sys.argv[1] + "/v1", api_key=sys.argv[2])
names = [model.id for model in client.models.list()]
video = client.videos.create_and_poll(prompt="a ball", size=sys.argv[3], poll_interval_ms=100)
assert video.status == "completed", video
content = client.videos.download_content(video.id).read()
print(len(names), len(content))
"""


@pytest.mark.timeout(900)
def test_a_video_is_created_and_downloaded(omni, tmp_path_factory):
    folder = tmp_path_factory.mktemp("openai")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "openai>=3.54,<4"]
    installed = subprocess.run(install, capture_output=True, text=True, timeout=600, check=False)
    if installed.returncode:
        pytest.skip(f"pip cannot install openai here: {installed.stderr.strip().splitlines()[-1]}")
    with run_api_server(build_scripted_wiring(folder / "service", omni, admin_key=KEY)) as address:
        command = [python, "-c", SCRIPT, address, KEY, "64x64"]
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder)}
        completed = subprocess.run(
            command, capture_output=True, text=True, timeout=240, cwd=folder, env=environment, check=False
        )
    assert completed.returncode == 0, completed.stderr[-3000:]
    models, size = map(int, completed.stdout.split())
    assert models >= 1 and size > 500
