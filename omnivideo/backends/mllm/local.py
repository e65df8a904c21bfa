"""The MLLM in this process, by transformers, behind the planner's port."""

from collections.abc import Iterator
from functools import lru_cache

import torch

from omnivideo.backends.mllm.sanitize import list_special_tokens, sanitize_text
from omnivideo.contracts import Artifact, Medium, MLLMRequest, Route
from omnivideo.media.artifacts import load_frames
from omnivideo.models.mllm import MLLMMedia, MLLMMessage, compute_first_logits, generate_answer, predict_route
from omnivideo.models.omni import OmniVideoModel
from omnivideo.ports import ObjectStore
from omnivideo.storage.objects.tensors import put_tensors


class LocalMLLM:
    """`store` holds the artifacts that are shown, and takes the visual tokens."""

    max_tokens = 1024  # tokens of an answer

    def __init__(self, omni: OmniVideoModel, store: ObjectStore):
        self.omni = omni
        self.store = store
        # A turn asks about the same clip several times (route, answer, tokens); a few are kept decoded.
        self.load_media_cached = lru_cache(maxsize=8)(self.load_media)
        self.special_tokens = list_special_tokens(omni.mllm_tokenizer)

    def load_media(self, artifact: Artifact) -> MLLMMedia:
        return MLLMMedia(load_frames(self.store, artifact), artifact.fps, artifact.medium == "video")

    def build_message(self, ask: MLLMRequest) -> MLLMMessage:
        return MLLMMessage(
            sanitize_text(ask.text, self.special_tokens), tuple(map(self.load_media_cached, ask.artifacts)), ask.system
        )

    def route(self, request: MLLMRequest) -> Route:
        return predict_route(
            self.omni.mllm, self.omni.mllm_tokenizer, self.build_message(request), self.omni.vision_config
        )

    def stream_text(self, request: MLLMRequest, max_tokens: int | None = None) -> Iterator[str]:
        # Greedy: what a thread says must come out the same when a killed process goes on with it.
        yield from generate_answer(
            self.omni.mllm,
            self.omni.mllm_tokenizer,
            self.build_message(request),
            self.omni.vision_config,
            temperature=0.0,
            max_tokens=max_tokens or self.max_tokens,
        )

    def score_agreement(self, request: MLLMRequest) -> float:
        tokenizer = self.omni.mllm_tokenizer
        logits = compute_first_logits(self.omni.mllm, tokenizer, self.build_message(request), self.omni.vision_config)
        answer_ids = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("yes", "no")]
        return float(logits[answer_ids].softmax(-1)[0])

    @torch.no_grad()
    def predict_visual_tokens(self, request: MLLMRequest, medium: Medium) -> str:
        tokens = self.omni.compute_visual_tokens([(self.build_message(request), medium)])
        return put_tensors(self.store, {"visual_tokens": tokens})
