"""The MLLM in this process, run by transformers, behind the planner's port."""

import threading
from collections import OrderedDict
from collections.abc import Iterator

import torch
from safetensors.torch import save
from torch import Tensor

from omnivideo.backends.mllm.media import create_media_cache, read_mllm_media
from omnivideo.contracts import Artifact, Medium, MLLMRequest, Route
from omnivideo.models.mllm import (
    MLLMMedia,
    MLLMMessage,
    compute_first_logits,
    generate_answer,
    list_special_tokens,
    predict_route,
    sanitize_text,
)
from omnivideo.models.omni import OmniVideoModel
from omnivideo.ports import ObjectStore
from omnivideo.storage.objects.local import compute_object_key
from omnivideo.storage.objects.tensors import get_tensors

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
        self.media_cache = create_media_cache()
        self.special_tokens = list_special_tokens(omni.mllm_tokenizer)
        self.tokens_by_reference: OrderedDict[str, Tensor] = OrderedDict()
        self.tokens_lock = threading.Lock()

    def load_media(self, artifact: Artifact) -> MLLMMedia:
        def read_artifact() -> MLLMMedia:
            data = self.store.get(artifact.key)
            return read_mllm_media(data, self.omni.vision_config, artifact.fps, artifact.medium)

        return self.media_cache.get_or_compute((artifact.key, artifact.fps, artifact.medium), read_artifact)

    def build_message(self, request: MLLMRequest) -> MLLMMessage:
        """Return the model's input for a request. Raises UnreadableMedia or ArtifactNotFound."""
        text = sanitize_text(request.text, self.special_tokens)
        return MLLMMessage(text, tuple(map(self.load_media, request.artifacts)), request.system)

    def route(self, request: MLLMRequest) -> Route:
        message = self.build_message(request)
        return predict_route(self.omni.mllm, self.omni.mllm_tokenizer, message, self.omni.vision_config)

    def stream_text(self, request: MLLMRequest, max_tokens: int | None = None) -> Iterator[str]:
        # Greedy, so that another process that continues a turn gets the same text.
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
        logits_V = compute_first_logits(self.omni.mllm, tokenizer, self.build_message(request), self.omni.vision_config)
        answer_ids = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("yes", "no")]
        return float(logits_V[answer_ids].softmax(-1)[0])

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
