"""The cached features of stages 2b and 3: the outputs of all models that are frozen there.

For each request: latents of target and source, the MLLM's last hidden states, text embeddings, and the visual encoder's
embeddings of the target (Eq. 1). Ragged rows are stored flat with their offsets, in half precision.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import SiglipVisionModel

from omnivideo.contracts import VAE_TEMPORAL_STRIDE
from omnivideo.models.mllm import add_position_ids, forward_hidden_states, prepare_hidden_state_inputs
from omnivideo.models.omni import OmniVideoModel
from omnivideo.models.vae import encode_pixels, pixels_from_bytes
from omnivideo.synthetic.requests import SceneRequest
from omnivideo.training.data.batch import CachedTask, RaggedTensor
from omnivideo.training.data.prefetch import map_in_order
from omnivideo.training.recipes.losses import embed_frames
from omnivideo.training.tiny.latents import hash_weights, pixels_from_scenes
from omnivideo.training.tiny.mllm import message_from_request

ProgressCallback = Callable[[int, int], None]
T = TypeVar("T")
CHUNK_SIZE = 32


@dataclass(frozen=True)
class PreparationConfig:
    """How features are computed: requests per chunk, and processes that prepare chunks (0: this process)."""

    on_progress: ProgressCallback = lambda done, total: None
    chunk_size: int = CHUNK_SIZE
    workers: int = 0

    def map_chunks(self, requests: list[SceneRequest], prepare: Callable[[list[SceneRequest]], T]) -> Iterator[T]:
        """Yield the result of `prepare` for each chunk of requests."""
        starts = range(0, len(requests), self.chunk_size)
        results = map_in_order(lambda start: prepare(requests[start : start + self.chunk_size]), starts, self.workers)
        for start, result in zip(starts, results, strict=True):
            yield result
            self.on_progress(min(start + self.chunk_size, len(requests)), len(requests))


@torch.no_grad()
def compute_frozen_features(
    omni: OmniVideoModel, encoder: SiglipVisionModel, requests: list[SceneRequest], config: PreparationConfig
) -> dict[str, Tensor]:
    """Return the features that do not depend on the MLLM: latents, text embeddings and visual embeddings."""
    text_embeddings, visual_embeddings, latents = [], [], defaultdict(list)
    queries = omni.bridge.vision_head.num_queries

    def render_chunk(chunk: list[SceneRequest]) -> tuple[list[str], dict[str, Tensor]]:
        pixels = {"target": pixels_from_bytes(np.stack([request.render_target() for request in chunk]))}
        for name in ("source", "last_frame"):
            scenes = [scene for request in chunk if (scene := getattr(request, name)) is not None]
            if scenes:
                pixels[name] = pixels_from_scenes(scenes)
        return [request.text for request in chunk], pixels

    for texts, pixels in config.map_chunks(requests, render_chunk):
        text_embeddings += [row.cpu() for row in omni.encode_prompts(texts)]
        moved = {name: tensor.to(omni.device) for name, tensor in pixels.items()}
        visual_embeddings.append(embed_frames(encoder, moved["target"], queries).half().cpu())
        for name, tensor in moved.items():
            latents[name].append(encode_pixels(omni.vae, tensor).half().cpu())
    tensors = {name: torch.cat(parts) for name, parts in latents.items()} | {"embeddings": torch.cat(visual_embeddings)}
    if "last_frame" in tensors:  # the context of a clip between two stills has both
        tensors["source"] = torch.cat([tensors["source"], tensors.pop("last_frame")], dim=2)
    return tensors | flatten_ragged("text", text_embeddings)


@torch.no_grad()
def compute_hidden_states(
    omni: OmniVideoModel, requests: list[SceneRequest], config: PreparationConfig
) -> dict[str, Tensor]:
    """Return the MLLM's last hidden states of the requests, as a ragged tensor."""
    hidden_states = []

    def tokenize_chunk(chunk: list[SceneRequest]) -> dict[str, Tensor]:
        inputs = prepare_hidden_state_inputs(
            omni.mllm_tokenizer,
            [(message_from_request(request), request.medium) for request in chunk],
            omni.vision_config,
        )
        return add_position_ids(omni.mllm, inputs)

    for inputs in config.map_chunks(requests, tokenize_chunk):
        states, padding = forward_hidden_states(omni.mllm, inputs)
        hidden_states += [row[~is_padding].half().cpu() for row, is_padding in zip(states, padding, strict=True)]
    return flatten_ragged("hidden", hidden_states)


def flatten_ragged(name: str, rows: Sequence[Tensor]) -> dict[str, Tensor]:
    ragged = RaggedTensor.from_rows(rows)
    return {name: ragged.flat, f"{name}_offsets": ragged.offsets}


def load_or_compute(path: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return a file's tensors; compute and store them if it does not exist."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(compute(), partial)
        partial.rename(path)
    return load_file(path)


def make_cache_key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def load_frozen_features(
    folder: Path,
    omni: OmniVideoModel,
    encoder: SiglipVisionModel,
    requests: list[SceneRequest],
    config: PreparationConfig,
) -> tuple[str, str, dict[str, Tensor]]:
    """Return name, cache key and tensors of the features that do not depend on the MLLM."""
    name = f"{requests[0].task}-{len(requests)}"
    key = make_cache_key(requests, *map(hash_weights, (omni.vae, omni.text_encoder, encoder)))
    return (
        name,
        key,
        load_or_compute(
            folder / f"{name}-{key}.safetensors", lambda: compute_frozen_features(omni, encoder, requests, config)
        ),
    )


def load_cached_task(
    folder: Path,
    omni: OmniVideoModel,
    encoder: SiglipVisionModel,
    requests: list[SceneRequest],
    config: PreparationConfig,
) -> CachedTask:
    """Return the features of one task from the folder's cache; compute and store what is missing."""
    name, frozen_key, tensors = load_frozen_features(folder, omni, encoder, requests, config)
    hidden_key = make_cache_key(frozen_key, hash_weights(omni.mllm.model))
    tensors |= load_or_compute(
        folder / f"{name}-hidden-{hidden_key}.safetensors", lambda: compute_hidden_states(omni, requests, config)
    )
    hidden_states, text_embeddings = (
        RaggedTensor(tensors[name], tensors[f"{name}_offsets"]) for name in ("hidden", "text")
    )
    return CachedTask(
        tensors["target"],
        tensors.get("source"),
        hidden_states,
        text_embeddings,
        tensors["embeddings"],
        -(-requests[0].given_frame_count // VAE_TEMPORAL_STRIDE),
    )
