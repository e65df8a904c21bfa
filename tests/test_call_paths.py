"""Count the files on the call paths that must stay short; see architecture.md."""

import subprocess
import sys
import threading
from pathlib import Path

from omnivideo.errors import InvalidInput
from omnivideo.presets import get_preset
from tests.support.call_paths import record_calls


def test_the_recorder_counts_functions_of_threads_and_children(tmp_path: Path) -> None:
    script = "import sys; from omnivideo.errors import InvalidInput; sys.stdin.readline(); str(InvalidInput('a', 'b'))"
    with record_calls(tmp_path) as recorder:
        get_preset("tiny")
        child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE)
        with recorder.open_window() as first:
            thread = threading.Thread(target=get_preset, args=("tiny",), name="reader")
            thread.start()
            thread.join()
            child.communicate(b"\n")
        with recorder.open_window() as second:
            InvalidInput("name", "problem")
        get_preset("tiny")
    assert child.returncode == 0
    assert first.list_files() == ["errors.py", "presets.py"], first.describe()
    assert first.list_files(ignored_threads=["reader"]) == ["errors.py"]
    assert len({call.process_id for call in first.list_calls()}) == 2
    assert second.list_files() == ["errors.py"], second.describe()
