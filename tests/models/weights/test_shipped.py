"""The weights that we ship, as a newcomer meets them: small, strict, and right about the README's own examples."""

import pytest
from rich.console import Console

from omnivideo.cli.demo import DEMO_TURNS, run_demo
from omnivideo.models.weights.checkpoint import SHIPPED_WEIGHTS_FOLDER
from omnivideo.sdk.studio import Studio
from omnivideo.synthetic.facts import ObjectSpec, SceneSpec
from omnivideo.synthetic.scorer import detect_scene

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def studio(tmp_path_factory) -> Studio:
    return Studio(home=tmp_path_factory.mktemp("home"), device="cpu")


def test_they_are_small_and_have_a_card():
    files = [path for path in (SHIPPED_WEIGHTS_FOLDER / "tiny").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6
    card = (SHIPPED_WEIGHTS_FOLDER / "tiny" / "README.md").read_text()
    assert "| `stage3` |" in card and "| routing |" in card


def test_the_readme_s_clip_is_what_it_says(studio, tmp_path):
    clip = studio.generate("a small red circle moving right", seed=1)
    assert SceneSpec((ObjectSpec("circle", "red", "small", "right"),)).is_met_by(detect_scene(clip.frames))
    path = clip.save(tmp_path / "clip.mp4")
    assert studio.understand(path, "how does the circle move?") == "it moves right"


def test_the_demo_s_conversation_is_mostly_right(studio, tmp_path, capsys):
    """Its seeds are fixed.  Not every turn: another processor rounds otherwise, and one may fall on the other side."""
    run_demo(tmp_path, Console(width=200), studio)
    told = capsys.readouterr().out
    right = int(told.rsplit(" of ", 1)[0].split()[-1])
    assert right >= len(DEMO_TURNS) - 2 and (tmp_path / "contact-sheet.png").exists(), told
