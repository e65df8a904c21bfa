"""The routes of `wire` on vLLM's API server, answered by its engine.

Prompts are made by `models.mllm.encode`, so that what the engine sees is what the twin in a process sees, token for
token and pixel for pixel.
"""

import asyncio
import atexit
import hashlib
import math
import shutil
import tempfile
import uuid
from argparse import Namespace
from collections.abc import AsyncIterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from vllm.entrypoints.openai.chat_completion.api_router import create_chat_completion
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, SamplingParams

from omnivideo.backends.decoder.video import read_media
from omnivideo.backends.mllm.plain import plain, specials_of
from omnivideo.backends.mllm.server import attach
from omnivideo.backends.mllm.vllm_plugin import ENDPOINT, WANTED
from omnivideo.backends.mllm.vllm_plugin.processor import pixels_of
from omnivideo.backends.mllm.vllm_plugin.prompt import engine_input
from omnivideo.backends.mllm.wire import Asked, Shown
from omnivideo.contracts import Medium, Routed
from omnivideo.errors import InvalidInput
from omnivideo.models.mllm import BOI, BOV, ENDING, VISUAL_TOKENS, Media, Message, encode

SHORT = 4000  # characters, the most of a user's request


def look(shown: Shown) -> Media:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"shown.{shown.suffix}"
        path.write_bytes(shown.data)
        return Media(read_media(path).frames, shown.fps, shown.medium == "video")


def digest(shown: Shown) -> str:
    """Unlike any that vLLM's own chat route gives a medium, whose prompts are put together elsewhere."""
    return "omnivideo-" + hashlib.sha256(shown.data + f"|{shown.medium}|{shown.fps}".encode()).hexdigest()


class Engine:
    """`Answers` by vLLM's engine.  Greedy throughout, so the same for the same request."""

    def __init__(self, client: Any, tokenizer: Any, outbox: Path, lora: Any = None):
        self.client, self.tokenizer, self.outbox, self.lora = client, tokenizer, outbox, lora
        self.config = client.model_config.hf_config
        self.longest: int = client.model_config.max_model_len
        self.pixels = pixels_of(self.config)
        self.specials = specials_of(tokenizer)
        self.seen = lru_cache(maxsize=8)(look)  # a turn asks about the same clip several times

    # ------------------------------------------------------------ requests

    def prompt(self, asked: Asked, answer: str) -> Any:
        message = Message(plain(asked.text, self.specials), tuple(map(self.seen, asked.shown)), asked.system)
        encoded = encode(self.tokenizer, message, self.pixels, answer)
        if len(encoded.ids) >= self.longest:
            most = self.longest - 1
            raise InvalidInput("prompt", f"it has {len(encoded.ids)} tokens; the language model takes {most}")
        digests: dict[str, list[str]] = {"image": [], "video": []}
        for one in asked.shown:
            digests[one.medium].append(digest(one))
        return engine_input(encoded, digests, self.pixels.merge)

    async def outputs(self, asked: Asked, params: SamplingParams, answer: str = "") -> AsyncIterator[Any]:
        """Pixels and long texts stay off the event loop; a short text is encoded faster than a thread is found."""
        slow = asked.shown or len(asked.text) > SHORT
        prompt = await asyncio.to_thread(self.prompt, asked, answer) if slow else self.prompt(asked, answer)
        return self.generated(prompt, params)

    async def generated(self, prompt: Any, params: SamplingParams) -> AsyncIterator[Any]:
        if prompt["type"] == "multimodal":  # what the engine has already seen is not sent again
            self.client.input_processor.inject_into_mm_cache(prompt["mm_hashes"], prompt["mm_kwargs"])
        name = f"omnivideo-{uuid.uuid4().hex}"
        try:
            async for output in self.client.generate(prompt, params, name, lora_request=self.lora):
                yield output.outputs[0]
        except VLLMValidationError as error:
            raise InvalidInput("prompt", str(error)) from None

    async def last(self, asked: Asked, params: SamplingParams, answer: str = "") -> Any:
        return [output async for output in await self.outputs(asked, params, answer)][-1]

    # ------------------------------------------------------------ answers

    def ids(self, *words: str) -> list[int]:
        return [self.tokenizer.encode(word, add_special_tokens=False)[0] for word in words]

    async def first(self, asked: Asked, ids: list[int]) -> tuple[int, list[float]]:
        """The likeliest first token, and the logarithms of the probabilities of these."""
        params = SamplingParams(temperature=0, max_tokens=1, logprob_token_ids=ids, detokenize=False)
        output = await self.last(asked, params)
        return output.token_ids[0], [output.logprobs[0][one].logprob for one in ids]

    async def route(self, asked: Asked) -> Routed:
        boi, bov = self.ids(BOI, BOV)
        best, logs = await self.first(asked, [boi, bov])
        image, video = map(math.exp, logs)
        if best == boi:
            return Routed(kind="image", probability=image)
        if best == bov:
            return Routed(kind="video", probability=video)
        return Routed(kind="text", probability=1 - image - video)

    async def agreement(self, asked: Asked) -> float:
        _, (yes, no) = await self.first(asked, self.ids("yes", "no"))
        return 1 / (1 + math.exp(no - yes))

    async def write(self, asked: Asked, most: int) -> AsyncIterator[str]:
        params = SamplingParams(
            temperature=0,
            max_tokens=most,
            bad_words=list(VISUAL_TOKENS),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        return self.pieces(await self.outputs(asked, params))

    async def pieces(self, outputs: AsyncIterator[Any]) -> AsyncIterator[str]:
        """Special tokens but the end are left in, as in `models.mllm.answer`.

        Token by token, though a busy engine tells of several at once: else half a character at an answer's end would
        take what came with it along.
        """
        held: list[int] = []  # a character may span several tokens
        async for output in outputs:
            for one in output.token_ids:
                held += [one] if one != self.tokenizer.eos_token_id else []
                text = self.tokenizer.decode(held)
                if text and not text.endswith("\ufffd"):
                    yield text
                    held = []

    async def visual_tokens(self, asked: Asked, medium: Medium) -> bytes:
        path = self.outbox / f"tokens_{uuid.uuid4().hex}"
        path.touch(mode=0o600)  # the connector writes only where somebody waits
        extra = {"kv_transfer_params": {WANTED: path.name}}
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False, extra_args=extra)
        try:
            await self.last(asked, params, "".join(ENDING[medium]))
            tokens = path.read_bytes()
        finally:
            path.unlink(missing_ok=True)
        if not tokens:
            raise RuntimeError("the connector wrote no visual tokens; the engine's log says why")
        return tokens


def neutral(request: ChatCompletionRequest, specials: frozenset[str]) -> ChatCompletionRequest:
    """A chat whose users and tools have no special tokens in their words."""
    for message in request.messages:
        if message.get("role") in ("user", "tool"):
            content: Any = message.get("content")
            if isinstance(content, str):
                message["content"] = plain(content, specials)
            for part in content if isinstance(content, list) else ():
                if isinstance(part, dict) and isinstance(part.get("text"), str):
                    part["text"] = plain(part["text"], specials)
    return request


class Endpoint:
    """vLLM's EndpointPlugin."""

    name = ENDPOINT
    required_tasks = ("generate",)
    engine: Engine

    def attach_router(self, app: FastAPI) -> None:
        attach(app, lambda: self.engine)

        @app.post("/v1/chat/completions")
        async def chat(request: ChatCompletionRequest, raw_request: Request) -> Any:
            """vLLM's own, but for what users cannot say."""
            return await create_chat_completion(neutral(request, self.engine.specials), raw_request)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        outbox = Path(engine_client.vllm_config.kv_transfer_config.kv_connector_extra_config["outbox"])
        outbox.mkdir(mode=0o700, parents=True, exist_ok=True)
        atexit.register(shutil.rmtree, outbox, ignore_errors=True)
        loras = list(state.openai_serving_models.lora_requests.values())
        self.engine = Engine(engine_client, engine_client.get_tokenizer(), outbox, loras[0] if loras else None)
