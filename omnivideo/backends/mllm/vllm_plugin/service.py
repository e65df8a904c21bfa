"""Answer the routes of `protocol` on vLLM's engine.

`models` builds the prompts, so that the engine gets the same tokens and pixels as `LocalMLLM`.
"""

import asyncio
import hashlib
import math
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, SamplingParams

from omnivideo.backends.mllm.media import create_media_cache, read_mllm_media
from omnivideo.backends.mllm.protocol import MediaPayload, MLLMPayload
from omnivideo.backends.mllm.vllm_plugin import FIRST_POSITION_PARAM, VISUAL_TOKENS_PARAM
from omnivideo.backends.mllm.vllm_plugin.families import create_family
from omnivideo.contracts import Medium, Route, TextSampling
from omnivideo.errors import InvalidInput
from omnivideo.models.mllm import MLLMMedia, MLLMMessage, VisualInput, check_request_length, sanitize_text

MAX_INLINE_CHARS = 4000  # characters; shorter texts are tokenized on the event loop


def compute_media_digest(media: MediaPayload) -> str:
    """Return a digest for vLLM's cache of encoded media.

    Its prefix keeps it distinct from the digests of vLLM's own chat route, which builds its prompts differently.
    """
    return "omnivideo-" + hashlib.sha256(media.data + f"|{media.medium}|{media.fps}".encode()).hexdigest()


class VLLMService:
    """An `MLLMService` on vLLM's engine. Decoding is greedy, so the same request always gets the same answer."""

    def __init__(self, client: Any, tokenizer: Any, outbox: Path, lora: Any = None):
        self.client, self.tokenizer, self.outbox, self.lora = client, tokenizer, outbox, lora
        self.max_model_len: int = client.model_config.max_model_len
        self.family = create_family(client.model_config.hf_config, tokenizer)
        self.special_tokens = self.family.special_tokens
        self.visual_inputs: Sequence[VisualInput] = self.family.visual_inputs
        self.media_cache = create_media_cache()

    # ------------------------------------------------------------ requests

    def load_media(self, media: MediaPayload) -> MLLMMedia:
        """Decode a medium exactly as `LocalMLLM` does."""
        return self.media_cache.get_or_compute(
            compute_media_digest(media),
            lambda: read_mllm_media(media.data, self.visual_inputs, media.fps, media.medium),
        )

    def build_prompt(self, payload: MLLMPayload, medium: Medium | None) -> Any:
        """Return the engine's input for a request. Raises InvalidInput if it is too long for the model."""
        message = MLLMMessage(
            sanitize_text(payload.text, self.special_tokens),
            tuple(map(self.load_media, payload.media)),
            payload.system,
        )
        prompt, num_tokens = self.family.build_prompt(message, list(map(compute_media_digest, payload.media)), medium)
        check_request_length(num_tokens, self.max_model_len - 1)  # one token of the answer needs room too
        return prompt

    async def start_generation(
        self, payload: MLLMPayload, params: SamplingParams, medium: Medium | None = None
    ) -> AsyncIterator[Any]:
        """Submit a request and return the engine's outputs; with `medium`, the prompt has the answer requesting it."""
        # Tokenizing a short text is faster than switching to a thread.
        if payload.media or len(payload.text) > MAX_INLINE_CHARS:
            prompt = await asyncio.to_thread(self.build_prompt, payload, medium)
        else:
            prompt = self.build_prompt(payload, medium)
        return self.stream_outputs(prompt, params)

    async def stream_outputs(self, prompt: Any, params: SamplingParams) -> AsyncIterator[Any]:
        if prompt["type"] == "multimodal":  # media that the engine has cached are not sent again
            self.client.input_processor.inject_into_mm_cache(prompt["mm_hashes"], prompt["mm_kwargs"])
        request_id = f"omnivideo-{uuid.uuid4().hex}"
        try:
            async for output in self.client.generate(prompt, params, request_id, lora_request=self.lora):
                yield output.outputs[0]
        except VLLMValidationError as error:
            raise InvalidInput("text", str(error)) from None

    async def generate_final_output(
        self, payload: MLLMPayload, params: SamplingParams, medium: Medium | None = None
    ) -> Any:
        outputs = await self.start_generation(payload, params, medium)
        return [output async for output in outputs][-1]

    # ------------------------------------------------------------ answers

    async def route(self, payload: MLLMPayload) -> Route:
        output = await self.generate_final_output(payload, self.family.build_routing_params())
        return self.family.read_route(output, [media.medium for media in payload.media])

    async def score_agreement(self, payload: MLLMPayload) -> float:
        token_ids = [self.tokenizer.encode(word, add_special_tokens=False)[0] for word in ("yes", "no")]
        params = SamplingParams(temperature=0, max_tokens=1, logprob_token_ids=token_ids, detokenize=False)
        output = await self.generate_final_output(payload, params)
        yes, no = (output.logprobs[0][token_id].logprob for token_id in token_ids)
        return 1 / (1 + math.exp(no - yes))

    async def count_tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    async def write_answer(self, payload: MLLMPayload, sampling: TextSampling) -> AsyncIterator[str]:
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            max_tokens=sampling.max_tokens,
            bad_words=self.family.banned_words,
            stop_token_ids=self.family.stop_ids,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        return self.stream_pieces(await self.start_generation(payload, params))

    async def stream_pieces(self, outputs: AsyncIterator[Any]) -> AsyncIterator[str]:
        """Yield the text of tokens as the family's answers in `models` do.

        Each token is decoded separately, although a busy engine returns several at once. Otherwise an incomplete
        character at the end of an answer would hold back the complete tokens before it.
        """
        pending_ids: list[int] = []  # a character may span several tokens
        async for output in outputs:
            for token_id in output.token_ids:
                pending_ids += [token_id] if token_id not in self.family.stop_ids else []
                text = self.tokenizer.decode(pending_ids, skip_special_tokens=not self.family.keeps_special_tokens)
                if text and not text.endswith("\ufffd"):
                    yield text
                    pending_ids = []

    async def compute_visual_tokens(self, payload: MLLMPayload, medium: Medium) -> bytes:
        async def compute(params: SamplingParams) -> None:
            await self.generate_final_output(payload, params, medium)

        return await self.collect_file(compute)

    async def collect_file(
        self, compute: Callable[[SamplingParams], Awaitable[None]], first_position: int = 0
    ) -> bytes:
        """Return the file that the connector writes while a prompt is computed with the given parameters.

        Hidden states before `first_position` are left out.
        """
        path = self.outbox / f"tokens_{uuid.uuid4().hex}"
        path.touch(mode=0o600)  # the connector writes only to existing files
        extra_args = {"kv_transfer_params": {VISUAL_TOKENS_PARAM: path.name, FIRST_POSITION_PARAM: first_position}}
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False, extra_args=extra_args)
        try:
            await compute(params)
            tokens = path.read_bytes()
        finally:
            path.unlink(missing_ok=True)
        if not tokens:
            raise RuntimeError("the connector wrote no visual tokens; see the engine's log")
        return tokens
