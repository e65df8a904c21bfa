"""vLLM's Qwen3-VL, dense and mixture of experts, with a cache of the hidden states before the final norm.

vLLM's layers can return their outputs for speculative decoding (`set_aux_hidden_state_layers`); the last layer's is the
input of the norm. Shapes: T tokens of one step, over all requests; M width of the MLLM.
"""

from typing import Any

import torch
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeConfig
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration
from vllm.model_executor.models.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration
from vllm.multimodal import MULTIMODAL_REGISTRY

from omnivideo.backends.mllm.vllm_plugin.model import HiddenStateCache
from omnivideo.backends.mllm.vllm_plugin.processor import (
    OmniVideoDummyInputs,
    OmniVideoProcessingInfo,
    OmniVideoProcessor,
)


class MoeProcessingInfo(OmniVideoProcessingInfo):
    """The sizes of media for a mixture of experts, whose configuration is of another class."""

    def get_hf_config(self) -> Any:
        return self.ctx.get_hf_config(Qwen3VLMoeConfig)


def add_hidden_state_cache(model: Any, vllm_config: VllmConfig) -> HiddenStateCache:
    """Make the last layer return its output, and return the cache for it."""
    text = vllm_config.model_config.hf_config.text_config
    model.set_aux_hidden_state_layers((text.num_hidden_layers,))
    # vLLM requires a number in a layer's name; this is the next one after the attention layers.
    return HiddenStateCache(1, text.hidden_size, vllm_config.cache_config, prefix=f"rows.{text.num_hidden_layers}")


def keep_states(cache: HiddenStateCache, output: Any) -> Any:
    """Write the states before the norm [T, M] to the cache, and return those after it."""
    if not isinstance(output, tuple):
        return output  # of another stage of a pipeline
    states_TM, (before_norm_TM,) = output
    cache(before_norm_TM)
    return states_TM


@MULTIMODAL_REGISTRY.register_processor(
    OmniVideoProcessor, info=OmniVideoProcessingInfo, dummy_inputs=OmniVideoDummyInputs
)
class OmniVideoQwen3VL(Qwen3VLForConditionalGeneration):
    """A stock Qwen3-VL. `hf_config.omnivideo` has the preset's name."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "model"):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.hidden_state_cache = add_hidden_state_cache(self, vllm_config)

    def forward(self, *args: Any, **kwargs: Any) -> Any | torch.Tensor:
        return keep_states(self.hidden_state_cache, super().forward(*args, **kwargs))


@MULTIMODAL_REGISTRY.register_processor(OmniVideoProcessor, info=MoeProcessingInfo, dummy_inputs=OmniVideoDummyInputs)
class OmniVideoQwen3VLMoe(Qwen3VLMoeForConditionalGeneration):
    """A stock Qwen3-VL with a mixture of experts. `hf_config.omnivideo` has the preset's name."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "model"):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.hidden_state_cache = add_hidden_state_cache(self, vllm_config)

    def forward(self, *args: Any, **kwargs: Any) -> Any | torch.Tensor:
        return keep_states(self.hidden_state_cache, super().forward(*args, **kwargs))
