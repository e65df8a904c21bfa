"""What VILA answers: the route of a request, text, and the hidden states that condition the decoder.

The authors sample the answer and look for a routing token in it. Here the answer is the most likely one, so that a
request always takes the same route.
Shapes: B requests, N tokens, M width of the Llama, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from omnivideo.contracts import Medium, Route
from omnivideo.models.mllm import (
    CACHE_ARGUMENT,
    MLLMMessage,
    VisualInput,
    compare_yes_and_no,
    list_special_tokens,
    sample_token,
)
from omnivideo.models.vila import Vila
from omnivideo.models.vila_requests import (
    MAX_ROUTING_TOKENS,
    VilaRequest,
    VilaVisualInput,
    find_routing_ids,
    get_padding_id,
    list_stop_ids,
    read_route,
    tokenize_features,
    tokenize_request,
)


@torch.no_grad()
def iterate_answer(
    model: Vila, request: VilaRequest, choose_token: Callable[[Tensor], int]
) -> Iterator[tuple[int, Tensor]]:
    """Yield each token of an answer with the logits [V] that it was chosen from. The answer has no end."""
    out = model.llm(
        inputs_embeds=model.embed_request(request.token_ids, request.pixels), use_cache=True, logits_to_keep=1
    )
    while True:
        logits_V = out.logits[0, -1].float().cpu()
        token_id = choose_token(logits_V)
        yield token_id, logits_V
        ids_11 = torch.tensor([[token_id]], device=model.device)
        out = model.llm(input_ids=ids_11, **{CACHE_ARGUMENT: getattr(out, CACHE_ARGUMENT)}, use_cache=True)


@torch.no_grad()
def compute_request_states(model: Vila, request: VilaRequest, padding_id: int | None) -> Tensor:
    """Return the last hidden states [N, M] of a request, after the final norm.

    The published vision head was trained on what the authors' code returns. Tokens equal to `padding_id`, which is the
    end token, are removed from a request with images. In one without images they stay, and no token attends to them.
    """
    if request.pixels is None:
        ids_1N = torch.tensor([request.token_ids], device=model.device)
        mask_1N = torch.tensor([[int(token_id != padding_id) for token_id in request.token_ids]], device=model.device)
        out = model.llm.model(input_ids=ids_1N, attention_mask=mask_1N, use_cache=False)
    else:
        kept_ids = [token_id for token_id in request.token_ids if token_id != padding_id]
        out = model.llm.model(inputs_embeds=model.embed_request(kept_ids, request.pixels), use_cache=False)
    states_1NM: Tensor = out.last_hidden_state
    return states_1NM[0]


class BoundVila:
    """VILA with its tokenizer, as a `BoundMLLM`."""

    def __init__(self, model: Vila, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model, tokenizer

    @property
    def special_tokens(self) -> frozenset[str]:
        return list_special_tokens(self.tokenizer)

    @property
    def visual_inputs(self) -> Sequence[VisualInput]:
        return (VilaVisualInput(self.model.image_config),)

    @cached_property
    def routing_ids(self) -> dict[Medium, int]:
        return find_routing_ids(self.tokenizer)

    def tokenize(self, message: MLLMMessage) -> VilaRequest:
        return tokenize_request(self.tokenizer, message, self.model.image_config)

    def route(self, message: MLLMMessage) -> Route:
        """Return the route of the most likely answer."""
        routing_ids, stop_ids = self.routing_ids, list_stop_ids(self.tokenizer)
        media: list[Medium] = ["video" if media.is_video else "image" for media in message.media]
        last_ids = stop_ids | set(routing_ids.values())
        answer = iterate_answer(self.model, self.tokenize(message), lambda logits_V: int(logits_V.argmax()))
        token_ids: list[int] = []
        probabilities: list[dict[Medium, float]] = []
        for token_id, logits_V in islice(answer, MAX_ROUTING_TOKENS):
            probabilities_V = logits_V.softmax(-1)
            token_ids.append(token_id)
            probabilities.append({medium: float(probabilities_V[index]) for medium, index in routing_ids.items()})
            if token_id in last_ids:
                break
        return read_route(token_ids, probabilities, routing_ids, media)

    def score_agreement(self, message: MLLMMessage) -> float:
        answer = iterate_answer(self.model, self.tokenize(message), lambda logits_V: int(logits_V.argmax()))
        _, logits_V = next(answer)
        return compare_yes_and_no(self.tokenizer, logits_V)

    def stream_text(
        self,
        message: MLLMMessage,
        *,
        temperature: float = 0.2,
        top_p: float = 0.6,
        max_tokens: int = 1024,
        seed: int = 0,
    ) -> Iterator[str]:
        """Yield the answer in pieces of text, without special tokens.

        The routing tokens are banned, because the caller has already chosen text.
        """
        generator = torch.Generator().manual_seed(seed)
        banned_ids, stop_ids = list(self.routing_ids.values()), list_stop_ids(self.tokenizer)

        def choose_token(logits_V: Tensor) -> int:
            logits_V[banned_ids] = -torch.inf
            return sample_token(logits_V, temperature, top_p, generator)

        answer = iterate_answer(self.model, self.tokenize(message), choose_token)
        token_ids: list[int] = []
        emitted_text = ""
        for token_id, _ in islice(answer, max_tokens):
            if token_id in stop_ids:
                return
            token_ids.append(token_id)
            text = self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            if not text.endswith("\ufffd") and text != emitted_text:  # a character may span several tokens
                yield text[len(emitted_text) :]
                emitted_text = text

    def caption_target(self, message: MLLMMessage, medium: Medium) -> None:
        return None

    def compute_features(self, requests: Sequence[tuple[MLLMMessage, Medium]]) -> tuple[Tensor, Tensor]:
        """Return the last hidden states [B, N, M] of each request with its answer, and the padding [B, N]."""
        config, padding_id = self.model.image_config, get_padding_id(self.tokenizer)
        states_NM = [
            compute_request_states(self.model, tokenize_features(self.tokenizer, message, medium, config), padding_id)
            for message, medium in requests
        ]
        states_BNM = torch.nn.utils.rnn.pad_sequence(states_NM, batch_first=True)
        lengths_B = torch.tensor([len(states) for states in states_NM], device=states_BNM.device)
        return states_BNM, torch.arange(states_BNM.shape[1], device=states_BNM.device) >= lengths_B[:, None]
