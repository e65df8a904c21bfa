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
from omnivideo.models.conditions import Markers, assemble, count_tokens, encode_text
from omnivideo.models.mllm import Message, Pixels, hidden_states
from omnivideo.models.positions import with_absolute_positions
from omnivideo.presets import Preset

Target = Literal["image", "video"]


class Bridge(nn.Module):
    """The joining parts, random at first: vision head, adapter, visual context adapter and markers."""

    def __init__(self, preset: Preset):
        super().__init__()
        head, adapter = preset.vision_head, preset.adapter
        assert head is not None and adapter is not None, "a version 1 preset"
        self.vision_head = VisionHead(head.dim_in, head.width, head.queries, head.layers, head.heads)
        self.adapter = Adapter(adapter.dim_in, adapter.width, adapter.queries, adapter.layers, adapter.heads)
        self.visual_context = visual_context_of(preset)
        self.markers = Markers(preset.text_width)


def visual_context_of(preset: Preset) -> VisualContextAdapter:
    size, channels = preset.visual_context, preset.decoder["in_channels"]
    return VisualContextAdapter(channels, size.hidden, preset.text_width, size.kernel, size.absolute_positions)


def build_decoder(preset: Preset) -> WanTransformer3DModel:
    decoder = WanTransformer3DModel(**preset.decoder)
    return with_absolute_positions(decoder) if preset.absolute_positions else decoder


@dataclass
class Omni:
    """All parts of one preset, on one device."""

    preset: Preset
    mllm: Qwen3VLForConditionalGeneration
    mllm_tokenizer: PreTrainedTokenizerBase
    pixels: Pixels
    bridge: Bridge
    decoder: WanTransformer3DModel
    text_encoder: UMT5EncoderModel
    tokenizer: PreTrainedTokenizerBase
    vae: AutoencoderKLWan

    def visual_tokens(self, requests: Sequence[tuple[Message, Target]]) -> Tensor:
        """V_o [B, Q, E] of the vision head, read from the MLLM's hidden states of each request."""
        states, padding = hidden_states(self.mllm, self.mllm_tokenizer, requests, self.pixels)
        return self.bridge.vision_head(states, padding)

    def adapted(self, visual_BQE: Tensor, targets: Sequence[Target]) -> list[Tensor]:
        """Adapter tokens [L, D] of each request: of all visual tokens for a video, of the first for an image."""
        # Every visual token goes through alone: those that no request uses need not.
        tokens = self.bridge.adapter(visual_BQE if "video" in targets else visual_BQE[:, :1])
        each = self.adapted_tokens("image")
        return [row if target == "video" else row[:each] for row, target in zip(tokens, targets, strict=True)]

    def texts(self, prompts: Sequence[str]) -> list[Tensor]:
        """Text embeddings [L, D] of each prompt, at its true length."""
        hidden, lengths = encode_text(self.tokenizer, self.text_encoder, prompts, self.preset.text_tokens)
        return [row[:length] for row, length in zip(hidden, lengths.tolist(), strict=True)]

    def context(self, source_BzThw: Tensor | None, count: int) -> list[Tensor | None]:
        """Visual context tokens [L, D] of each source; None where there is no source (generation mode)."""
        if source_BzThw is None:
            return [None] * count
        return list(self.bridge.visual_context(source_BzThw))

    def condition(
        self, prompts: Sequence[str], visual: Sequence[Tensor | None], source_BzThw: Tensor | None = None
    ) -> Tensor:
        """c [B, L, D] for the decoder, from prompts, adapter tokens and, in editing mode, source latents."""
        context = self.context(source_BzThw, len(prompts))
        least, most = self.preset.condition_least, self.preset.condition_most
        return assemble(self.bridge.markers, self.texts(prompts), visual, context, least, most)

    def condition_length(self, prompt: str, target: Target) -> int:
        """L of the condition of a new image or video, without making it."""
        words = len(self.tokenizer(prompt, verbose=False).input_ids)
        needed = count_tokens(self.bridge.markers, words, self.adapted_tokens(target), None)
        return max(self.preset.condition_least, needed)

    def adapted_tokens(self, target: Target) -> int:
        """How many tokens of a condition the adapter makes."""
        return self.bridge.adapter.queries * (self.bridge.vision_head.queries if target == "video" else 1)

    def null_condition(self, negative: str, count: int, source_BzThw: Tensor | None = None) -> Tensor:
        """The universal negative prompt without visual tokens; the source stays (as released)."""
        return self.condition([negative] * count, [None] * count, source_BzThw)

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        return self.mllm, self.bridge, self.decoder, self.text_encoder, self.vae

    def eval(self) -> "Omni":
        for part in self.parts:
            part.eval().requires_grad_(False)
        return self

    def to(self, device: torch.device | str) -> "Omni":
        for part in self.parts:
            part.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return self.decoder.device
