"""Imports that are interrupted, or that run twice at once: nothing half-written stays, and nothing is lost."""

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from omnivideo.cli import weights
from omnivideo.errors import InvalidInput
from omnivideo.models.weights import checkpoint
from omnivideo.models.weights.digests import compute_folder_digest
from omnivideo.models.weights.importer import import_weights
from omnivideo.training.engine import progress_bar
from tests.support.published_folders import publish_golden, use_golden_sizes

pytestmark = pytest.mark.golden
PRESET = "omnivideo-1.3b"


@pytest.fixture
def published(monkeypatch, tmp_path) -> Path:
    use_golden_sizes(monkeypatch, PRESET)
    return publish_golden(tmp_path / "published", PRESET)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Let the signal raise KeyboardInterrupt, also where the tests run in the background and a shell ignores it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("moment", [0.0, 0.5, 1.0])
def test_ctrl_c_leaves_nothing_and_the_import_can_be_repeated(moment, published, tmp_path):
    """The signal comes with the first, a middle or the last bytes, of files that are written and that are linked."""
    counts: list[int] = []
    import_weights(published, tmp_path / "whole", PRESET, lambda file, count: counts.append(count))
    remaining = iter(range(round(moment * (len(counts) - 1)), -1, -1))

    def interrupt(file: str, count: int) -> None:
        if next(remaining) == 0:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        import_weights(published, tmp_path / "ours", PRESET, interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["published", "whole"]
    import_weights(published, tmp_path / "ours", PRESET)
    assert compute_folder_digest(tmp_path / "ours").value == compute_folder_digest(tmp_path / "whole").value


def test_a_log_has_lines_of_the_progress(published, tmp_path, monkeypatch, capsys):
    """Where no bar can be drawn: one line for each piece here, and every ten seconds otherwise."""
    monkeypatch.setattr(progress_bar, "LINE_SECONDS", 0.0)
    weights.import_published([published], tmp_path / "ours", PRESET)
    lines = [line for line in capsys.readouterr().err.splitlines() if re.search(r"\d/\d.* (bytes|kB|MB)  ", line)]
    assert len(lines) > 10 and all(re.match(r"(\S+  )?[\d.]+/[\d.]+ \S+  [-\d]:[-\d]+:[-\d]+$", line) for line in lines)
    assert lines[-1].endswith("0:00:00")


def test_two_imports_do_not_write_the_same_folder(published, tmp_path):
    """The second is refused and leaves the first alone, here in the middle of its work."""
    refusals: list[str] = []

    def import_again(file: str, count: int) -> None:
        if not refusals:
            with pytest.raises(InvalidInput) as refusal:
                import_weights(published, tmp_path / "ours", PRESET)
            refusals.append(str(refusal.value))

    import_weights(published, tmp_path / "ours", PRESET, import_again)
    assert refusals == ["output: another process is writing 'ours'; choose another folder"]
    checkpoint.verify_digests(tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "published"]
