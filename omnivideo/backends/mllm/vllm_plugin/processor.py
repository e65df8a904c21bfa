"""vLLM's multimodal processor for our MLLM, with the frames, sizes, patches and timestamps of `models.mllm`.

Only vLLM's own chat route uses it, since our routes send patches. Hugging Face's processors are not used, so a
checkpoint needs no files for them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from vllm.inputs import MultiModalDataDict
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal.inputs import MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import PromptReplacement, PromptUpdate, PromptUpdateDetails

from omnivideo.models.mllm import MLLMMedia, encode_media
from omnivideo.presets import VisionInputConfig, get_preset, get_vision_input

TIMESTAMP_PATTERN = re.compile(r"<([\d.]+) seconds>")
INPUT_FIELDS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}


def vision_config_from_hf(config: Any) -> VisionInputConfig:
    """Return the vision input of the served preset, or of one whose MLLM patches as this one does."""
    if details := getattr(config, "omnivideo", None):
        return get_preset(details["preset"]).mllm.vision_input
    vision = config.vision_config
    return get_vision_input(vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)


def collate_patches(patches: Mapping[str, list[Tensor]], grids: Mapping[str, list[list[int]]]) -> dict[str, Tensor]:
    """Return the model's inputs for the patches [P, I] and grids (t, h, w) of each kind of medium."""
    inputs: dict[str, Tensor] = {}
    for kind, (values, grid) in INPUT_FIELDS.items():
        if patches[kind]:
            inputs |= {values: torch.cat(patches[kind]), grid: torch.tensor(grids[kind])}
    return inputs


def media_from_image(image: Any) -> MLLMMedia:
    pixels = image.convert("RGB") if isinstance(image, Image.Image) else image
    return MLLMMedia(np.asarray(pixels)[None], is_video=False)


def media_from_video(video: tuple[Any, Mapping[str, Any]]) -> MLLMMedia:
    """Return a video as vLLM reads it: pixels [F, H, W, 3] and metadata.

    `launch.build_command` makes the server read every frame. If it reads fewer, evenly spaced ones, the frame rate is
    lowered accordingly.
    """
    frames, metadata = np.asarray(video[0]), video[1]
    total = metadata.get("total_num_frames") or len(frames)
    return MLLMMedia(frames, float(metadata.get("fps") or 1.0) * len(frames) / total)


class OmniVideoProcessingInfo(Qwen3VLProcessingInfo):
    """The sizes of media in tokens, by which vLLM plans its memory."""

    def get_vision_input_config(self) -> VisionInputConfig:
        return vision_config_from_hf(self.get_hf_config())

    def count_max_frames(self, seq_len: int) -> int:
        """Return the number of frames that the model sees of the longest clip that fits into `seq_len` tokens."""
        vision_config = self.get_vision_input_config()
        pairs = max(1, seq_len // (self.count_frame_tokens() + 2))  # a pair has a start and an end token
        return min(vision_config.max_frames, pairs * vision_config.temporal_patch_size)

    def count_frame_tokens(self) -> int:
        """Return the largest number of tokens of a frame."""
        vision_config = self.get_vision_input_config()
        return vision_config.max_pixels // (vision_config.patch_size * vision_config.merge_size) ** 2

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        return {"text_kwargs": set(), "images_kwargs": set(), "videos_kwargs": set()}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {
            "image": self.count_frame_tokens(),
            "video": -(-self.count_max_frames(seq_len) // self.get_vision_input_config().temporal_patch_size)
            * self.count_frame_tokens(),
        }


class OmniVideoDummyInputs(Qwen3VLDummyInputsBuilder):
    """The largest media, with which vLLM measures its memory."""

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]
    ) -> MultiModalDataDict:
        info: OmniVideoProcessingInfo = self.info
        side = int(info.get_vision_input_config().max_pixels ** 0.5)
        count = info.count_max_frames(seq_len)
        metadata = {"fps": info.get_vision_input_config().fps, "total_num_frames": count}
        return {
            "image": [Image.new("RGB", (side, side))] * mm_counts.get("image", 0),
            "video": [(np.zeros((count, side, side, 3), np.uint8), metadata)] * mm_counts.get("video", 0),
        }


class OmniVideoProcessor(Qwen3VLMultiModalProcessor):
    """Turns media into patches, and placeholders in a prompt into their tokens."""

    def _apply_hf_processor_main(self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]) -> BatchFeature:
        info: OmniVideoProcessingInfo = self.info
        patches: dict[str, list[Tensor]] = {"image": [], "video": []}
        grids: dict[str, list[list[int]]] = {"image": [], "video": []}
        timestamps: list[list[float]] = []
        all_media = [media_from_image(image) for image in mm_items["image"].get_all()] if "image" in mm_items else []
        all_media += [media_from_video(video) for video in mm_items["video"].get_all()] if "video" in mm_items else []
        for media in all_media:
            text, patches_PI, grid = encode_media(media, info.get_vision_input_config())
            kind = "video" if media.is_video else "image"
            patches[kind].append(patches_PI)
            grids[kind].append(grid)
            if media.is_video:
                timestamps.append([float(seconds) for seconds in TIMESTAMP_PATTERN.findall(text)])
        return BatchFeature(collate_patches(patches, grids) | ({"timestamps": timestamps} if timestamps else {}))

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, Any],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        config = self.info.get_hf_config()
        patches_per_token = config.vision_config.spatial_merge_size**2
        start, end = config.vision_start_token_id, config.vision_end_token_id

        def replace_image(index: int) -> list[int]:
            grid: Any = out_mm_kwargs["image"][index]["image_grid_thw"].data
            return [config.image_token_id] * (int(grid.prod()) // patches_per_token)

        def replace_video(index: int) -> PromptUpdateDetails:
            item = out_mm_kwargs["video"][index]
            grid: Any = item["video_grid_thw"].data
            return self.get_video_repl(
                tokens_per_frame=[int(grid[1:].prod()) // patches_per_token] * int(grid[0]),
                timestamps=item["timestamps"].data,
                tokenizer=self.info.get_tokenizer(),
                vision_start_token_id=start,
                vision_end_token_id=end,
                video_token_id=config.video_token_id,
                select_token_id=True,
            )

        return [
            PromptReplacement(modality="image", target=[config.image_token_id], replacement=replace_image),
            PromptReplacement(modality="video", target=[start, config.video_token_id, end], replacement=replace_video),
        ]
