"""A LoRA in the format of PEFT for the MLLM: check that it fits a folder of weights, and merge it into a loaded model.

A key `base_model.model.NAME.lora_A.weight` [rank, in] and its `lora_B` [out, rank] belong to the linear layer NAME. The
merged weight is W + alpha / rank * B A.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from omnivideo.errors import InvalidInput

if TYPE_CHECKING:
    from torch import nn

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
KEY_PATTERN = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
MAX_RANK = 512  # what vLLM can reserve memory for
Shape = tuple[int, ...]


def check_lora(lora: Path, mllm: Path) -> None:
    """Raise InvalidInput unless every weight of the LoRA belongs to a layer of the MLLM in the folder `mllm`."""
    read_lora_rank(lora)
    if not (lora / WEIGHTS_FILE).is_file():
        raise InvalidInput("lora", f"the folder {lora.name!r} has no {WEIGHTS_FILE}")
    layers = read_shapes(sorted(mllm.glob("*.safetensors")))
    pairs = pair_lora_weights(read_shapes([lora / WEIGHTS_FILE]))
    check_lora_scale(lora, pairs)
    for name, shapes in pairs.items():
        weight = layers.get(f"{name}.weight")
        if weight is None:
            raise InvalidInput("lora", f"it changes {name}, which this model does not have; it is of another model")
        if len(weight) != 2 or (shapes["B"][0], shapes["A"][1]) != weight:
            raise InvalidInput("lora", f"its weights for {name} have another shape; it is of another model")


def read_lora_config(lora: Path) -> dict[str, Any]:
    """Return the configuration of a LoRA. Raises InvalidInput if the folder is missing or not one of PEFT's."""
    if not lora.is_dir():
        raise InvalidInput("lora", f"there is no folder {lora.name!r}; name a folder that PEFT has saved")
    try:
        return dict(json.loads((lora / CONFIG_FILE).read_text()))
    except OSError:
        text = f"the folder {lora.name!r} has no {CONFIG_FILE}; name a folder that PEFT has saved"
        raise InvalidInput("lora", text) from None
    except (ValueError, TypeError):
        return {}


def read_lora_rank(lora: Path) -> int:
    """Return the rank of a LoRA. Raises InvalidInput."""
    rank = read_lora_config(lora).get("r")
    if rank is None:
        raise InvalidInput("lora", f"{CONFIG_FILE} in {lora.name!r} has no rank `r`")
    if not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise InvalidInput("lora", f"its rank is {rank!r}; allowed: 1 to {MAX_RANK}")
    return rank


def check_lora_scale(lora: Path, pairs: dict[str, dict[str, Shape]]) -> None:
    """Raise InvalidInput unless all layers have the rank and the alpha of the configuration.

    Both engines scale every layer alike.
    """
    config, rank = read_lora_config(lora), read_lora_rank(lora)
    for field in ("rank_pattern", "alpha_pattern"):
        if config.get(field):
            raise InvalidInput("lora", f"{CONFIG_FILE} has {field}; supported: one rank and one alpha for all layers")
    alpha = config.get("lora_alpha", rank)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise InvalidInput("lora", f"{CONFIG_FILE} has lora_alpha {alpha!r}; allowed: a number")
    for name, shapes in pairs.items():
        if (shapes["A"][0], shapes["B"][1]) != (rank, rank):
            raise InvalidInput("lora", f"its weights for {name} do not have the rank {rank} of {CONFIG_FILE}")


def read_shapes(paths: list[Path]) -> dict[str, Shape]:
    """Return the shapes of all tensors of safetensors files."""
    shapes: dict[str, Shape] = {}
    for path in paths:
        try:
            with safe_open(path, "numpy") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            raise InvalidInput("lora", f"{path.name} cannot be read as safetensors") from None
    return shapes


def pair_lora_weights(shapes: dict[str, Shape]) -> dict[str, dict[str, Shape]]:
    """Return the shapes of A and B of each layer. Raises InvalidInput for a key of another kind."""
    pairs: dict[str, dict[str, Shape]] = {}
    for key, shape in shapes.items():
        match = KEY_PATTERN.fullmatch(key)
        if match is None or len(shape) != 2:
            raise InvalidInput("lora", f"its key {key[:100]} is not a LoRA weight of a linear layer")
        pairs.setdefault(match[1], {})[match[2]] = shape
    for name, pair in pairs.items():
        if len(pair) != 2:
            raise InvalidInput("lora", f"it has only one of the two weights for {name}")
    if not pairs:
        raise InvalidInput("lora", "it has no weights")
    return pairs


def merge_lora(model: "nn.Module", lora: Path) -> None:
    """Add a LoRA that `check_lora` has accepted to the weights of a loaded MLLM."""
    import torch
    from safetensors.torch import load_file

    config, rank, tensors = read_lora_config(lora), read_lora_rank(lora), load_file(lora / WEIGHTS_FILE)
    scale = config.get("lora_alpha", rank) / (rank**0.5 if config.get("use_rslora") else rank)
    layers = dict(model.named_modules())
    with torch.no_grad():
        for name in pair_lora_weights({key: tuple(tensor.shape) for key, tensor in tensors.items()}):
            down, up = (tensors[f"base_model.model.{name}.lora_{part}.weight"].float() for part in "AB")
            weight = layers[name].get_parameter("weight")
            # Not in place: the pages of a mapped file may be given back, and then have what the file has.
            weight.data = weight + (scale * up @ down).to(weight)
