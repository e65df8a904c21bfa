"""Foundation: the diffusion decoder, for text-to-image and text-to-video.

It replaces Wan's downloaded weights: a `WanTransformer3DModel` with the condition of a frozen text encoder. Batches of
images, clips and long clips take turns. The negative prompt, the null condition of guidance, replaces a tenth of the
captions.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from omnivideo.models.conditions import encode_text, pad_condition
from omnivideo.models.omni import build_decoder
from omnivideo.presets import TINY
from omnivideo.synthetic.captions import sample_caption
from omnivideo.synthetic.requests import COMPOSED_SHARE
from omnivideo.synthetic.scenes import CLIP_FRAMES, LONG_CLIP_FRAMES, Scene, stream_scenes
from omnivideo.training.engine.data_parallel import current_rank
from omnivideo.training.engine.recipe import Losses, Recipe, single_micro_batch, step_seed
from omnivideo.training.recipes.losses import flow_matching_loss
from omnivideo.training.tiny.latents import load_or_encode_latents, take_scenes
from omnivideo.training.tiny.text_encoder import MAX_TEXT_TOKENS, NEGATIVE_PROMPT

SCENE_COUNTS = {1: 32_000, CLIP_FRAMES: 14_000, LONG_CLIP_FRAMES: 5_000}  # scenes in the cache, by number of frames
BATCH_SIZES = {1: 96, CLIP_FRAMES: 32, LONG_CLIP_FRAMES: 18}
LENGTH_SCHEDULE = (1, CLIP_FRAMES, 1, CLIP_FRAMES, CLIP_FRAMES, LONG_CLIP_FRAMES)  # cycle over the steps
CAPTION_DROP_RATE = 0.1
LAYOUT_START_STEP = (
    1200  # shapes and colours first; from this step on, half of the samples have high noise, which teaches the layout
)


class DecoderFoundation(nn.Module):
    def __init__(self, decoder: WanTransformer3DModel, text_encoder: UMT5EncoderModel):
        super().__init__()
        self.decoder = decoder
        self.text_encoder = text_encoder


class CaptionedLatents:
    """Cached latents of stills or of clips, with new captions in every batch; a batch depends on the step alone."""

    def __init__(
        self, folder: Path, vae: AutoencoderKLWan, frame_count: int, count: int, on_progress: Callable[[int, int], None]
    ):
        self.frame_count = frame_count
        self.name = {1: "stills", CLIP_FRAMES: "clips"}.get(frame_count, f"clips of {frame_count} frames")
        stream = stream_scenes(1, frame_count > 1, composed_share=COMPOSED_SHARE, frame_counts=[frame_count])
        self.scenes: list[Scene] = take_scenes(stream, count)
        self.latents = load_or_encode_latents(folder, self.name, vae, self.scenes, on_progress)

    def sample_batch(self, step: int, size: int) -> tuple[Tensor, list[str]]:
        rng = random.Random(step_seed(f"decoder/{self.name}", step))
        indices = rng.sample(range(len(self.scenes)), size)
        texts = [
            NEGATIVE_PROMPT
            if rng.random() < CAPTION_DROP_RATE
            else sample_caption(rng, self.scenes[index], is_composed=True).text
            for index in indices
        ]
        return self.latents[current_rank().take_local_rows(indices)].float(), current_rank().take_local_rows(texts)


def build_decoder_recipe(
    sources: Sequence[CaptionedLatents],
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: UMT5EncoderModel,
    steps: int = 12_000,
    batch_sizes: Mapping[int, int] = BATCH_SIZES,
    known_decoder: WanTransformer3DModel | None = None,
) -> Recipe:
    """Build the recipe over sources of different lengths; lengths without a source are left out of the schedule.

    With `known_decoder` it goes on from that decoder, which knows shapes and colours.
    """
    torch.manual_seed(2)
    decoder = build_decoder(TINY)
    layout_start_step = LAYOUT_START_STEP
    if known_decoder is not None:
        decoder.load_state_dict(known_decoder.state_dict())
        layout_start_step = 0
    model = DecoderFoundation(decoder, text_encoder)
    source_by_length = {source.frame_count: source for source in sources}
    schedule = [frame_count for frame_count in LENGTH_SCHEDULE if frame_count in source_by_length]

    def get_batch_size(step: int) -> int:
        return batch_sizes[schedule[step % len(schedule)]]

    def compute_loss(step: int) -> Losses:
        source = source_by_length[schedule[step % len(schedule)]]
        latents, texts = source.sample_batch(step, get_batch_size(step))
        with torch.no_grad():
            text = encode_text(tokenizer, text_encoder, texts, TINY.text)[0]
        condition = pad_condition(
            text, current_rank().global_max(max(TINY.condition.min_tokens, text.shape[1])), MAX_TEXT_TOKENS
        )
        error = flow_matching_loss(
            decoder, latents.to(condition.device), condition, 0.5 if step >= layout_start_step else 0.0
        ).mean()
        return {"loss": error, source.name: error}

    return Recipe(
        "decoder",
        model,
        ("decoder",),
        single_micro_batch(compute_loss),
        steps=steps,
        lr=1e-2,
        adam_lr=1e-3,
        warmup=200,
        decay_from=0.7,
        ema_decay=0.999,
        batch_size=get_batch_size,
    )
