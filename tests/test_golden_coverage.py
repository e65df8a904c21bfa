"""Every golden file is used by a test that fails when one of its tensors is changed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.golden import golden_folder

pytestmark = [pytest.mark.golden, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[1]
SAMPLING, PARTS = "tests/backends/decoder/test_golden_sampling.py", "tests/models/test_golden_parts.py"
TENSORS_PER_FILE = 4
# The tests that read a file, as arguments of pytest.
TESTS = {
    "qwen3vl.safetensors": ["tests/models/test_qwen3_vl.py"],
    "qwen3vl/model.safetensors": ["tests/models/test_qwen3_vl.py"],
    "source_reading.safetensors": ["tests/media/test_golden_sources.py", PARTS],
    "umt5.safetensors": [PARTS],
    "unipc.safetensors": [PARTS],
    "v1_checkpoint.safetensors": [PARTS, SAMPLING],
    "v1_parts.safetensors": [PARTS],
    "v1_sampling.safetensors": [SAMPLING],
    "v1_side_files.safetensors": [PARTS, SAMPLING],
    "v2_checkpoint_high.safetensors": [PARTS, SAMPLING],
    "v2_checkpoint_low.safetensors": [PARTS, SAMPLING],
    "v2_checkpoint_single.safetensors": [PARTS, SAMPLING],
    "v2_parts.safetensors": [PARTS],
    "v2_sampling.safetensors": [SAMPLING],
    "v2_side_files.safetensors": [PARTS, SAMPLING],
    "vila.safetensors": ["tests/models/test_vila.py"],
    "vila_ar_model/llm/model.safetensors": ["tests/models/test_vila.py"],
    "vila_ar_model/mm_projector/model.safetensors": ["tests/models/test_vila.py"],
    "vila_ar_model/vision_tower/model.safetensors": ["tests/models/test_vila.py"],
    "wan21_vae.safetensors": [PARTS],
}
UNUSED = {
    "v1_side_files.safetensors": {"context/text_emb_siglip2.0"},  # the authors' code reads it and uses it nowhere
}


def list_files() -> list[str]:
    folder = golden_folder()
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors"))


def change_tensor(value: Tensor) -> Tensor:
    """Return a tensor that differs in every element."""
    if value.dtype == torch.bool:
        return ~value
    if not value.is_floating_point():
        return 255 - value if value.dtype == torch.uint8 else value + 1
    return value + 0.1 * (1 + value.abs())


def run_tests(folder: Path, arguments: list[str]) -> int:
    """Run golden tests on a folder in a forked child and return pytest's status."""
    child = os.fork()
    if child == 0:
        os.environ["OMNIVIDEO_GOLDEN"] = str(folder)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os._exit(int(pytest.main(["-x", "-q", "-n0", "-p", "no:cacheprovider", "-m", "golden", *arguments])))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def pick_tensors(file: str) -> list[str]:
    """Return some of a file's tensors, evenly spread over their names."""
    keys = sorted(load_file(golden_folder() / file).keys() - UNUSED.get(file, set()))
    step = max(1, len(keys) // TENSORS_PER_FILE)
    return keys[step // 2 :: step][:TENSORS_PER_FILE]


def test_every_file_is_listed():
    assert list_files() == sorted(TESTS)


@pytest.mark.parametrize("file", TESTS)
def test_a_changed_tensor_is_noticed(file, tmp_path):
    """A new process imports the libraries, and forks for each tensor: nothing that was read before is kept."""
    shutil.copytree(golden_folder(), tmp_path / "golden")
    command = [sys.executable, "-m", "tests.test_golden_coverage", tmp_path / "golden", file]
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.splitlines() == [f"{key}: noticed" for key in pick_tensors(file)]


def change_each_tensor(folder: Path, file: str) -> None:
    """Change some tensors of a copied file, one at a time, and print whether a test has failed."""
    import omnivideo.models.omni  # noqa: F401  the children need not import its libraries again

    torch.set_num_threads(1)
    tensors = load_file(golden_folder() / file)
    for key in pick_tensors(file):
        changed = {name: value.contiguous() for name, value in tensors.items()} | {key: change_tensor(tensors[key])}
        save_file(changed, folder / file)
        status = run_tests(folder, TESTS[file])
        print(f"{key}: {'noticed' if status == pytest.ExitCode.TESTS_FAILED else f'pytest ended with {status}'}")
        sys.stdout.flush()


if __name__ == "__main__":
    change_each_tensor(Path(sys.argv[1]), sys.argv[2])
