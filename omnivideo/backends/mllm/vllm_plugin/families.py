"""What differs between the MLLMs that vLLM serves: their prompts, how they route, and what ends an answer.

They use the tokens and pixels of `omnivideo.models`, so that the engine computes what `LocalMLLM` does.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

from transformers import BatchFeature, PreTrainedTokenizerBase
from vllm.inputs import mm_input, tokens_input
from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange
from vllm.sampling_params import SamplingParams

from omnivideo.backends.mllm.vllm_plugin import VILA_ARCHITECTURE
from omnivideo.backends.mllm.vllm_plugin.processor import vision_config_from_hf
from omnivideo.backends.mllm.vllm_plugin.prompt import build_engine_input
from omnivideo.backends.mllm.vllm_plugin.vila_processor import (
    build_field_config,
    count_image_tokens,
    get_image_token_id,
    get_vila_folder,
    read_vision_config,
)
from omnivideo.contracts import Medium, Route
from omnivideo.models import vila_requests
from omnivideo.models.mllm import (
    BOI,
    BOV,
    VISUAL_TOKEN_PAIRS,
    VISUAL_TOKENS,
    MLLMMessage,
    list_special_tokens,
    tokenize_message,
)
from omnivideo.models.weights.vila import read_image_config


class EngineFamily(Protocol):
    """A family of MLLMs on vLLM's engine.

    `banned_words` are the routing tokens, which an answer must not contain. `stop_ids` end an answer and are not part
    of it. Special tokens stay in an answer only if `keeps_special_tokens` is set.
    """

    special_tokens: frozenset[str]
    banned_words: list[str]
    stop_ids: list[int]
    keeps_special_tokens: bool

    def build_prompt(self, message: MLLMMessage, digests: Sequence[str], medium: Medium | None) -> tuple[Any, int]:
        """Return the engine's input for a request and its number of tokens.

        Media with equal digests are encoded only once. With `medium`, the prompt ends with the answer that requests it.
        """
        ...

    def build_routing_params(self) -> SamplingParams: ...

    def read_route(self, output: Any, message_media: Sequence[Medium]) -> Route:
        """Return the route that an output for `build_routing_params` stands for."""
        ...


def read_probability(output: Any, position: int, token_id: int) -> float:
    """Return the probability that the engine gave to a token at a position of its output."""
    return math.exp(output.logprobs[position][token_id].logprob)


class Qwen3VLFamily:
    """A Qwen3-VL that was trained with our routing tokens."""

    keeps_special_tokens = True

    def __init__(self, config: Any, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.banned_words = tokenizer, list(VISUAL_TOKENS)
        self.vision_config = vision_config_from_hf(config)
        self.special_tokens = list_special_tokens(tokenizer)
        self.stop_ids = [tokenizer.eos_token_id]
        boi_id, bov_id = (tokenizer.encode(word, add_special_tokens=False)[0] for word in (BOI, BOV))
        self.routing_ids: dict[Medium, int] = {"image": boi_id, "video": bov_id}

    def build_prompt(self, message: MLLMMessage, digests: Sequence[str], medium: Medium | None) -> tuple[Any, int]:
        answer = "".join(VISUAL_TOKEN_PAIRS[medium]) if medium else ""
        encoded = tokenize_message(self.tokenizer, message, self.vision_config, answer)
        digests_by_kind: dict[str, list[str]] = {"image": [], "video": []}
        for media, digest in zip(message.media, digests, strict=True):
            digests_by_kind["video" if media.is_video else "image"].append(digest)
        prompt = build_engine_input(encoded, digests_by_kind, self.vision_config.merge_size)
        return prompt, len(encoded.token_ids)

    def build_routing_params(self) -> SamplingParams:
        token_ids = list(self.routing_ids.values())
        return SamplingParams(temperature=0, max_tokens=1, logprob_token_ids=token_ids, detokenize=False)

    def read_route(self, output: Any, message_media: Sequence[Medium]) -> Route:
        probabilities = {kind: read_probability(output, 0, token_id) for kind, token_id in self.routing_ids.items()}
        for kind, token_id in self.routing_ids.items():
            if output.token_ids[0] == token_id:
                return Route(kind=kind, probability=probabilities[kind])
        return Route(kind="text", probability=1 - probabilities["image"] - probabilities["video"])


class VilaFamily:
    """VILA, the MLLM of version 1."""

    keeps_special_tokens = False

    def __init__(self, config: Any, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.image_config, _ = read_image_config(get_vila_folder(config))
        self.tokens_per_image = count_image_tokens(read_vision_config(config))
        self.image_token_id = get_image_token_id(tokenizer)
        self.special_tokens = list_special_tokens(tokenizer)
        self.stop_ids = sorted(vila_requests.list_stop_ids(tokenizer))
        self.routing_ids = vila_requests.find_routing_ids(tokenizer)
        self.banned_words = [str(tokenizer.convert_ids_to_tokens(index)) for index in self.routing_ids.values()]

    def build_prompt(self, message: MLLMMessage, digests: Sequence[str], medium: Medium | None) -> tuple[Any, int]:
        if medium:
            request = vila_requests.tokenize_features(self.tokenizer, message, medium, self.image_config)
            frame_digests = [f"{digest}-0" for digest in digests[:1]]
        else:
            request = vila_requests.tokenize_request(self.tokenizer, message, self.image_config)
            frame_digests = [
                f"{digest}-{index}"
                for media, digest in zip(message.media, digests, strict=True)
                for index in vila_requests.list_seen_frames(media)
            ]
        if request.pixels is None:
            return tokens_input(request.token_ids), len(request.token_ids)
        token_ids, placeholders = self.expand_images(request.token_ids)
        pixels = {"pixel_values": request.pixels}
        prompt = mm_input(
            prompt_token_ids=token_ids,
            mm_kwargs=MultiModalKwargsItems.from_hf_inputs(BatchFeature(pixels), build_field_config()),
            mm_hashes={"image": frame_digests},
            mm_placeholders={"image": placeholders},
        )
        return prompt, len(token_ids)

    def expand_images(self, token_ids: Sequence[int]) -> tuple[list[int], list[PlaceholderRange]]:
        """Return the token ids with the tokens of each image, and where these are. Masked tokens are removed."""
        expanded: list[int] = []
        placeholders = []
        masked_id = vila_requests.get_padding_id(self.tokenizer)
        for token_id in token_ids:
            if token_id == vila_requests.IMAGE_TOKEN_ID:
                placeholders.append(PlaceholderRange(len(expanded), self.tokens_per_image))
                expanded += [self.image_token_id] * self.tokens_per_image
            elif token_id != masked_id:
                expanded.append(token_id)
        return expanded, placeholders

    def build_routing_params(self) -> SamplingParams:
        token_ids = list(self.routing_ids.values())
        return SamplingParams(
            temperature=0,
            max_tokens=vila_requests.MAX_ROUTING_TOKENS,
            stop_token_ids=[*self.stop_ids, *token_ids],
            logprob_token_ids=token_ids,
            detokenize=False,
        )

    def read_route(self, output: Any, message_media: Sequence[Medium]) -> Route:
        probabilities = [
            {kind: read_probability(output, position, token_id) for kind, token_id in self.routing_ids.items()}
            for position in range(len(output.token_ids))
        ]
        return vila_requests.read_route(output.token_ids, probabilities, self.routing_ids, message_media)


def create_family(config: Any, tokenizer: PreTrainedTokenizerBase) -> EngineFamily:
    """Return the family of a served model, by the architecture that `launch` sets."""
    if VILA_ARCHITECTURE in config.architectures:
        return VilaFamily(config, tokenizer)
    return Qwen3VLFamily(config, tokenizer)
