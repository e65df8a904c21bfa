"""The whole model in one object, and the paper's data flow through it.

Shapes: B batch, N hidden states, M width of the MLLM, E width of the visual encoder, D text width of the decoder,
L condition tokens, z T h w latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen3VLForConditionalGeneration, UMT5EncoderModel

from omnivideo.models.bridge import Adapter, VisionHead, VisualContextAdapter
from omnivideo.models.conditions import MarkerEmbeddings, assemble_conditions, count_condition_tokens, encode_text
from omnivideo.models.mllm import MLLMMessage, VisionInputConfig, compute_hidden_states
from omnivideo.models.positions import add_absolute_positions
from omnivideo.presets import Preset

TargetMedium = Literal["image", "video"]


class Bridge(nn.Module):
    """The joining parts, random at first: vision head, adapter, visual context adapter and markers."""

    def __init__(self, preset: Preset):
        super().__init__()
        head, adapter = preset.vision_head, preset.adapter
        assert head is not None and adapter is not None, "a version 1 preset"
        self.vision_head = VisionHead(head.input_dim, head.width, head.num_queries, head.num_layers, head.num_heads)
        self.adapter = Adapter(
            adapter.input_dim, adapter.width, adapter.num_queries, adapter.num_layers, adapter.num_heads
        )
        self.visual_context = build_visual_context_adapter(preset)
        self.markers = MarkerEmbeddings(preset.text_width)


def build_visual_context_adapter(preset: Preset) -> VisualContextAdapter:
    size, channels = preset.visual_context, preset.decoder["in_channels"]
    return VisualContextAdapter(channels, size.hidden_dim, preset.text_width, size.kernel_size, size.absolute_positions)


def build_decoder(preset: Preset) -> WanTransformer3DModel:
    decoder = WanTransformer3DModel(**preset.decoder)
    return add_absolute_positions(decoder) if preset.absolute_positions else decoder


@dataclass
class OmniVideoModel:
    """All parts of one preset, on one device."""

    preset: Preset
    mllm: Qwen3VLForConditionalGeneration
    mllm_tokenizer: PreTrainedTokenizerBase
    vision_config: VisionInputConfig
    bridge: Bridge
    decoder: WanTransformer3DModel
    text_encoder: UMT5EncoderModel
    tokenizer: PreTrainedTokenizerBase
    vae: AutoencoderKLWan

    def compute_visual_tokens(self, requests: Sequence[tuple[MLLMMessage, TargetMedium]]) -> Tensor:
        """V_o [B, Q, E] of the vision head, read from the MLLM's hidden states of each request."""
        states, padding = compute_hidden_states(self.mllm, self.mllm_tokenizer, requests, self.vision_config)
        return self.bridge.vision_head(states, padding)

    def adapt_visual_tokens(self, visual_BQE: Tensor, targets: Sequence[TargetMedium]) -> list[Tensor]:
        """Adapter tokens [L, D] of each request: of all visual tokens for a video, of the first for an image."""
        # Every visual token goes through alone: those that no request uses need not.
        tokens = self.bridge.adapter(visual_BQE if "video" in targets else visual_BQE[:, :1])
        tokens_per_image = self.count_adapter_tokens("image")
        return [
            row if target == "video" else row[:tokens_per_image] for row, target in zip(tokens, targets, strict=True)
        ]

    def encode_prompts(self, prompts: Sequence[str]) -> list[Tensor]:
        """Text embeddings [L, D] of each prompt, at its true length."""
        hidden, lengths = encode_text(self.tokenizer, self.text_encoder, prompts, self.preset.max_text_tokens)
        return [row[:length] for row, length in zip(hidden, lengths.tolist(), strict=True)]

    def encode_visual_context(self, source_BzThw: Tensor | None, count: int) -> list[Tensor | None]:
        """Visual context tokens [L, D] of each source; None where there is no source (generation mode)."""
        if source_BzThw is None:
            return [None] * count
        return list(self.bridge.visual_context(source_BzThw))

    def build_condition(
        self, prompts: Sequence[str], visual: Sequence[Tensor | None], source_BzThw: Tensor | None = None
    ) -> Tensor:
        """c [B, L, D] for the decoder, from prompts, adapter tokens and, in editing mode, source latents."""
        context = self.encode_visual_context(source_BzThw, len(prompts))
        min_tokens, max_tokens = self.preset.min_condition_tokens, self.preset.max_condition_tokens
        return assemble_conditions(
            self.bridge.markers, self.encode_prompts(prompts), visual, context, min_tokens, max_tokens
        )

    def compute_condition_length(self, prompt: str, target: TargetMedium) -> int:
        """L of the condition of a new image or video, without making it."""
        text_tokens = len(self.tokenizer(prompt, verbose=False).input_ids)
        needed = count_condition_tokens(self.bridge.markers, text_tokens, self.count_adapter_tokens(target), None)
        return max(self.preset.min_condition_tokens, needed)

    def count_adapter_tokens(self, target: TargetMedium) -> int:
        """How many tokens of a condition the adapter makes."""
        return self.bridge.adapter.num_queries * (self.bridge.vision_head.num_queries if target == "video" else 1)

    def build_null_condition(self, negative_prompt: str, count: int, source_BzThw: Tensor | None = None) -> Tensor:
        """The universal negative prompt without visual tokens; the source stays (as released)."""
        return self.build_condition([negative_prompt] * count, [None] * count, source_BzThw)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return self.mllm, self.bridge, self.decoder, self.text_encoder, self.vae

    def eval(self) -> "OmniVideoModel":
        for part in self.modules:
            part.eval().requires_grad_(False)
        return self

    def to(self, device: torch.device | str) -> "OmniVideoModel":
        for part in self.modules:
            part.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return self.decoder.device
