"""The types that editors complete and type checkers check: those of a user's script."""

import subprocess
import sys
from pathlib import Path

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


def check_types(script: str, folder: Path) -> list[str]:
    """Return the lines in which mypy finds errors in a script."""
    path = folder / "script.py"
    path.write_text(script)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir", folder / "cache", path]
    command += ["--config-file", ROOT / "pyproject.toml", "--follow-imports", "silent"]
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert completed.returncode in (0, 1), completed.stderr
    return [line for line in completed.stdout.splitlines() if "script.py" in line and ": error:" in line]


def test_a_users_script_has_no_type_errors(tmp_path):
    assert check_types(SCRIPT, tmp_path) == []


def test_wrong_options_are_type_errors(tmp_path):
    assert len({line.split(":")[1] for line in check_types(WRONG, tmp_path)}) == 4
