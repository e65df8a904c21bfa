"""The routes of `protocol` on vLLM's API server, answered by its engine.

`families` builds the prompts, so that the engine gets the same tokens and pixels as `LocalMLLM`.
"""

import atexit
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from vllm.entrypoints.openai.chat_completion.api_router import create_chat_completion
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from omnivideo.backends.mllm.server import add_mllm_routes
from omnivideo.backends.mllm.vllm_plugin import ENDPOINT_PLUGIN
from omnivideo.backends.mllm.vllm_plugin.instruct import InstructService
from omnivideo.backends.mllm.vllm_plugin.service import VLLMService
from omnivideo.backends.tracing import export_traces
from omnivideo.models.mllm import sanitize_text
from omnivideo.presets import get_preset
from omnivideo.settings import load_settings


def sanitize_chat_request(request: ChatCompletionRequest, special_tokens: frozenset[str]) -> ChatCompletionRequest:
    """Remove special tokens from the messages of users and tools, in place, and return the request."""
    for message in request.messages:
        if message.get("role") in ("user", "tool"):
            content: Any = message.get("content")
            if isinstance(content, str):
                message["content"] = sanitize_text(content, special_tokens)
            for part in content if isinstance(content, list) else ():
                if isinstance(part, dict) and isinstance(part.get("text"), str):
                    part["text"] = sanitize_text(part["text"], special_tokens)
    return request


def create_service(client: Any, outbox: Path, lora: Any) -> VLLMService:
    """Return the service of the served preset."""
    preset, tokenizer = get_preset(client.model_config.hf_config.omnivideo["preset"]), client.get_tokenizer()
    if preset.mllm.routing == "likelihoods":
        return InstructService(client, tokenizer, outbox, preset, lora)
    return VLLMService(client, tokenizer, outbox, lora)


class Endpoint:
    """The EndpointPlugin that vLLM loads."""

    name = ENDPOINT_PLUGIN
    required_tasks = ("generate",)
    service: VLLMService

    def attach_router(self, app: FastAPI) -> None:
        add_mllm_routes(app, lambda: self.service, load_settings().mllm_key)

        @app.post("/v1/chat/completions")
        async def create_chat(request: ChatCompletionRequest, raw_request: Request) -> Any:
            """Answer as vLLM's own route does, with special tokens removed from the users' texts."""
            return await create_chat_completion(
                sanitize_chat_request(request, self.service.special_tokens), raw_request
            )

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        outbox = Path(engine_client.vllm_config.kv_transfer_config.kv_connector_extra_config["outbox"])
        outbox.mkdir(mode=0o700, parents=True, exist_ok=True)
        atexit.register(shutil.rmtree, outbox, ignore_errors=True)
        lora = next(iter(state.openai_serving_models.lora_requests.values()), None)
        self.service = create_service(engine_client, outbox, lora)
        if load_settings().traces == "otlp":
            export_traces("mllm")
