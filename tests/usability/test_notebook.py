"""A notebook with the README's example is executed by nbclient, in an environment of its own, and shows the clip."""

import json
import os
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).parents[2]
# ipywidgets is part of Jupyter; without it, tqdm of the Hugging Face libraries prints a warning.
TOOLS = ("nbclient>=0.10,<1", "ipykernel>=6.29,<8", "ipywidgets>=8,<9")
CELLS = (
    "from omnivideo import Studio\nstudio = Studio()",
    "clip = studio.generate('a small red circle moving right', image=False, seed=1, steps=8)\nclip",
    "clip.save('clip.mp4')\nprint(studio.understand('clip.mp4', 'how does the circle move?'))",
    "studio.generate('a large yellow star', image=True, steps=8)",
    # A bar is shown without being asked for, and is gone at the end.
    "import IPython.display as shown\nshown_texts = []\nHTML = shown.HTML\n"
    "shown.HTML = lambda text: shown_texts.append(text) or HTML(text)\n"
    "studio.generate('a star', image=True, steps=3)\nprint(shown_texts)",
)
EXECUTE = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in {cells}])
NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
nbformat.write(notebook, "executed.ipynb")
"""


@pytest.fixture(scope="module")
def notebook_python(tmp_path_factory) -> Path:
    """Return the interpreter of an environment with Jupyter's kernel beside the packages of this one, or skip."""
    folder = tmp_path_factory.mktemp("notebook") / "venv"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *TOOLS]
    installed = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if installed.returncode:
        pytest.skip(f"pip cannot install nbclient here: {installed.stderr.strip().splitlines()[-1]}")
    packages = Path(sysconfig.get_paths(vars={"base": str(folder)})["purelib"])
    (packages / "test.pth").write_text(f"{ROOT}\n{sysconfig.get_paths()['purelib']}\n")
    return python


def test_a_notebook_shows_the_clip_and_the_picture(notebook_python, tmp_path):
    environment = os.environ | {"OMNIVIDEO_HOME": str(tmp_path / "home"), "IPYTHONDIR": str(tmp_path / "ipython")}
    completed = subprocess.run(
        [notebook_python, "-c", EXECUTE.format(cells=CELLS)], cwd=tmp_path, env=environment, capture_output=True,
        text=True, timeout=800, check=False,
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr[-4000:]
    cells = json.loads((tmp_path / "executed.ipynb").read_text())["cells"]
    pages = [
        "".join(output["data"].get("text/html", "")) if "data" in output else "".join(output.get("text", ""))
        for cell in cells
        for output in cell["outputs"]
    ]
    assert not any(output.get("name") == "stderr" for cell in cells for output in cell["outputs"]), pages
    assert any("<video src=" in page for page in pages) and any("<img src=" in page for page in pages)
    assert any("it moves right" in page for page in pages)
    assert any('<progress value="3" max="3">' in page and page.endswith("'']\n") for page in pages), pages[-3:]
