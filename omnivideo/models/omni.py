"""The complete model, and the paper's data flow through it.

Shapes: B batch, Q visual tokens, N hidden states and M width of the MLLM, E width of the visual encoder,
L condition tokens, D text width of the decoder, z T h w latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen3VLForConditionalGeneration, UMT5EncoderModel

from omnivideo.contracts import Medium
from omnivideo.models.bridge import Adapter, VisionHead, VisualContextAdapter
from omnivideo.models.conditions import MarkerEmbeddings, assemble_conditions, count_condition_tokens, encode_text
from omnivideo.models.mllm import MLLMMessage
from omnivideo.models.mllms import BoundMLLM, bind_mllm
from omnivideo.models.positions import add_absolute_positions
from omnivideo.presets import Preset, VisionInputConfig


class Bridge(nn.Module):
    """The modules between the MLLM and the decoder, with random weights: vision head, adapter, context and markers."""

    def __init__(self, preset: Preset):
        super().__init__()
        head, adapter = preset.vision_head, preset.adapter
        assert head is not None and adapter is not None, "only version 1 presets have a bridge"
        self.vision_head = VisionHead(head.input_dim, head.width, head.num_queries, head.num_layers, head.num_heads)
        self.adapter = Adapter(
            adapter.input_dim, adapter.width, adapter.num_queries, adapter.num_layers, adapter.num_heads
        )
        self.visual_context = build_visual_context_adapter(preset)
        self.markers = MarkerEmbeddings(preset.text_width)


def build_visual_context_adapter(preset: Preset) -> VisualContextAdapter:
    """Return the preset's visual context adapter with random weights."""
    size, channels = preset.visual_context, preset.decoder["in_channels"]
    return VisualContextAdapter(channels, size.hidden_dim, preset.text_width, size.kernel_size, size.absolute_positions)


def build_decoder(preset: Preset) -> WanTransformer3DModel:
    """Return the preset's decoder with random weights."""
    decoder = WanTransformer3DModel(**preset.decoder)
    return add_absolute_positions(decoder) if preset.absolute_positions else decoder


@dataclass
class OmniVideoModel:
    """All parts of one preset, on one device.

    `mllm_tokenizer` belongs to the MLLM and `tokenizer` to the decoder's text encoder.
    """

    preset: Preset
    mllm: Qwen3VLForConditionalGeneration
    mllm_tokenizer: PreTrainedTokenizerBase
    bridge: Bridge
    decoder: WanTransformer3DModel
    text_encoder: UMT5EncoderModel
    tokenizer: PreTrainedTokenizerBase
    vae: AutoencoderKLWan

    @property
    def vision_config(self) -> VisionInputConfig:
        return self.preset.mllm.vision_input

    @property
    def bound_mllm(self) -> BoundMLLM:
        """The calls of the preset's MLLM family, on this model's weights."""
        return bind_mllm(self.preset, self.mllm, self.mllm_tokenizer)

    # ------------------------------------------------------------ visual tokens

    def compute_visual_tokens(self, requests: Sequence[tuple[MLLMMessage, Medium]]) -> Tensor:
        """Return V_o [B, Q, E] (Eq. 1), which the vision head predicts from the hidden states of each request."""
        states_BNM, padding_BN = self.bound_mllm.compute_features(requests)
        visual_BQE: Tensor = self.bridge.vision_head(states_BNM, padding_BN)
        return visual_BQE

    def adapt_visual_tokens(self, visual_BQE: Tensor, targets: Sequence[Medium]) -> list[Tensor]:
        """Return each request's adapter tokens [L, D] (Eq. 3): of all visual tokens for a video, of one for an image.

        An image uses the first visual token.
        """
        # Each visual token is adapted independently, so a batch of images can skip all but the first.
        tokens_BLD = self.bridge.adapter(visual_BQE if "video" in targets else visual_BQE[:, :1])
        image_tokens = self.count_adapter_tokens("image")
        return [
            row_LD if target == "video" else row_LD[:image_tokens]
            for row_LD, target in zip(tokens_BLD, targets, strict=True)
        ]

    def count_adapter_tokens(self, target: Medium) -> int:
        """Return the number of condition tokens that the adapter yields for an image or a video."""
        return self.bridge.adapter.num_queries * (self.bridge.vision_head.num_queries if target == "video" else 1)

    # ------------------------------------------------------------ the decoder's condition

    def encode_prompts(self, prompts: Sequence[str]) -> list[Tensor]:
        """Return the text embeddings [L, D] of each prompt, without padding."""
        hidden_BLD, lengths_B = encode_text(self.tokenizer, self.text_encoder, prompts, self.preset.text.max_tokens)
        return [row_LD[:length] for row_LD, length in zip(hidden_BLD, lengths_B.tolist(), strict=True)]

    def encode_visual_context(self, source_BzThw: Tensor | None, count: int) -> list[Tensor | None]:
        """Return the visual context tokens [L, D] of each source, or `count` times None if there is no source."""
        if source_BzThw is None:
            return [None] * count
        return list(self.bridge.visual_context(source_BzThw))

    def build_condition(
        self, prompts: Sequence[str], visual_LD: Sequence[Tensor | None], source_BzThw: Tensor | None = None
    ) -> Tensor:
        """Return the decoder's condition c [B, L, D] of prompts, adapter tokens and, for an edit, source latents.

        Raises ConditionTooLong if a prompt or a condition exceeds the preset's limit.
        """
        context_LD = self.encode_visual_context(source_BzThw, len(prompts))
        min_tokens, max_tokens = self.preset.condition.min_tokens, self.preset.condition.max_tokens
        return assemble_conditions(
            self.bridge.markers, self.encode_prompts(prompts), visual_LD, context_LD, min_tokens, max_tokens
        )

    def build_null_condition(self, negative_prompt: str, count: int, source_BzThw: Tensor | None = None) -> Tensor:
        """Return the null condition for guidance: the negative prompt without visual tokens.

        It keeps the source, as in the released code.
        """
        return self.build_condition([negative_prompt] * count, [None] * count, source_BzThw)

    def compute_condition_length(self, prompt: str, target: Medium) -> int:
        """Return the length L of the condition of a new image or video without building it."""
        text_tokens = len(self.tokenizer(prompt, verbose=False).input_ids)
        needed = count_condition_tokens(self.bridge.markers, text_tokens, self.count_adapter_tokens(target), None)
        return max(self.preset.condition.min_tokens, needed)

    # ------------------------------------------------------------ modules

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return self.mllm, self.bridge, self.decoder, self.text_encoder, self.vae

    def eval(self) -> "OmniVideoModel":
        """Put all modules into evaluation mode and freeze their weights."""
        for module in self.modules:
            module.eval().requires_grad_(False)
        return self

    def to(self, device: torch.device | str) -> "OmniVideoModel":
        for module in self.modules:
            module.to(device)
        return self

    @property
    def device(self) -> torch.device:
        device: torch.device = self.decoder.device
        return device
