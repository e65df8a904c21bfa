"""Pixels for vLLM as `models.mllm` makes them: the same frames, sizes, patches and timestamps, and none of its own.

vLLM's stock chat route comes through here; our own routes bring patches along.  Hugging Face's processors are never
asked, so the checkpoint needs no file for them.
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

from omnivideo.models.mllm import Media, Pixels, place_media

SECONDS = re.compile(r"<([\d.]+) seconds>")
FIELDS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}


def pixels_of(config: Any) -> Pixels:
    """The patching of the model; what it looks at is as everywhere."""
    vision = config.vision_config
    return Pixels(patch=vision.patch_size, merge=vision.spatial_merge_size, pair=vision.temporal_patch_size)


def tensors_of(patches: Mapping[str, list[Tensor]], grids: Mapping[str, list[list[int]]]) -> dict[str, Tensor]:
    """The model's inputs for patches [P, D] and grids (t, h, w) of each kind."""
    made: dict[str, Tensor] = {}
    for kind, (values, grid) in FIELDS.items():
        if patches[kind]:
            made |= {values: torch.cat(patches[kind]), grid: torch.tensor(grids[kind])}
    return made


def image_media(image: Any) -> Media:
    shown = image.convert("RGB") if isinstance(image, Image.Image) else image
    return Media(np.asarray(shown)[None], video=False)


def video_media(video: tuple[Any, Mapping[str, Any]]) -> Media:
    """The server is told to read every frame (`serving.command`); of fewer, evenly chosen, the rate is less."""
    frames, about = np.asarray(video[0]), video[1]
    total = about.get("total_num_frames") or len(frames)
    return Media(frames, float(about.get("fps") or 1.0) * len(frames) / total)


class Info(Qwen3VLProcessingInfo):
    def pixels(self) -> Pixels:
        return pixels_of(self.get_hf_config())

    def frames(self, seq_len: int) -> int:
        """The longest clip that fits a prompt, in frames that the model looks at."""
        pixels = self.pixels()
        pairs = max(1, seq_len // (self.each() + 2))  # a pair has a start and an end token
        return min(pixels.most_frames, pairs * pixels.pair)

    def each(self) -> int:
        """Tokens of a frame at the most."""
        pixels = self.pixels()
        return pixels.most // (pixels.patch * pixels.merge) ** 2

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        return {"text_kwargs": set(), "images_kwargs": set(), "videos_kwargs": set()}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.each(), "video": -(-self.frames(seq_len) // self.pixels().pair) * self.each()}


class Dummies(Qwen3VLDummyInputsBuilder):
    """The largest media, for vLLM to measure memory with."""

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]
    ) -> MultiModalDataDict:
        info: Info = self.info
        side = int(info.pixels().most ** 0.5)
        count = info.frames(seq_len)
        about = {"fps": info.pixels().fps, "total_num_frames": count}
        return {
            "image": [Image.new("RGB", (side, side))] * mm_counts.get("image", 0),
            "video": [(np.zeros((count, side, side, 3), np.uint8), about)] * mm_counts.get("video", 0),
        }


class Processor(Qwen3VLMultiModalProcessor):
    def _apply_hf_processor_main(self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]) -> BatchFeature:
        info: Info = self.info
        patches: dict[str, list[Tensor]] = {"image": [], "video": []}
        grids: dict[str, list[list[int]]] = {"image": [], "video": []}
        seconds: list[list[float]] = []
        media = [image_media(one) for one in mm_items["image"].get_all()] if "image" in mm_items else []
        media += [video_media(one) for one in mm_items["video"].get_all()] if "video" in mm_items else []
        for one in media:
            text, patch, grid = place_media(one, info.pixels())
            patches["video" if one.video else "image"].append(patch)
            grids["video" if one.video else "image"].append(grid)
            if one.video:
                seconds.append([float(at) for at in SECONDS.findall(text)])
        return BatchFeature(tensors_of(patches, grids) | ({"timestamps": seconds} if seconds else {}))

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, Any],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        config = self.info.get_hf_config()
        merged = config.vision_config.spatial_merge_size**2
        start, end = config.vision_start_token_id, config.vision_end_token_id

        def image(at: int) -> list[int]:
            grid: Any = out_mm_kwargs["image"][at]["image_grid_thw"].data
            return [config.image_token_id] * (int(grid.prod()) // merged)

        def video(at: int) -> PromptUpdateDetails:
            item = out_mm_kwargs["video"][at]
            grid: Any = item["video_grid_thw"].data
            return self.get_video_repl(
                tokens_per_frame=[int(grid[1:].prod()) // merged] * int(grid[0]),
                timestamps=item["timestamps"].data,
                tokenizer=self.info.get_tokenizer(),
                vision_start_token_id=start,
                vision_end_token_id=end,
                video_token_id=config.video_token_id,
                select_token_id=True,
            )

        return [
            PromptReplacement(modality="image", target=[config.image_token_id], replacement=image),
            PromptReplacement(modality="video", target=[start, config.video_token_id, end], replacement=video),
        ]
