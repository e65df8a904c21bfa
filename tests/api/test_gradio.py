"""The README's conversation in Gradio's chat, unmodified and in its own environment, in headless Chromium."""

import json
import os
import subprocess
import venv
from pathlib import Path

import pytest

from omnivideo.settings import load_settings
from omnivideo.wiring import ServiceWiring
from tests.support.api_server import run_api_server
from tests.support.browser import chromium
from tests.support.openai_service import KEY, make_png

DRIVER = Path(__file__).parents[1] / "support" / "gradio_chat.py"
VERSIONS = ("gradio==6.31.0", "openai==3.57.0", "playwright==1.65.2")
SCREENSHOTS = os.environ.get("OMNIVIDEO_SCREENSHOTS")  # a folder that keeps them


@pytest.fixture(scope="module")
def gradio_python(tmp_path_factory) -> Path:
    """Return the interpreter of an environment with Gradio, or skip. OMNIVIDEO_GRADIO_PYTHON names an existing one."""
    if given := os.environ.get("OMNIVIDEO_GRADIO_PYTHON"):
        return Path(given)
    folder = tmp_path_factory.mktemp("gradio") / "venv"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *VERSIONS]
    installed = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if installed.returncode:
        pytest.skip(f"pip cannot install Gradio here: {installed.stderr.strip().splitlines()[-1]}")
    return python


@pytest.fixture(scope="module")
def steps(gradio_python, tmp_path_factory) -> dict[str, dict]:
    """Hold the conversation with the shipped weights; return what each answer shows, and what was generated."""
    folder = Path(SCREENSHOTS) if SCREENSHOTS else tmp_path_factory.mktemp("screens")
    (folder / "upload.png").write_bytes(make_png(200, 64))
    wiring = ServiceWiring(load_settings(home=tmp_path_factory.mktemp("service"), admin_key=KEY), "cpu")
    with run_api_server(wiring) as address:
        command = [gradio_python, DRIVER, address, KEY, chromium(), str(folder)]
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "GRADIO_ANALYTICS_ENABLED": "False"}
        held = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, check=False)
        assert held.returncode == 0, held.stderr[-3000:]
        num_jobs = sum(count for _, _, count in wiring.jobs.count_by_lane_and_state())
    steps = json.loads((folder / "steps.json").read_text())
    return {step["name"]: step for step in steps} | {"jobs": {"count": num_jobs}}


@pytest.mark.timeout(1200)
def test_every_clip_is_visible_and_the_second_turn_changes_it(steps):
    for name, words in (("clip", "a small red circle moving right"), ("edit", "blue")):
        ((alt, width),) = steps[name]["pictures"]
        assert width > 0 and words in alt, steps[name]
        assert any(".mp4" in link for link in steps[name]["links"])
    assert not steps["question"]["pictures"] and "right" in steps["question"]["text"]


def test_what_is_wrong_with_words_does_not_end_the_conversation(steps):
    assert "That message is too long" in steps["too long"]["text"]
    assert all(not step.get("errors") for step in steps.values())
    assert steps["upload"]["text"].strip() and steps["regenerate"]["text"].strip()
    assert steps["after"]["text"].strip()


def test_nothing_was_generated_that_nobody_asked_for(steps):
    assert steps["jobs"]["count"] == 2  # the clip and its edit
