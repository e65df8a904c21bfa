"""Qwen3-VL as vLLM has it, with the vision head beside it and a cache of last hidden states under it.

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

from omnivideo.backends.mllm.vllm_plugin.processor import Dummies, Info, Processor
from omnivideo.models.bridge import VisionHead
from omnivideo.presets import preset


class Rows(CacheOnlyAttentionLayer):
    """A paged cache of last hidden states: [blocks, 1, block size, M].  `head` reads them, in the connector."""

    head: VisionHead

    def forward(self, states_TM: Tensor) -> Tensor:
        """Keeps the rows of this step; nothing happens while vLLM measures memory, before there is a cache."""
        slots = get_forward_context().slot_mapping
        own = slots.get(self.layer_name) if isinstance(slots, dict) else None
        if own is not None and self.kv_cache.numel():
            count = min(len(own), len(states_TM))  # a step may be padded, in either
            basic_cache(states_TM[:count, None].to(self.kv_cache.dtype), self.kv_cache, own[:count])
        return states_TM


def vision_head(name: str) -> VisionHead:
    """The preset's head, in float32: its output is the decoder's condition, and it is small beside the MLLM."""
    size = preset(name).vision_head
    assert size is not None, "serving.command lets no other preset through"
    return VisionHead(size.dim_in, size.width, size.queries, size.layers, size.heads).float()


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=Dummies)
class OmniVideoMLLM(Qwen3VLForConditionalGeneration):
    """`hf_config.omnivideo` holds the preset's name and the folder of the head's weights."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "model"):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        self.vision_head = vision_head(config.omnivideo["preset"])
        # vLLM loads these beside the MLLM's own, from safetensors too.
        source = DefaultModelLoader.Source(config.omnivideo["vision_head"], None, prefix="vision_head.")
        self.secondary_weights = (source,)
        text = config.text_config
        # vLLM wants one number in a layer's name: the next after the real ones.
        self.rows = Rows(1, text.hidden_size, vllm_config.cache_config, prefix=f"rows.{text.num_hidden_layers}")
        self.rows.__dict__["head"] = self.vision_head  # not as a sub-module: its weights have one name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        states = super().forward(*args, **kwargs)
        return self.rows(states) if isinstance(states, torch.Tensor) else states
