"""The complete model, and the paper's data flow through it.

Shapes: B batch, Q visual tokens, N hidden states and M width of the MLLM, E width of the visual encoder,
L condition tokens, D text width of the decoder, z T h w latents.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import assert_never

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration
from transformers.models.umt5.modeling_umt5 import UMT5EncoderModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from omnivideo.contracts import Medium
from omnivideo.errors import PartOutOfMemory
from omnivideo.models.bridge import Adapter, HiddenProjection, NullContext, VisionHead, VisualContextAdapter
from omnivideo.models.conditions import (
    ConditionTokens,
    MarkerEmbeddings,
    assemble_conditions,
    count_condition_tokens,
    encode_text,
    tokenize_prompts,
    zip_condition_parts,
)
from omnivideo.models.features import MLLMFeatures as MLLMFeatures
from omnivideo.models.mllm import MLLMMessage
from omnivideo.models.mllms import BoundMLLM, bind_mllm
from omnivideo.models.placement import Placement
from omnivideo.models.positions import add_absolute_positions
from omnivideo.models.sampling import Expert, autocast_to
from omnivideo.presets import ConditionPart, Preset, VisionInputConfig

MEMORY_HELP = {
    "MLLM": "send fewer or smaller media, or run it elsewhere: `omnivideo mllm serve` and OMNIVIDEO_MLLM",
    "decoder": "request a smaller size or fewer frames",
    "VAE": "request a smaller size or fewer frames",
}
RESTART_HELP = "if ordinary requests fail, free memory and start again: the parts are then placed by what is free"


@contextmanager
def name_part(part: str) -> Iterator[None]:
    """Turn a lack of memory during the `with` block into a PartOutOfMemory that names the part."""
    try:
        yield
    except PartOutOfMemory:
        raise
    except (MemoryError, RuntimeError) as error:
        # On a CPU, torch raises a RuntimeError without a type of its own.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise PartOutOfMemory(part, "; ".join(filter(None, (MEMORY_HELP.get(part), RESTART_HELP)))) from error


class Bridge(nn.Module):
    """The modules between the MLLM and the decoders, with random weights.

    A preset with a vision head and an adapter has these two, one whose condition has a "hidden" part a projection of
    the hidden states. Each decoder has its own projection and visual context adapter; those of the second end in `_2`.
    """

    vision_head: VisionHead
    adapter: Adapter
    hidden_projection: HiddenProjection
    visual_context: VisualContextAdapter
    null_context: NullContext

    def __init__(self, preset: Preset):
        super().__init__()
        if head := preset.vision_head:
            self.vision_head = VisionHead(head.input_dim, head.width, head.num_queries, head.num_layers, head.num_heads)
        if size := preset.adapter:
            self.adapter = Adapter(size.input_dim, size.width, size.num_queries, size.num_layers, size.num_heads)
        for index in range(preset.experts.num_decoders):
            if "hidden" in preset.condition.parts:
                projection = HiddenProjection(preset.mllm_width, preset.text_width)
                self.add_module(get_expert_part("hidden_projection", index), projection)
            if "source" in preset.condition.parts:
                self.add_module(get_expert_part("visual_context", index), build_visual_context_adapter(preset))
        self.markers = MarkerEmbeddings(preset.text_width, preset.condition.marker_names)
        if preset.null.kind == "context-file":
            self.null_context = NullContext(preset.mllm_width, preset.text_width)

    @property
    def part_names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.named_children())


def get_expert_part(name: str, decoder_index: int) -> str:
    """Return the name of a decoder's part: the name itself for the first, with `_2` for the second."""
    return name if decoder_index == 0 else f"{name}_{decoder_index + 1}"


def build_visual_context_adapter(preset: Preset) -> VisualContextAdapter:
    """Return the preset's visual context adapter with random weights."""
    size, channels = preset.visual_context, preset.decoder["in_channels"]
    return VisualContextAdapter(
        channels, size.hidden_dim, preset.text_width, size.kernel_size, size.absolute_positions, size.eps
    )


def build_decoder(preset: Preset) -> WanTransformer3DModel:
    """Return the preset's decoder with random weights."""
    decoder = WanTransformer3DModel(**preset.decoder)
    return add_absolute_positions(decoder) if preset.absolute_positions else decoder


@dataclass
class OmniVideoModel:
    """All parts of one preset.

    `mllm_tokenizer` belongs to the MLLM and `tokenizer` to the decoder's text encoder. `mllm` is None in a process that
    gets the MLLM's features from another one, and the decoder and its encoders are None in a server of the MLLM.
    `second_decoder` is the expert for low timesteps, if there are two. `placement` says where the parts compute;
    without one, they all are on the decoder's device and compute in their types.
    """

    preset: Preset
    mllm: Qwen3VLForConditionalGeneration
    mllm_tokenizer: PreTrainedTokenizerBase
    bridge: Bridge
    decoder: WanTransformer3DModel
    text_encoder: UMT5EncoderModel
    tokenizer: PreTrainedTokenizerBase
    vae: AutoencoderKLWan
    second_decoder: WanTransformer3DModel | None = None
    placement: Placement | None = None
    placed_on: torch.device | None = None

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
        states_BNM = states_BNM.to(self.bridge.vision_head.decoder_query)
        visual_BQE: Tensor = self.bridge.vision_head(states_BNM, padding_BN.to(states_BNM.device))
        return visual_BQE

    def compute_mllm_features(self, message: MLLMMessage, medium: Medium) -> MLLMFeatures:
        """Return what the MLLM gives to the decoder for one request, on the MLLM's device."""
        with name_part("MLLM"):
            return self.call_mllm(message, medium)

    def call_mllm(self, message: MLLMMessage, medium: Medium) -> MLLMFeatures:
        if self.preset.vision_head is not None:
            return MLLMFeatures(self.compute_visual_tokens([(message, medium)]), "visual-tokens")
        caption = self.bound_mllm.caption_target(message, medium)
        states_1NM, _ = self.bound_mllm.compute_features([(message, medium)])
        return MLLMFeatures(states_1NM, "hidden-states", caption or "")

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

    def predict_visual_tokens(self, features: MLLMFeatures) -> Tensor:
        """Return V_o [1, Q, E] of a request's features, in the adapter's type."""
        visual_1QE = features.values
        if features.kind == "hidden-states":
            visual_1QE = self.bridge.vision_head(visual_1QE.to(self.bridge.vision_head.decoder_query))
        return visual_1QE.to(self.bridge.adapter.decoder_query)

    # ------------------------------------------------------------ the decoder's condition

    def encode_prompts(self, prompts: Sequence[str], field: str = "prompt") -> list[Tensor]:
        """Return the text embeddings [L, D] of each prompt, without padding; `field` names them in a refusal."""
        with name_part("text encoder"):
            hidden_BLD, lengths_B = encode_text(self.tokenizer, self.text_encoder, prompts, self.preset.text, field)
        return [row_LD[:length] for row_LD, length in zip(hidden_BLD, lengths_B.tolist(), strict=True)]

    def encode_request_texts(self, prompts: Sequence[str], captions: Sequence[str], has_source: bool) -> list[Tensor]:
        """Return each request's text embeddings [L, D], those of the preset's text parts one after the other."""
        texts = {"prompt": prompts, "instruction": prompts, "caption": captions}
        names = [name for name in self.preset.condition.text_parts if has_source or name != "instruction"]
        columns = [self.encode_prompts(texts[name]) for name in names]
        return columns[0] if len(columns) == 1 else [torch.cat(row) for row in zip(*columns, strict=True)]

    def encode_visual_context(
        self, source_BzThw: Tensor | None, count: int, decoder_index: int = 0
    ) -> list[Tensor | None]:
        """Return the visual context tokens [L, D] of each source, or `count` times None if there is no source."""
        if source_BzThw is None:
            return [None] * count
        adapter = self.bridge.get_submodule(get_expert_part("visual_context", decoder_index))
        with autocast_to(self.autocast, source_BzThw.device):
            return list(adapter(source_BzThw.to(next(adapter.parameters()).dtype)))

    def encode_requests(
        self, prompts: Sequence[str], features: Sequence[MLLMFeatures], target: Medium, has_source: bool
    ) -> list[ConditionTokens]:
        """Return the parts of each request's condition that do not depend on the decoder.

        They are the texts, and the adapter's tokens or the hidden states [N, M] that are still to be projected.
        """
        texts_LD = self.encode_request_texts(prompts, [given.caption for given in features], has_source)
        if "hidden" in self.preset.condition.parts:
            assert all(given.kind == "hidden-states" for given in features), "this preset has no visual tokens"
            return zip_condition_parts({"text": texts_LD, "hidden": [given.values[0] for given in features]})
        visual_BQE = torch.cat([self.predict_visual_tokens(given) for given in features])
        adapted_LD = self.adapt_visual_tokens(visual_BQE, [target] * len(features))
        return zip_condition_parts({"text": texts_LD, "visual": adapted_LD})

    def encode_null_requests(self, negative_prompt: str, count: int, target: Medium) -> list[ConditionTokens]:
        """Return `count` times the parts of the null condition for guidance, but for the source, which stays in it."""
        null = self.preset.null
        match null.kind:
            case "negative-prompt":
                return zip_condition_parts({"text": self.encode_prompts([negative_prompt] * count, "negative_prompt")})
            case "negative-prompt-and-small-states":
                texts_LD = self.encode_prompts([negative_prompt] * count, "negative_prompt")
                shape = (null.small_state_rows, self.preset.mllm_width)
                small_NM = texts_LD[0].new_full(shape, null.small_state_value)
                return zip_condition_parts({"text": texts_LD, "hidden": [small_NM] * count})
            case "context-file":
                context = self.bridge.null_context
                visual_1QE = self.predict_visual_tokens(MLLMFeatures(context.hidden_states, "hidden-states"))
                visual_LD = self.adapt_visual_tokens(visual_1QE, [target])
                return zip_condition_parts({"text": [context.text] * count, "visual": visual_LD * count})
        assert_never(null.kind)

    def complete_conditions(
        self, rows: Sequence[ConditionTokens], source_BzThw: Tensor | None = None, decoder_index: int = 0
    ) -> Tensor:
        """Return the conditions c [B, L, D] of a decoder: its own projection and visual context join the given parts.

        Raises ConditionTooLong if one exceeds the preset's limit and must not be cut.
        """
        complete_rows: list[ConditionTokens] = []
        contexts_LD = self.encode_visual_context(source_BzThw, len(rows), decoder_index)
        for row, context_LD in zip(rows, contexts_LD, strict=True):
            tokens: dict[ConditionPart, Tensor] = dict(row)
            if "hidden" in row:
                projection = self.bridge.get_submodule(get_expert_part("hidden_projection", decoder_index))
                tokens["hidden"] = projection(row["hidden"].to(next(projection.parameters())))
            if context_LD is not None:
                tokens["source"] = context_LD
            complete_rows.append({part: tokens_LD.to(self.device) for part, tokens_LD in tokens.items()})
        return assemble_conditions(self.preset.condition, self.bridge.markers, complete_rows, self.decoder.dtype)

    def build_condition(
        self, prompts: Sequence[str], visual_LD: Sequence[Tensor | None], source_BzThw: Tensor | None = None
    ) -> Tensor:
        """Return the first decoder's condition c [B, L, D] of prompts, adapter tokens and, for an edit, source latents.

        Raises ConditionTooLong if a prompt or a condition exceeds the preset's limit.
        """
        rows = zip_condition_parts({"text": self.encode_prompts(prompts), "visual": visual_LD})
        return self.complete_conditions(rows, source_BzThw)

    def build_null_condition(
        self, negative_prompt: str, count: int, source_BzThw: Tensor | None = None, target: Medium = "video"
    ) -> Tensor:
        """Return the first decoder's null condition [B, L, D] for guidance. It keeps the source."""
        return self.complete_conditions(self.encode_null_requests(negative_prompt, count, target), source_BzThw)

    def build_experts(
        self,
        prompts: Sequence[str],
        features: Sequence[MLLMFeatures],
        negative_prompt: str,
        target: Medium,
        source_BzThw: Tensor | None = None,
    ) -> list[Expert]:
        """Return the decoders with both their conditions of a batch of requests.

        Raises ConditionTooLong if a prompt or a condition exceeds the preset's limit and must not be cut.
        """
        rows = self.encode_requests(prompts, features, target, source_BzThw is not None)
        null_rows = self.encode_null_requests(negative_prompt, len(prompts), target)
        boundaries = (self.preset.experts.boundary, 0) if len(self.decoders) == 2 else (0,)
        return [
            Expert(
                decoder,
                self.complete_conditions(rows, source_BzThw, index),
                self.complete_conditions(null_rows, source_BzThw, index),
                boundary,
                self.autocast,
            )
            for index, (decoder, boundary) in enumerate(zip(self.decoders, boundaries, strict=True))
        ]

    def compute_condition_length(self, prompt: str, target: Medium) -> int:
        """Return the length L of the condition of a new image or video without building it."""
        condition = self.preset.condition
        if condition.min_tokens == condition.max_tokens:
            return condition.max_tokens
        text_tokens = tokenize_prompts(self.tokenizer, [prompt], self.preset.text)["input_ids"].shape[1]
        counts: dict[ConditionPart, int] = {"text": text_tokens, "visual": self.count_adapter_tokens(target)}
        return max(condition.min_tokens, count_condition_tokens(condition, self.bridge.markers, counts))

    # ------------------------------------------------------------ modules

    @property
    def decoders(self) -> tuple[WanTransformer3DModel, ...]:
        """Return the decoders in order of falling timesteps."""
        return (self.decoder,) if self.second_decoder is None else (self.decoder, self.second_decoder)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Return the parts that are loaded, by name; those of the second of two decoders end in `_2`."""
        parts = {"mllm": self.mllm, "decoder": self.decoder, "decoder_2": self.second_decoder}
        parts |= {"text_encoder": self.text_encoder, "vae": self.vae} | dict(self.bridge.named_children())
        return {name: module for name, module in parts.items() if module is not None}

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        modules = (self.mllm, self.bridge, *self.decoders, self.text_encoder, self.vae)
        return tuple(module for module in modules if module is not None)

    @property
    def autocast(self) -> torch.dtype | None:
        """Return the type that the decoder and the visual context adapter compute in, if not that of their weights."""
        name = self.preset.autocast
        if self.placement is not None:
            name = self.placement.choose_autocast(name)
        return getattr(torch, name) if name else None

    @property
    def precision(self) -> str:
        """Return in which types the parts compute, which decides the bytes of a clip.

        "float32" if every part does; "preset" if some have another type that the preset states, and "preset, on a CPU
        in float32" if parts are cast because the CPU is slow in that type.
        """
        if self.preset == self.preset.in_float32():
            return "float32"
        parts = self.placement.parts if self.placement else ()
        is_cast = any(part.compute_dtype != part.size.dtype for part in parts)
        is_cast = is_cast or (self.preset.autocast is not None and self.autocast is None)
        return "preset, on a CPU in float32" if is_cast else "preset"

    @property
    def latents_dtype(self) -> torch.dtype:
        """Return the type of the latents between two steps."""
        return get_torch_dtype(self.preset, "latents")

    def cast_parts(self) -> "OmniVideoModel":
        """Convert every part to the type that the preset states; see `Preset.in_float32`."""
        for name, module in self.parts.items():
            module.to(get_torch_dtype(self.preset, name.removesuffix("_2")))
        return self

    def eval(self) -> "OmniVideoModel":
        """Put all modules into evaluation mode and freeze their weights."""
        for module in self.modules:
            module.eval().requires_grad_(False)
        return self

    def to(self, device: torch.device | str) -> "OmniVideoModel":
        """Move all parts to a device. The model must have been placed there as a whole, or not at all."""
        self.placed_on = None
        for module in self.modules:
            module.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Return the device of the latents and of the decoder's condition."""
        if self.placed_on is not None:
            return self.placed_on
        device: torch.device = (self.decoder if self.decoder is not None else self.mllm).device
        return device


def get_torch_dtype(preset: Preset, part: str) -> torch.dtype:
    """Return the type that the preset states for a part, or for the "latents"."""
    dtype: torch.dtype = getattr(torch, preset.dtypes.get(part, "float32"))
    return dtype
