"""Start the call recorder of tests/support/call_paths.py in a child process; Python imports this file by its name."""

import importlib.util
import os
import sys
from pathlib import Path

if folder := os.environ.get("OMNIVIDEO_TEST_CALL_PATHS"):
    spec = importlib.util.spec_from_file_location(
        "omnivideo_call_paths", Path(__file__).resolve().parents[1] / "call_paths.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    module.Profiler(Path(folder)).start()
