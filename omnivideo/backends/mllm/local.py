"""The MLLM in this process, by transformers, behind the planner's port."""

from collections.abc import Iterator
from functools import lru_cache

import torch

from omnivideo.backends.media import frames_of
from omnivideo.backends.mllm.plain import plain, specials_of
from omnivideo.contracts import Artifact, Ask, Medium, Routed
from omnivideo.models.mllm import Media, Message, answer, first_logits, route
from omnivideo.models.omni import Omni
from omnivideo.ports import ObjectStore
from omnivideo.storage.tensors import put_tensors


class LocalMLLM:
    """`store` holds the artifacts that are shown, and takes the visual tokens."""

    most = 1024  # tokens of an answer

    def __init__(self, omni: Omni, store: ObjectStore):
        self.omni = omni
        self.store = store
        # A turn asks about the same clip several times (route, answer, tokens); a few are kept decoded.
        self.seen = lru_cache(maxsize=8)(self.look)
        self.specials = specials_of(omni.mllm_tokenizer)

    def look(self, artifact: Artifact) -> Media:
        return Media(frames_of(self.store, artifact), artifact.fps, artifact.medium == "video")

    def message(self, ask: Ask) -> Message:
        return Message(plain(ask.text, self.specials), tuple(map(self.seen, ask.shown)), ask.system)

    def route(self, ask: Ask) -> Routed:
        return route(self.omni.mllm, self.omni.mllm_tokenizer, self.message(ask), self.omni.pixels)

    def write(self, ask: Ask, most: int | None = None) -> Iterator[str]:
        # Greedy: what a thread says must come out the same when a killed process goes on with it.
        yield from answer(
            self.omni.mllm,
            self.omni.mllm_tokenizer,
            self.message(ask),
            self.omni.pixels,
            temperature=0.0,
            most=most or self.most,
        )

    def agreement(self, ask: Ask) -> float:
        tokenizer = self.omni.mllm_tokenizer
        chances = first_logits(self.omni.mllm, tokenizer, self.message(ask), self.omni.pixels)
        words = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("yes", "no")]
        return float(chances[words].softmax(-1)[0])

    @torch.no_grad()
    def visual_tokens(self, ask: Ask, medium: Medium) -> str:
        tokens = self.omni.visual_tokens([(self.message(ask), medium)])
        return put_tensors(self.store, {"visual_tokens": tokens})
