"""The routes of `protocol` for a stock Qwen3-VL on vLLM's engine: version 2's three calls, routes and plans.

Everything but the engine's part is that of `models.qwen3_vl`, so that the answers equal those of `LocalMLLM`.
"""

import asyncio
from collections.abc import AsyncIterator, Generator, Sequence
from pathlib import Path
from typing import Any

from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from omnivideo.backends.mllm.protocol import MLLMPayload
from omnivideo.backends.mllm.vllm_plugin.prompt import build_engine_input
from omnivideo.backends.mllm.vllm_plugin.service import VLLMService, compute_media_digest
from omnivideo.contracts import Medium, Route, TextSampling
from omnivideo.models import qwen3_vl
from omnivideo.models.choices import BranchQuery, score_choices
from omnivideo.models.features import add_caption
from omnivideo.models.mllm import MLLMMessage, TokenizedRequest, check_request_length, sanitize_text, tokenize_message
from omnivideo.presets import Preset, VisionInputConfig


class InstructService(VLLMService):
    """An `MLLMService` for a preset whose MLLM has no routing tokens and no vision head."""

    def __init__(self, client: Any, tokenizer: Any, outbox: Path, preset: Preset, lora: Any = None):
        super().__init__(client, tokenizer, outbox, lora)
        self.preset, self.mllm_config = preset, preset.mllm
        self.caption_config = preset.mllm.caption_input or preset.mllm.vision_input
        self.feature_config = preset.mllm.feature_input or preset.mllm.vision_input
        self.visual_inputs = qwen3_vl.list_visual_inputs(preset.mllm)
        generation = client.model_config.try_get_generation_config() or {}
        eos_ids = generation.get("eos_token_id") or []
        self.family.stop_ids = sorted({tokenizer.eos_token_id, *(eos_ids if isinstance(eos_ids, list) else [eos_ids])})

    # ------------------------------------------------------------ requests

    def message_from_payload(self, payload: MLLMPayload) -> MLLMMessage:
        text, media = sanitize_text(payload.text, self.special_tokens), map(self.load_media, payload.media)
        return MLLMMessage(text, tuple(media), payload.system, payload.json_schema)

    def encode_message(self, message: MLLMMessage, vision_config: VisionInputConfig) -> TokenizedRequest:
        """Return the tokens and patches. Raises InvalidInput if they are too long for the model."""
        encoded = tokenize_message(self.tokenizer, message, vision_config)
        check_request_length(len(encoded.token_ids), self.max_model_len - 1)  # one token of the answer needs room too
        return encoded

    def compute_digests(self, payload: MLLMPayload, vision_config: VisionInputConfig) -> dict[str, list[str]]:
        """Return the digests of the encoded media: the same clip is encoded differently for different inputs."""
        digests: dict[str, list[str]] = {"image": [], "video": []}
        for media in payload.media:
            digests[media.medium].append(f"{compute_media_digest(media)}-{vision_config.model_dump_json()}")
        return digests

    async def start_encoded(
        self, encoded: TokenizedRequest, digests: dict[str, list[str]], params: SamplingParams
    ) -> AsyncIterator[Any]:
        prompt = build_engine_input(encoded, digests, self.mllm_config.vision_input.merge_size)
        return self.stream_outputs(prompt, params)

    async def generate_encoded(
        self, encoded: TokenizedRequest, digests: dict[str, list[str]], params: SamplingParams
    ) -> Any:
        return [output async for output in await self.start_encoded(encoded, digests, params)][-1]

    # ------------------------------------------------------------ routing

    async def route(self, payload: MLLMPayload) -> Route:
        message = await asyncio.to_thread(self.message_from_payload, payload)
        words = qwen3_vl.tokenize_route_words(self.tokenizer)
        probabilities = await self.answer_queries(score_choices(words), qwen3_vl.build_route_message(message), payload)
        return qwen3_vl.route_from_probabilities(probabilities, qwen3_vl.get_source_medium(message))

    async def score_agreement(self, payload: MLLMPayload) -> float:
        message = await asyncio.to_thread(self.message_from_payload, payload)
        words = qwen3_vl.tokenize_agreement_words(self.tokenizer)
        return (await self.answer_queries(score_choices(words), message, payload))[0]

    async def answer_queries(
        self,
        queries: Generator[BranchQuery, Sequence[float], list[float]],
        message: MLLMMessage,
        payload: MLLMPayload,
    ) -> list[float]:
        """Return what `score_choices` returns, with the engine's log probabilities."""
        config = self.mllm_config.vision_input
        encoded = await asyncio.to_thread(self.encode_message, message, config)
        digests = self.compute_digests(payload, config)
        try:
            query = next(queries)
            while True:
                query = queries.send(await self.compute_logprobs(encoded, digests, query))
        except StopIteration as stop:
            probabilities: list[float] = stop.value
            return probabilities

    async def compute_logprobs(
        self, encoded: TokenizedRequest, digests: dict[str, list[str]], query: BranchQuery
    ) -> list[float]:
        """Return the log probabilities of a query's tokens after the request and the query's prefix."""
        token_ids = list(query.token_ids)
        params = SamplingParams(temperature=0, max_tokens=1, logprob_token_ids=token_ids, detokenize=False)
        output = await self.generate_encoded(qwen3_vl.extend_request(encoded, query.prefix_ids), digests, params)
        return [output.logprobs[0][token_id].logprob for token_id in token_ids]

    # ------------------------------------------------------------ text

    async def write_answer(self, payload: MLLMPayload, sampling: TextSampling) -> AsyncIterator[str]:
        message = await asyncio.to_thread(self.message_from_payload, payload)
        return await self.start_answer(message, payload, self.mllm_config.vision_input, sampling)

    async def start_answer(
        self, message: MLLMMessage, payload: MLLMPayload, vision_config: VisionInputConfig, sampling: TextSampling
    ) -> AsyncIterator[str]:
        """Return the pieces of an answer; with a schema, vLLM admits only tokens that keep to it."""
        schema = message.json_schema
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            max_tokens=sampling.max_tokens,
            stop_token_ids=self.family.stop_ids,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            structured_outputs=StructuredOutputsParams(json=schema) if schema else None,
        )
        encoded = await asyncio.to_thread(self.encode_message, message, vision_config)
        digests = self.compute_digests(payload, vision_config) if message.media else {"image": [], "video": []}
        return self.stream_pieces(await self.start_encoded(encoded, digests, params))

    async def write_caption(self, message: MLLMMessage, payload: MLLMPayload) -> str:
        limit = TextSampling(max_tokens=qwen3_vl.MAX_CAPTION_TOKENS)
        pieces = [piece async for piece in await self.start_answer(message, payload, self.caption_config, limit)]
        return sanitize_text("".join(pieces).strip(), self.special_tokens)

    # ------------------------------------------------------------ features

    async def compute_visual_tokens(self, payload: MLLMPayload, medium: Medium) -> bytes:
        """Return the file of the decoder's features: hidden states, and the target's caption if the preset has one."""
        message = await asyncio.to_thread(self.message_from_payload, payload)
        caption = ""
        if "caption" in self.preset.condition.text_parts:
            source_caption = None
            if message.media:
                source_caption = await self.write_caption(qwen3_vl.build_source_caption_message(message), payload)
            caption = await self.write_caption(qwen3_vl.build_target_caption_message(message, source_caption), payload)
        feature_message = qwen3_vl.build_feature_message(message)
        encoded = await asyncio.to_thread(self.encode_message, feature_message, self.feature_config)
        first = 0
        if self.mllm_config.kept_positions == "after-user-start":
            first = qwen3_vl.count_dropped_tokens(self.tokenizer, feature_message)
        digests = self.compute_digests(payload, self.feature_config)

        async def compute(params: SamplingParams) -> None:
            await self.generate_encoded(encoded, digests, params)

        tensors = await self.collect_file(compute, first)
        return add_caption(tensors, caption)
