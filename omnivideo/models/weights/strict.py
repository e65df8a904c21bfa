"""Load weights strictly: a missing or unknown key or a wrong shape is an error, where the libraries only warn."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.overrides import TorchFunctionMode

from omnivideo.errors import CheckpointError

META = torch.device("meta")
# What modules call to initialise their parameters.
INITIALIZERS = {
    torch.nn.init.constant_, torch.nn.init.kaiming_uniform_, torch.nn.init.normal_, torch.nn.init.uniform_,
    Tensor.fill_, Tensor.normal_, Tensor.uniform_, Tensor.zero_,
}  # fmt: skip


class MetaShortcuts(TorchFunctionMode):
    """Spares operations on the meta device, where the libraries create a model before they read its weights.

    Tensors there have no values, so none are initialised. The tables of rotary positions, which are in no file, start
    from `arange` on the CPU. For each such operation, torch would run reference implementations in Python, and import
    sympy for them: a third of a small model's loading time.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in INITIALIZERS:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        if func is torch.arange and kwargs.get("device") == META:
            kwargs = kwargs | {"device": "cpu"}
        return func(*args, **kwargs)


def load_strict(cls: Any, folder: Path, name: str, dtype: torch.dtype | None) -> Any:
    """Load a library's model from a subfolder; raise CheckpointError for missing keys, where libraries only warn.

    Without a `dtype`, a transformers model gets the file's precision and a diffusers model gets float32.
    """
    part = folder / name
    if not (part / "config.json").is_file():
        raise CheckpointError(f"{name}/config.json is missing from the weights")
    check_not_quantized(name, part / "config.json")
    try:
        with MetaShortcuts():
            model, report = cls.from_pretrained(
                part, torch_dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        reason = get_first_line(error).replace(str(folder), folder.name)
        raise CheckpointError(f"{name} cannot be loaded: {reason}") from error
    check_keys(name, list(report["missing_keys"]), list(report["unexpected_keys"]), list(report["mismatched_keys"]))
    return model


def check_not_quantized(name: str, config_file: Path) -> None:
    """Raise CheckpointError if a part's configuration says that its weights are quantised, such as to fp8 or int4.

    The libraries would run them with kernels of their own, or convert them, in ways that no test of ours covers.
    """
    try:
        quantization = json.loads(config_file.read_text()).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return  # reading the configuration for its own sake names what is wrong with it
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        text = f"{name}: its weights are quantised ({method or 'by an unknown method'})"
        raise CheckpointError(f"{text}; supported: weights in float32, float16 or bfloat16")


def check_keys(
    name: str,
    missing: Sequence[str],
    unknown: Sequence[str],
    mismatched: Sequence[str | tuple[str, torch.Size, torch.Size]],
) -> None:
    """Raise CheckpointError unless all lists are empty. transformers lists mismatched keys with both shapes."""
    for problem, keys in (("is missing", missing), ("is unknown", unknown), ("has a different shape", mismatched)):
        if keys:
            first = keys[0] if isinstance(keys[0], str) else keys[0][0]
            raise CheckpointError(f"{name}: {len(keys)} weights do not fit; the first, {first}, {problem}")


def get_first_line(error: Exception) -> str:
    """Return the first line of an error's text, at most 200 characters, or its type if it has no text."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def explain_unreadable(path: Path, expected: str) -> str:
    """Return in one line what is wrong with a file that is not of the expected form, such as "JSON"."""
    label = f"{path.parent.name}/{path.name}"
    with path.open("rb") as file:
        begin = file.read(64).lstrip().lower()
    if begin.startswith(b"version https://git-lfs"):
        return f"{label} is a pointer of Git LFS, not the file itself; run `git lfs pull` in its repository"
    if begin.startswith((b"<!doctype", b"<html")):
        return f"{label} is a web page, not the file itself; download it again"
    return f"{label} is cut short, or is not {expected}"
