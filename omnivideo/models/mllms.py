"""One interface for the MLLMs of all presets. Each family tokenizes, routes and answers in its own way.

    bind_mllm(preset, model, tokenizer)  ->  the family's calls, on weights that are loaded

Serving and the decoder's condition use only `BoundMLLM`, so neither knows which family it has.
Shapes: B requests, N tokens, M width of the model.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from omnivideo.contracts import Medium, Route
from omnivideo.models import mllm
from omnivideo.models.mllm import MLLMMessage, QwenVisualInput, VisualInput
from omnivideo.models.qwen3_vl import InstructQwen3VL
from omnivideo.models.vila import Vila
from omnivideo.models.vila_answers import BoundVila
from omnivideo.presets import Preset, VisionInputConfig


class BoundMLLM(Protocol):
    """An MLLM with its tokenizer. Equal calls get equal answers, also from `route`, which never samples."""

    @property
    def special_tokens(self) -> frozenset[str]:
        """Return the strings that the tokenizer would read as special tokens in a user's text."""
        ...

    @property
    def visual_inputs(self) -> Sequence[VisualInput]:
        """Return how the model sees media in its calls, so that only what it sees has to be read."""
        ...

    def route(self, message: MLLMMessage) -> Route:
        """Return the kind of answer that the message requests, with its probability."""
        ...

    def score_agreement(self, message: MLLMMessage) -> float:
        """Return the probability, 0 to 1, that the answer is "yes" rather than "no"."""
        ...

    def stream_text(
        self,
        message: MLLMMessage,
        *,
        temperature: float = 0.2,
        top_p: float = 0.6,
        max_tokens: int = 1024,
        seed: int = 0,
    ) -> Iterator[str]:
        """Yield the answer in pieces of text; the same seed gives the same answer."""
        ...

    def caption_target(self, message: MLLMMessage, medium: Medium) -> str | None:
        """Return the MLLM's caption of the requested clip, or None if the decoder reads the user's words alone."""
        ...

    def compute_features(self, requests: Sequence[tuple[MLLMMessage, Medium]]) -> tuple[Tensor, Tensor]:
        """Return the hidden states [B, N, M] that condition the decoder, and a mask [B, N], True for padding.

        They are the states and positions that the preset names.
        """
        ...


class Qwen3VLWithRoutingTokens:
    """A Qwen3-VL that was trained with our routing tokens (paper section 3.2)."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, vision_config: VisionInputConfig):
        self.model, self.tokenizer, self.vision_config = model, tokenizer, vision_config

    @property
    def special_tokens(self) -> frozenset[str]:
        return mllm.list_special_tokens(self.tokenizer)

    @property
    def visual_inputs(self) -> Sequence[VisualInput]:
        return (QwenVisualInput(self.vision_config),)

    def route(self, message: MLLMMessage) -> Route:
        return mllm.predict_route(self.model, self.tokenizer, message, self.vision_config)

    def score_agreement(self, message: MLLMMessage) -> float:
        logits_V = mllm.compute_first_logits(self.model, self.tokenizer, message, self.vision_config)
        return mllm.compare_yes_and_no(self.tokenizer, logits_V)

    def stream_text(
        self,
        message: MLLMMessage,
        *,
        temperature: float = 0.2,
        top_p: float = 0.6,
        max_tokens: int = 1024,
        seed: int = 0,
    ) -> Iterator[str]:
        yield from mllm.generate_answer(
            self.model,
            self.tokenizer,
            message,
            self.vision_config,
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_tokens,
            seed=seed,
        )

    def caption_target(self, message: MLLMMessage, medium: Medium) -> None:
        return None

    def compute_features(self, requests: Sequence[tuple[MLLMMessage, Medium]]) -> tuple[Tensor, Tensor]:
        return mllm.compute_hidden_states(self.model, self.tokenizer, requests, self.vision_config)


def bind_mllm(preset: Preset, model: Any, tokenizer: PreTrainedTokenizerBase) -> BoundMLLM:
    """Return the calls of the preset's MLLM family on a loaded model."""
    if isinstance(model, Vila):
        return BoundVila(model, tokenizer)
    config = preset.mllm
    if config.routing == "likelihoods":
        return InstructQwen3VL(model, tokenizer, config, "caption" in preset.condition.text_parts)
    return Qwen3VLWithRoutingTokens(model, tokenizer, config.vision_input)
