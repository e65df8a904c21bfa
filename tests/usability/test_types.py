"""A user's script passes `mypy --strict` with the types that the package ships, and wrong options do not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import asyncio

import numpy as np
from PIL import Image

from omnivideo import AsyncClient, Client, Result, Studio
from omnivideo.turns import TurnCompleted


def use_studio(studio: Studio | Client) -> list[int]:
    clip: Result = studio.generate("a red ball", steps=2, width=64, height=64, seed=3, progress=False)
    edited = studio.edit(Image.new("RGB", (64, 64)), "make it blue", guidance_scale=4.0)
    more = studio.edit_many(np.zeros((64, 64, 3), np.uint8), "make it blue", 2, steps=1)
    several = studio.generate_many("a red ball", 2, steps=1, image=True)
    print(clip.manifest.prompt, edited.fps, clip.frames.shape, studio.understand(clip, "what is shown?", seed=1))
    thread = studio.open_thread()
    for event in thread.send("a red ball", [clip, "picture.png"], think="off", steps=2):
        if isinstance(event, TurnCompleted):
            print(event.turn.text)
    return [result.seed for result in [*more, *several]]


async def use_client() -> None:
    async with AsyncClient() as client:
        results = await asyncio.gather(client.generate("a red ball"), client.edit("clip.mp4", "make it blue"))
        thread = await client.open_thread()
        async for event in thread.send("a red ball", steps=2):
            print(event.kind, results[0].seed)
        async for outcome in client.batch(["a red ball"], "out"):
            print(outcome.file)
"""
WRONG = """
from omnivideo import Client, Studio

Studio().generate("a red ball", stepz=2)
Client().generate("a red ball", steps="two")
Client().generate_many("a red ball", 2, widht=64)
Studio().open_thread().send("a red ball", think="often")
"""


@pytest.fixture(scope="module")
def find_errors(tmp_path_factory):
    """Return a function that returns the lines in which mypy finds errors in a script."""
    folder = tmp_path_factory.mktemp("scripts")

    def check(text: str) -> list[str]:
        (folder / "script.py").write_text(text)
        command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", "cache", "script.py"]
        environment = os.environ | {"MYPYPATH": str(ROOT)}
        completed = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert "script.py" not in completed.stderr, completed.stderr
        return [line for line in completed.stdout.splitlines() if line.startswith("script.py") and ": error:" in line]

    return check


def test_a_users_script_is_typed(find_errors):
    assert find_errors(SCRIPT) == []
    assert any("Incompatible types" in line for line in find_errors(SCRIPT.replace("clip: Result", "clip: int")))


def test_wrong_options_are_type_errors(find_errors):
    assert len({line.split(":")[1] for line in find_errors(WRONG)}) == 4
