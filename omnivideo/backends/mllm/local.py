"""The MLLM in this process, run by transformers, behind the planner's port."""

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping

import torch

from omnivideo.backends.mllm.media import create_media_cache, read_mllm_media
from omnivideo.contracts import Artifact, Medium, MLLMRequest, Route
from omnivideo.models.features import MLLMFeatures, encode_features
from omnivideo.models.mllm import MLLMMedia, MLLMMessage, sanitize_text
from omnivideo.models.omni import OmniVideoModel
from omnivideo.ports import ObjectStore
from omnivideo.storage.objects.local import compute_object_key

MAX_CACHED_FEATURES = 1024  # a few kilobytes each with a vision head, up to a megabyte without


class LocalMLLM:
    """The MLLM of `omni`, for one process.

    `store` holds the artifacts that requests refer to. A reference to features, such as visual tokens, is the
    object key of their safetensors file. The features themselves stay in memory, where a renderer of the same process
    finds them. With `persist_tokens` they are also written to the store, for jobs that outlive this process.
    """

    max_tokens = 1024  # limit of an answer

    def __init__(self, omni: OmniVideoModel, store: ObjectStore, persist_tokens: bool = True):
        self.omni = omni
        self.store = store
        self.persist_tokens = persist_tokens
        self.media_cache = create_media_cache()
        self.special_tokens = omni.bound_mllm.special_tokens
        self.features_by_reference: OrderedDict[str, MLLMFeatures] = OrderedDict()
        self.features_lock = threading.Lock()
        self.counts = Counter[str]()  # of tokens, and of features that were found in memory or not

    def load_media(self, artifact: Artifact) -> MLLMMedia:
        def read_artifact() -> MLLMMedia:
            data = self.store.get(artifact.key)
            return read_mllm_media(data, self.omni.bound_mllm.visual_inputs, artifact.fps, artifact.medium)

        return self.media_cache.get_or_compute((artifact.key, artifact.fps, artifact.medium), read_artifact)

    def build_message(self, request: MLLMRequest) -> MLLMMessage:
        """Return the model's input for a request. Raises UnreadableMedia or ArtifactNotFound."""
        text = sanitize_text(request.text, self.special_tokens)
        media = tuple(map(self.load_media, request.artifacts))
        return MLLMMessage(text, media, request.system, request.json_schema)

    def route(self, request: MLLMRequest) -> Route:
        return self.omni.bound_mllm.route(self.build_message(request))

    def stream_text(self, request: MLLMRequest) -> Iterator[str]:
        # Greedy or with the request's seed, so that another process that continues a turn gets the same text.
        message, sampling = self.build_message(request), request.sampling
        options = sampling.model_dump() | {"max_tokens": sampling.max_tokens or self.max_tokens}
        self.counts["prompt_tokens"] += self.count_tokens(message.text)
        for piece in self.omni.bound_mllm.stream_text(message, **options):
            self.counts["generated_tokens"] += self.count_tokens(piece)
            yield piece

    def count_tokens(self, text: str) -> int:
        return len(self.omni.mllm_tokenizer(text, add_special_tokens=False).input_ids)

    def score_agreement(self, request: MLLMRequest) -> float:
        return self.omni.bound_mllm.score_agreement(self.build_message(request))

    # ------------------------------------------------------------ visual tokens

    @torch.no_grad()
    def compute_features(self, request: MLLMRequest, medium: Medium) -> MLLMFeatures:
        """Return what the decoder gets of a request for an image or a video."""
        return self.omni.compute_mllm_features(self.build_message(request), medium)

    def predict_visual_tokens(self, request: MLLMRequest, medium: Medium) -> str:
        """Return the reference of a request's features."""
        features = self.compute_features(request, medium)
        data = encode_features(features)
        reference = compute_object_key(data, "safetensors")
        with self.features_lock:
            self.features_by_reference[reference] = features
            self.features_by_reference.move_to_end(reference)
            if len(self.features_by_reference) > MAX_CACHED_FEATURES:
                self.features_by_reference.popitem(last=False)
        if self.persist_tokens:
            self.store.put(data, "safetensors")
        return reference

    def find_features(self, reference: str) -> MLLMFeatures | None:
        """Return features that are still in this process's memory."""
        features = self.features_by_reference.get(reference)
        self.counts["features_misses" if features is None else "features_hits"] += 1
        return features

    def fetch_metrics(self) -> str:
        """Return the counts since the start in Prometheus' text format."""
        return describe_counts(self.counts, self.media_cache.hit_count, self.media_cache.miss_count)

    def has_visual_tokens(self, reference: str) -> bool:
        return reference in self.features_by_reference or self.store.has(reference)


def describe_counts(counts: Mapping[str, int], media_hits: int, media_misses: int) -> str:
    """Return counts of tokens and of cache hits in Prometheus' text format."""
    tokens, requests = "omnivideo_language_model_tokens_total", "omnivideo_language_model_cache_requests_total"
    by_cache = {
        "features": (counts.get("features_hits", 0), counts.get("features_misses", 0)),
        "media": (media_hits, media_misses),
    }
    lines = [f"# HELP {tokens} Tokens of the texts of prompts and answers", f"# TYPE {tokens} counter"]
    lines += [f'{tokens}{{kind="{kind}"}} {counts.get(f"{kind}_tokens", 0)}' for kind in ("prompt", "generated")]
    lines += [f"# HELP {requests} Look-ups in the caches", f"# TYPE {requests} counter"]
    for cache, results in by_cache.items():
        for result, count in zip(("hit", "miss"), results, strict=True):
            lines.append(f'{requests}{{cache="{cache}",result="{result}"}} {count}')
    return "\n".join(lines) + "\n"
