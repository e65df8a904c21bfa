"""vLLM's Qwen3-VL with the vision head and a cache of last hidden states.

Shapes: T tokens of one step, over all requests; M width of the MLLM.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.extract_hidden_states import CacheOnlyAttentionLayer, basic_cache
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration
from vllm.multimodal import MULTIMODAL_REGISTRY

from omnivideo.backends.mllm.vllm_plugin.processor import (
    OmniVideoDummyInputs,
    OmniVideoProcessingInfo,
    OmniVideoProcessor,
)
from omnivideo.models.bridge import VisionHead
from omnivideo.presets import get_preset


class HiddenStateCache(CacheOnlyAttentionLayer):
    """A paged cache of hidden states [blocks, 1, block size, M], which the connector gives to `head` or writes."""

    head: VisionHead | None = None

    def forward(self, states_TM: Tensor) -> Tensor:
        """Write this step's hidden states to the cache. While vLLM measures memory, there is no cache yet."""
        slots = get_forward_context().slot_mapping
        layer_slots = slots.get(self.layer_name) if isinstance(slots, dict) else None
        if layer_slots is not None and self.kv_cache.numel():
            count = min(len(layer_slots), len(states_TM))  # vLLM may pad either of them
            basic_cache(states_TM[:count, None].to(self.kv_cache.dtype), self.kv_cache, layer_slots[:count])
        return states_TM


def build_vision_head(name: str) -> VisionHead:
    """Return the preset's vision head in float32, since it is small and its output conditions the decoder."""
    size = get_preset(name).vision_head
    assert size is not None, "launch.build_command refuses presets without a vision head"
    return VisionHead(size.input_dim, size.width, size.num_queries, size.num_layers, size.num_heads).float()


@MULTIMODAL_REGISTRY.register_processor(
    OmniVideoProcessor, info=OmniVideoProcessingInfo, dummy_inputs=OmniVideoDummyInputs
)
class OmniVideoMLLM(Qwen3VLForConditionalGeneration):
    """The MLLM of a preset. `hf_config.omnivideo` has the preset's name and the folder of the vision head's weights."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "model"):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        self.vision_head = build_vision_head(config.omnivideo["preset"])
        # vLLM loads these weights in addition to the MLLM's.
        source = DefaultModelLoader.Source(config.omnivideo["vision_head"], None, prefix="vision_head.")
        self.secondary_weights = (source,)
        text = config.text_config
        # vLLM requires a number in a layer's name; this is the next one after the attention layers.
        self.hidden_state_cache = HiddenStateCache(
            1, text.hidden_size, vllm_config.cache_config, prefix=f"rows.{text.num_hidden_layers}"
        )
        self.hidden_state_cache.__dict__["head"] = (
            self.vision_head
        )  # not as a submodule, so that its weights have one name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        states = super().forward(*args, **kwargs)
        return self.hidden_state_cache(states) if isinstance(states, torch.Tensor) else states
