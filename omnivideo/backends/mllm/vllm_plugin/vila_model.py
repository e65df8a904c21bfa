"""VILA for vLLM: its SigLIP tower and Llama, our projector, the vision head and the cache of last hidden states.

The model's folder for vLLM is that of the Llama. The tower and the projector are read from the folders beside it.
Shapes: T tokens of one step, over all requests; F images; K tokens of an image; M width of the Llama.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.siglip import SiglipVisionModel
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, get_layer_index, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from omnivideo.backends.mllm.vllm_plugin.model import HiddenStateCache, build_vision_head
from omnivideo.backends.mllm.vllm_plugin.vila_processor import (
    VilaDummyInputs,
    VilaProcessingInfo,
    VilaProcessor,
    get_vila_folder,
    read_vision_config,
)
from omnivideo.models.vila import VilaProjector, compute_repelled_keys
from omnivideo.models.vila_requests import get_padding_id
from omnivideo.models.weights.vila import read_image_config


class VilaAttention(LlamaAttention):
    """Llama's attention, in which a masked token does not attend to itself.

    In the authors' code the end token of a request without images is masked, so it attends to all tokens before it but
    not to itself, and the vision head was trained on its state. A negative position -1 - p marks such a token.
    """

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        masked_T: Tensor = positions < 0
        positions = torch.where(masked_T, -1 - positions, positions)
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        queries = q.reshape(len(q) * self.num_kv_heads, -1, self.head_dim)
        repelled = compute_repelled_keys(queries, self.scaling).reshape(k.shape).to(k.dtype)
        attended = self.attn(q, torch.where(masked_T[:, None], repelled, k), v)
        output: Tensor = self.o_proj(attended)[0]
        return output


class VilaDecoderLayer(LlamaDecoderLayer):
    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None):
        super().__init__(vllm_config, prefix, config, attn_layer_type=VilaAttention)


# ---------------------------------------------------------------- the model


@MULTIMODAL_REGISTRY.register_processor(VilaProcessor, info=VilaProcessingInfo, dummy_inputs=VilaDummyInputs)
class OmniVideoVila(nn.Module, SupportsMultiModal, SupportsPP, SupportsLoRA):
    """The MLLM of version 1. `hf_config.omnivideo` has the preset, and the folders of VILA and the vision head."""

    requires_raw_input_tokens = True  # by which masked tokens are found
    packed_modules_mapping = LlamaForCausalLM.packed_modules_mapping
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={"model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.marked_positions: Tensor
        config = vllm_config.model_config.hf_config
        folder = get_vila_folder(config)
        vision_config = read_vision_config(config)
        _, select_layer = read_image_config(folder)
        with self._mark_tower_model(vllm_config, "image"):  # type: ignore[operator]
            self.vision_tower = SiglipVisionModel(
                vision_config,
                num_hidden_layers_override=get_layer_index(select_layer, vision_config.num_hidden_layers),
                require_post_norm=False,
                prefix=maybe_prefix(prefix, "vision_tower"),
            )
            self.mm_projector = VilaProjector(vision_config.hidden_size, config.hidden_size)
        with self._mark_language_model(vllm_config):  # type: ignore[operator]
            self.language_model = LlamaForCausalLM(
                vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model"), layer_type=VilaDecoderLayer
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors
        masked_id = get_padding_id(AutoTokenizer.from_pretrained(folder / "llm", local_files_only=True))
        self.masked_id = -1 if masked_id is None else masked_id
        # At one address, so that CUDA graphs can read it.
        max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("marked_positions", torch.zeros(max_tokens, dtype=torch.long), persistent=False)
        self.vision_head = build_vision_head(config.omnivideo["preset"])
        self.secondary_weights = [
            DefaultModelLoader.Source(str(source), None, prefix=f"{name}.")
            for name, source in (
                ("vision_tower", folder / "vision_tower"),
                ("mm_projector", folder / "mm_projector"),
                ("vision_head", config.omnivideo["vision_head"]),
            )
        ]
        self.hidden_state_cache = HiddenStateCache(
            1, config.hidden_size, vllm_config.cache_config, prefix=f"rows.{config.num_hidden_layers}"
        )
        self.hidden_state_cache.__dict__["head"] = self.vision_head  # not as a submodule: its weights have one name

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Return the tokens [F, K, M] of the images in `pixel_values`."""
        pixels_F3HW = kwargs.get("pixel_values")
        if pixels_F3HW is None:
            return []
        return self.mm_projector(self.vision_tower(pixels_F3HW.to(self.vision_tower.dtype)))

    def mark_positions(self, input_ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """Return the positions, and -1 - p for that of a masked token."""
        marked_T = self.marked_positions[: len(positions_T)]
        marked_T.copy_(torch.where(input_ids_T.eq(self.masked_id), -1 - positions_T, positions_T))
        return marked_T

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if input_ids is not None:
            positions = self.mark_positions(input_ids, positions)
        states = self.language_model.model(
            input_ids, positions, intermediate_tensors, None if intermediate_tensors is not None else inputs_embeds
        )
        return self.hidden_state_cache(states) if isinstance(states, Tensor) else states

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        logits: Tensor | None = self.language_model.compute_logits(hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded: set[str] = AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
        return loaded
