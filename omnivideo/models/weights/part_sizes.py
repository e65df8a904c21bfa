"""Measure the parts of a folder of weights for `plan_placement`; only the headers of files are read.

What a computation needs beside the weights is estimated from the preset's largest default clip.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch

from omnivideo.contracts import compute_latent_grid, count_decoder_tokens
from omnivideo.models.placement import GIB, PartSize
from omnivideo.models.vae import MAX_UNTILED_PIXELS
from omnivideo.models.weights.tensor_files import DTYPE_BY_NAME, read_safetensors_header
from omnivideo.presets import Preset, SamplingDefaults

FOLDERS = {"decoder": "transformer", "decoder_2": "transformer_2"}  # where they differ from the part's name
BLOCK_NAME = re.compile(r".*?\.\d+\.")  # such as "blocks.0."
FLOAT_BYTES = 4
# Tensors alive at once in the VAE's last stage of four frames, as the peak of a decoding in float32 shows.
VAE_TENSORS, VAE_FRAMES, VAE_WIDTH = 6, 4, 96
MLLM_WORKING_BYTES, SMALL_WORKING_BYTES = 2 * GIB, GIB // 2


def measure_parts(folder: Path, preset: Preset, names: tuple[str, ...]) -> list[PartSize]:
    """Return the sizes of these parts with their weights in the types that the preset states.

    A part that is missing has size 0: loading it raises the error. Raises CheckpointError for a damaged file.
    """
    return [measure_part(folder, preset, name) for name in names]


def measure_part(folder: Path, preset: Preset, name: str) -> PartSize:
    """Return the size of one part; see `measure_parts`."""
    dtype = preset.dtypes.get(name.removesuffix("_2"), "float32")
    item_bytes = getattr(torch, dtype).itemsize
    total = 0
    blocks: defaultdict[str, int] = defaultdict(int)
    for key, count in count_elements(folder / FOLDERS.get(name, name)):
        total += count * item_bytes
        if match := BLOCK_NAME.match(key):
            blocks[match[0]] += count * item_bytes
    working_bytes = estimate_working_bytes(preset, name)
    return PartSize(name, dtype, total, max(blocks.values(), default=total), working_bytes)


def count_elements(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield each tensor of a part, and of its subfolders, with the number of its elements."""
    for path in sorted(folder.rglob("*.safetensors")):
        for key, entry in read_safetensors_header(path)[1].items():
            if entry["dtype"] in DTYPE_BY_NAME:
                yield f"{path.parent.name}.{key}", prod(entry["shape"])


def estimate_working_bytes(preset: Preset, name: str) -> int:
    """Return what a part's largest computation takes beside its weights, for the preset's largest default clip."""
    if name.startswith("decoder"):
        return max(estimate_decoder_bytes(preset, defaults) for defaults in preset.sampling.values())
    if name == "vae":
        return max(estimate_vae_bytes(defaults) for defaults in preset.sampling.values())
    if name in ("markers", "null_context"):
        return 0
    return MLLM_WORKING_BYTES if name == "mllm" else SMALL_WORKING_BYTES


def estimate_decoder_bytes(preset: Preset, defaults: SamplingDefaults) -> int:
    """Estimate a block: its residual stream, queries, keys, values and feed-forward layer, in float32 at most."""
    config = preset.decoder
    width = int(config["num_attention_heads"] * config["attention_head_dim"])
    tokens = count_decoder_tokens(preset, compute_latent_grid(defaults.width, defaults.height, defaults.frames))
    return FLOAT_BYTES * tokens * (12 * width + 2 * int(config["ffn_dim"]))


def estimate_vae_bytes(defaults: SamplingDefaults) -> int:
    """Estimate the decoding of four frames at full size, or of a tile, and the pixels of the whole clip."""
    area = defaults.width * defaults.height
    stage = FLOAT_BYTES * min(area, MAX_UNTILED_PIXELS) * VAE_WIDTH * VAE_FRAMES * VAE_TENSORS
    return stage + 2 * FLOAT_BYTES * 3 * area * defaults.frames
