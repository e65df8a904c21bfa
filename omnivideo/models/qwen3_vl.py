"""A stock Qwen3-VL, dense or mixture of experts, as the MLLM of a preset: version 2's three calls, and routing.

    source clip  ->  its caption  ->  caption of the requested clip     (`caption_target`, the decoder's text)
    source clip and request  ->  hidden states before the final norm     (`compute_features`)

The users' texts of the three calls are those of the authors, because the weights were trained on them; the system
prompts in prompts/ are ours. Both captions are greedy, where the authors sample the source's, so that every engine
writes the same text.
Shapes: B batch, N tokens or kept positions, V vocabulary, M width of the model.
"""

import threading
from collections.abc import Generator, Iterator, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from omnivideo.contracts import Medium, Route
from omnivideo.models import mllm
from omnivideo.models.choices import BranchQuery, score_choices
from omnivideo.models.mllm import MLLMMessage, QwenVisualInput, TokenizedRequest, VisualInput
from omnivideo.presets import MLLMConfig, VisionInputConfig

USER_START = "<|im_start|>user\n"
END_TOKEN = "<|im_end|>"
MAX_CAPTION_TOKENS = 512
SOURCE_CAPTION_REQUEST = "Please provide a detailed, fine-grained caption for this video."
EXPANSION_REQUEST = "Expand this short prompt into a detailed, descriptive video caption: {prompt}"
EDIT_CAPTION_REQUEST = (
    "Source video: {source}\n\nEdit: {instruction}\n\n"
    "Now directly describe the edited video (do not mention what was changed, just describe the final video):"
)
ROUTE_WORDS = ("video", "image", "edit", "answer", "ask", "decline")


@cache
def read_prompt(name: str) -> str:
    """Return a system prompt of prompts/ as one line for each paragraph's line, without the end of the file."""
    return (files("omnivideo.models") / "prompts" / f"{name}.md").read_text().strip()


# ---------------------------------------------------------------- the requests of the three calls


def build_source_caption_message(message: MLLMMessage, system: str | None = None) -> MLLMMessage:
    """Return the request for a caption of the source."""
    return MLLMMessage(SOURCE_CAPTION_REQUEST, message.media, system or read_prompt("source_caption"))


def build_target_caption_message(
    message: MLLMMessage, source_caption: str | None, system: str | None = None
) -> MLLMMessage:
    """Return the request for a caption of the requested clip; the source is described, not shown."""
    if source_caption is None:
        text = EXPANSION_REQUEST.format(prompt=message.text)
    else:
        text = EDIT_CAPTION_REQUEST.format(source=source_caption, instruction=message.text)
    return MLLMMessage(text, (), system or read_prompt("target_caption"))


def build_feature_message(message: MLLMMessage, system: str | None = None) -> MLLMMessage:
    """Return the request whose hidden states condition the decoder."""
    return MLLMMessage(message.text, message.media, system or read_prompt("features"))


def count_dropped_tokens(tokenizer: PreTrainedTokenizerBase, message: MLLMMessage) -> int:
    """Return the number of leading tokens whose states are left out: the system prompt and the user turn's opening."""
    system = f"<|im_start|>system\n{message.system}{END_TOKEN}\n" if message.system else ""
    return len(tokenizer(system + USER_START, add_special_tokens=False).input_ids)


# ---------------------------------------------------------------- hidden states before the final norm


@torch.no_grad()
def forward_states_before_norm(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the last layer's output [B, N, M], before the final norm.

    `hidden_states[-1]` is that in transformers 4 and the norm's output in 5, so the norm's input is read instead.
    """
    states_BNM: list[Tensor] = []
    thread_id = threading.get_ident()

    def keep_input(_: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        if threading.get_ident() == thread_id:
            states_BNM.append(args[0])

    handle = model.model.language_model.norm.register_forward_pre_hook(keep_input)
    try:
        model.model(**{name: value.to(model.device) for name, value in inputs.items()})
    finally:
        handle.remove()
    (states,) = states_BNM
    return states


# ---------------------------------------------------------------- routing


def tokenize_route_words(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the tokens of each of ROUTE_WORDS with the end token, which makes each differ from all others."""
    return [tokenizer(word + END_TOKEN, add_special_tokens=False).input_ids for word in ROUTE_WORDS]


def tokenize_agreement_words(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the tokens of "yes" and "no", each with the end token."""
    return [tokenizer(word + END_TOKEN, add_special_tokens=False).input_ids for word in ("yes", "no")]


def extend_request(encoded: TokenizedRequest, answer_ids: Sequence[int]) -> TokenizedRequest:
    """Return the request with the first tokens of its answer."""
    return TokenizedRequest(
        encoded.token_ids + list(answer_ids),
        encoded.token_types + [0] * len(answer_ids),
        encoded.patches,
        encoded.grids,
    )


def build_route_message(message: MLLMMessage) -> MLLMMessage:
    return MLLMMessage(message.text, message.media, read_prompt("route"))


def route_from_probabilities(probabilities: Sequence[float], source_medium: Medium | None) -> Route:
    """Return the most likely kind of result. With a source, every request for pixels is an edit of its medium."""
    kinds = {"video": "video", "image": "image", "edit": "video", "answer": "text", "ask": "ask", "decline": "decline"}
    if source_medium is not None:
        kinds |= dict.fromkeys(("video", "image", "edit"), source_medium)
    totals: dict[str, float] = {}
    for word, probability in zip(ROUTE_WORDS, probabilities, strict=True):
        totals[kinds[word]] = totals.get(kinds[word], 0.0) + probability
    best = max(totals, key=totals.__getitem__)
    return Route(kind=best, probability=min(1.0, totals[best]))  # type: ignore[arg-type]


def get_source_medium(message: MLLMMessage) -> Medium | None:
    """Return the medium of what the message shows last, or None if it shows nothing."""
    if not message.media:
        return None
    return "video" if message.media[-1].is_video else "image"


# ---------------------------------------------------------------- the family


def list_visual_inputs(config: MLLMConfig) -> tuple[VisualInput, ...]:
    """Return how the model sees media in its calls, each way once."""
    configs = (config.vision_input, config.caption_input, config.feature_input)
    return tuple(dict.fromkeys(QwenVisualInput(used) for used in configs if used is not None))


class InstructQwen3VL:
    """A stock Qwen3-VL behind `models.mllms.BoundMLLM`, with the inputs and states that a preset's `config` names.

    `writes_captions` is False if the decoder reads the user's words alone.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, config: MLLMConfig, writes_captions: bool = True
    ):
        self.model, self.tokenizer, self.config, self.writes_captions = model, tokenizer, config, writes_captions
        self.vision_config = config.vision_input
        self.caption_config = config.caption_input or config.vision_input
        self.feature_config = config.feature_input or config.vision_input

    @property
    def special_tokens(self) -> frozenset[str]:
        return mllm.list_special_tokens(self.tokenizer)

    @property
    def visual_inputs(self) -> Sequence[VisualInput]:
        return list_visual_inputs(self.config)

    # ------------------------------------------------------------ routing

    def route(self, message: MLLMMessage) -> Route:
        """Return the most likely of the fixed choices, with its probability."""
        choices = score_choices(tokenize_route_words(self.tokenizer))
        encoded = mllm.tokenize_message(self.tokenizer, build_route_message(message), self.vision_config)
        return route_from_probabilities(self.answer_queries(choices, encoded), get_source_medium(message))

    def score_agreement(self, message: MLLMMessage) -> float:
        """Return the probability of "yes" against "no", 0 to 1."""
        words = tokenize_agreement_words(self.tokenizer)
        encoded = mllm.tokenize_message(self.tokenizer, message, self.vision_config)
        return self.answer_queries(score_choices(words), encoded)[0]

    def answer_queries(
        self, queries: Generator[BranchQuery, Sequence[float], list[float]], encoded: TokenizedRequest
    ) -> list[float]:
        """Return what `score_choices` returns, with log probabilities after the encoded request."""
        try:
            query = next(queries)
            while True:
                logprobs_V = self.compute_next_logits(encoded, query.prefix_ids).log_softmax(-1)
                query = queries.send(logprobs_V[list(query.token_ids)].tolist())
        except StopIteration as stop:
            probabilities: list[float] = stop.value
            return probabilities

    @torch.no_grad()
    def compute_next_logits(self, encoded: TokenizedRequest, prefix_ids: Sequence[int]) -> Tensor:
        """Return the logits [V] of the token after a request and the beginning of its answer."""
        longer = extend_request(encoded, prefix_ids)
        inputs = mllm.collate_requests([longer], self.tokenizer.pad_token_id, self.model.device)
        logits_1NV: Tensor = self.model(**inputs, logits_to_keep=1).logits
        return logits_1NV[0, -1].float()

    # ------------------------------------------------------------ text

    def stream_text(
        self,
        message: MLLMMessage,
        *,
        temperature: float = 0.2,
        top_p: float = 0.6,
        max_tokens: int = 1024,
        seed: int = 0,
    ) -> Iterator[str]:
        yield from self.stream_answer(
            message, self.vision_config, temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed
        )

    def stream_answer(self, message: MLLMMessage, vision_config: VisionInputConfig, **options: Any) -> Iterator[str]:
        stop_ids = list_stop_ids(self.model, self.tokenizer)
        yield from mllm.generate_answer(
            self.model, self.tokenizer, message, vision_config, stop_ids=stop_ids, **options
        )

    def write_caption(self, message: MLLMMessage) -> str:
        """Return the greedy answer to a request for a caption, without special tokens."""
        pieces = self.stream_answer(message, self.caption_config, temperature=0.0, max_tokens=MAX_CAPTION_TOKENS)
        return mllm.sanitize_text("".join(pieces).strip(), self.special_tokens)

    def caption_target(self, message: MLLMMessage, medium: Medium) -> str | None:
        """Return the caption of the requested clip; an edit's source is captioned first."""
        if not self.writes_captions:
            return None
        source_caption = self.write_caption(build_source_caption_message(message)) if message.media else None
        return self.write_caption(build_target_caption_message(message, source_caption))

    # ------------------------------------------------------------ features

    def compute_features(self, requests: Sequence[tuple[MLLMMessage, Medium]]) -> tuple[Tensor, Tensor]:
        """Return the states [B, N, M] of the kept positions, and a mask [B, N], True for padding."""
        return self.compute_kept_states([build_feature_message(message) for message, _ in requests])

    @torch.no_grad()
    def compute_kept_states(self, messages: Sequence[MLLMMessage]) -> tuple[Tensor, Tensor]:
        """Return the states [B, N, M] of each message's kept positions, and a mask [B, N], True for padding."""
        encoded = [mllm.tokenize_message(self.tokenizer, message, self.feature_config) for message in messages]
        inputs = mllm.collate_requests(encoded, self.tokenizer.pad_token_id)
        if self.config.hidden_states == "before-norm":
            states_BNM = forward_states_before_norm(self.model, inputs)
        else:
            states_BNM, _ = mllm.forward_hidden_states(self.model, inputs)
        kept = [
            states_NM[self.count_dropped(message) : len(request.token_ids)]
            for states_NM, message, request in zip(states_BNM, messages, encoded, strict=True)
        ]
        lengths_B = torch.tensor([len(states_NM) for states_NM in kept], device=states_BNM.device)
        padded_BNM = torch.nn.utils.rnn.pad_sequence(kept, batch_first=True)
        return padded_BNM, torch.arange(padded_BNM.shape[1], device=states_BNM.device) >= lengths_B[:, None]

    def count_dropped(self, message: MLLMMessage) -> int:
        """Return the number of leading positions whose states the preset leaves out."""
        return 0 if self.config.kept_positions == "all" else count_dropped_tokens(self.tokenizer, message)


def list_stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the tokens that end an answer: the tokenizer's, and those of the model's generation settings."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(token_id for token_id in (tokenizer.eos_token_id, *ids) if token_id is not None)
