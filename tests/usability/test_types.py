"""A user's script passes `mypy --strict` with the types that the package ships."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = """
from pathlib import Path

from omnivideo import Client, Result, Studio
from omnivideo.errors import OmniVideoError
from omnivideo.turns import ArtifactReady


def generate(prompt: str, folder: Path) -> Result:
    studio = Studio()
    clip = studio.generate(prompt, image=False, seed=1, steps=8)
    clip.save(folder / "clip.mp4")
    answer: str = studio.understand(folder / "clip.mp4", "how does it move?")
    thread = studio.open_thread()
    for event in thread.send(prompt):
        if isinstance(event, ArtifactReady):
            print(event.artifact.caption, studio.artifact_path(event.artifact), answer)
    for outcome in studio.batch([prompt, {"prompt": prompt, "seed": 2}], folder):
        print(outcome.id, outcome.file or outcome.error)
    return clip


def ask(address: str) -> str:
    try:
        with Client(address) as client:
            return client.understand("clip.mp4", "how does it move?")
    except OmniVideoError as error:
        return str(error)
"""


def test_a_users_script_is_typed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), str(script)]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    completed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    own = [line for line in completed.stdout.splitlines() if line.startswith("script.py")]
    assert not own and "script.py" not in completed.stderr, completed.stdout
    wrong = script.write_text(SCRIPT.replace("answer: str", "answer: int"))
    assert wrong
    completed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "script.py" in completed.stdout and "Incompatible types" in completed.stdout
