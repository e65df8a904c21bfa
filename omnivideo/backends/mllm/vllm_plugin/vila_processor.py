"""vLLM's multimodal processor for VILA, and what it shares with the model and the routes.

Our routes send pixels. vLLM plans its memory with the processor, and its own chat route uses it. All images have one
size, so each has the same number of tokens.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, SiglipVisionConfig
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
)

from omnivideo.backends.mllm.vllm_plugin.processor import media_from_image
from omnivideo.models.vila import MERGE_SIZE
from omnivideo.models.vila_requests import convert_frame, find_routing_ids
from omnivideo.models.weights.vila import read_image_config


def get_vila_folder(config: Any) -> Path:
    """Return the folder of VILA's parts, from the configuration that `launch` extends."""
    return Path(config.omnivideo["vila"])


def read_vision_config(config: Any) -> SiglipVisionConfig:
    """Return the configuration of the tower, from the folder beside the Llama's."""
    return SiglipVisionConfig.from_pretrained(get_vila_folder(config) / "vision_tower")


def count_image_tokens(vision_config: SiglipVisionConfig) -> int:
    """Return the number K of tokens of an image."""
    side = int(vision_config.image_size // vision_config.patch_size)
    return (-(-side // MERGE_SIZE)) ** 2


def get_image_token_id(tokenizer: Any) -> int:
    """Return the token id that stands at an image's places; users cannot type it, and it is never masked."""
    return find_routing_ids(tokenizer)["image"]


class VilaProcessingInfo(BaseProcessingInfo):
    """The sizes of images in tokens, by which vLLM plans its memory. All images have one size."""

    def get_vision_config(self) -> SiglipVisionConfig:
        return read_vision_config(self.get_hf_config())

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        return {"text_kwargs": set(), "images_kwargs": set()}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": count_image_tokens(self.get_vision_config())}


class VilaDummyInputs(BaseDummyInputsBuilder[VilaProcessingInfo]):
    """Images with which vLLM measures its memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        tokenizer: Any = self.info.get_tokenizer()
        return str(tokenizer.convert_ids_to_tokens(get_image_token_id(tokenizer))) * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]) -> Any:
        side = self.info.get_vision_config().image_size
        return {"image": [Image.new("RGB", (side, side))] * mm_counts.get("image", 0)}


class VilaProcessor(BaseMultiModalProcessor[VilaProcessingInfo]):
    """Turns images into pixels, and each placeholder into the tokens of its image."""

    def _apply_hf_processor_main(self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]) -> BatchFeature:
        image_config, _ = read_image_config(get_vila_folder(self.info.get_hf_config()))
        images = mm_items["image"].get_all() if "image" in mm_items else []
        pixels = [convert_frame(media_from_image(image).frames[0], image_config) for image in images]
        return BatchFeature({"pixel_values": torch.stack(pixels)} if pixels else {})

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return build_field_config()

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, Any],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        token_id = get_image_token_id(self.info.get_tokenizer())
        tokens = [token_id] * count_image_tokens(self.info.get_vision_config())
        return [PromptReplacement(modality="image", target=[token_id], replacement=tokens)]


def build_field_config() -> dict[str, MultiModalFieldConfig]:
    """Return how the pixels [F, 3, H, W] of a request are divided among its images."""
    return {"pixel_values": MultiModalFieldConfig.batched("image")}
