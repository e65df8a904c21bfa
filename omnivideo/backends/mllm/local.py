"""The MLLM in this process, run by transformers, behind the planner's port."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from functools import lru_cache

import torch
from safetensors.torch import save
from torch import Tensor

from omnivideo.contracts import Artifact, Medium, MLLMRequest, Route
from omnivideo.media.artifacts import load_frames
from omnivideo.models.mllm import MLLMMedia, MLLMMessage, sanitize_text
from omnivideo.models.omni import OmniVideoModel
from omnivideo.ports import ObjectStore
from omnivideo.storage.objects.local import compute_object_key
from omnivideo.storage.objects.tensors import get_tensors

MAX_CACHED_MEDIA = 8  # decoded media; one turn reads the same clip several times (route, answer, visual tokens)
MAX_CACHED_TOKENS = 1024  # results of the vision head, a few kilobytes each


class LocalMLLM:
    """The MLLM of `omni`, for one process.

    `store` holds the artifacts that requests refer to. A reference to visual tokens is the object key of their
    safetensors file. The tokens themselves stay in memory, where a renderer of the same process finds them. With
    `persist_tokens` they are also written to the store, for jobs that outlive this process.
    """

    max_tokens = 1024  # limit of an answer

    def __init__(self, omni: OmniVideoModel, store: ObjectStore, persist_tokens: bool = True):
        self.omni = omni
        self.store = store
        self.persist_tokens = persist_tokens
        self.load_media_cached = lru_cache(maxsize=MAX_CACHED_MEDIA)(self.load_media)
        self.special_tokens = omni.bound_mllm.special_tokens
        self.tokens_by_reference: OrderedDict[str, Tensor] = OrderedDict()
        self.tokens_lock = threading.Lock()

    def load_media(self, artifact: Artifact) -> MLLMMedia:
        return MLLMMedia(load_frames(self.store, artifact), artifact.fps, artifact.medium == "video")

    def build_message(self, request: MLLMRequest) -> MLLMMessage:
        """Return the model's input for a request. Raises UnreadableMedia or ArtifactNotFound."""
        text = sanitize_text(request.text, self.special_tokens)
        media = tuple(map(self.load_media_cached, request.artifacts))
        return MLLMMessage(text, media, request.system, request.json_schema)

    def route(self, request: MLLMRequest) -> Route:
        return self.omni.bound_mllm.route(self.build_message(request))

    def stream_text(self, request: MLLMRequest, max_tokens: int | None = None) -> Iterator[str]:
        # Greedy, so that another process that continues a turn gets the same text.
        message, max_tokens = self.build_message(request), max_tokens or self.max_tokens
        yield from self.omni.bound_mllm.stream_text(message, temperature=0.0, max_tokens=max_tokens)

    def score_agreement(self, request: MLLMRequest) -> float:
        return self.omni.bound_mllm.score_agreement(self.build_message(request))

    # ------------------------------------------------------------ visual tokens

    @torch.no_grad()
    def compute_visual_tokens(self, request: MLLMRequest, medium: Medium) -> Tensor:
        """Return V_o [1, Q, E] (Eq. 1) of a request for an image or a video."""
        return self.omni.compute_visual_tokens([(self.build_message(request), medium)])

    def predict_visual_tokens(self, request: MLLMRequest, medium: Medium) -> str:
        """Return the reference of a request's visual tokens."""
        visual_1QE = self.compute_visual_tokens(request, medium)
        data = encode_visual_tokens(visual_1QE)
        reference = compute_object_key(data, "safetensors")
        with self.tokens_lock:
            self.tokens_by_reference[reference] = visual_1QE
            self.tokens_by_reference.move_to_end(reference)
            if len(self.tokens_by_reference) > MAX_CACHED_TOKENS:
                self.tokens_by_reference.popitem(last=False)
        if self.persist_tokens:
            self.store.put(data, "safetensors")
        return reference

    def load_visual_tokens(self, reference: str) -> Tensor:
        """Return V_o [1, Q, E] by reference: from memory, otherwise from the store. Raises ArtifactNotFound."""
        visual_1QE = self.tokens_by_reference.get(reference)
        if visual_1QE is None:
            visual_1QE = get_tensors(self.store, reference)["visual_tokens"]
        return visual_1QE.to(self.omni.device)

    def has_visual_tokens(self, reference: str) -> bool:
        return reference in self.tokens_by_reference or self.store.has(reference)


def encode_visual_tokens(visual_1QE: Tensor) -> bytes:
    """Return the safetensors file of visual tokens [1, Q, E]."""
    return save({"visual_tokens": visual_1QE.detach().cpu().contiguous()})
