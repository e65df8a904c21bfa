"""Small recipes of the tiny preset, and functions that read the losses of a run and count the FLOPs of a step."""

import copy
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import UMT5Config, UMT5EncoderModel

from omnivideo.contracts import TASKS
from omnivideo.presets import TINY
from omnivideo.synthetic.requests import sample_requests
from omnivideo.training.engine.recipe import Recipe, single_micro_batch
from omnivideo.training.tiny import (
    alignment_stages,
    decoder,
    flow_stages,
    mllm,
    text_encoder,
    vae,
    visual_encoder,
)
from omnivideo.training.tiny.feature_cache import PreparationConfig, load_cached_task
from tests.support.shards import make_visual_encoder

STEPS = 6
TEACHERS = ("SiglipVisionModel", "UMT5EncoderModel")  # their outputs are targets only


def make_vae_recipe(request):
    return vae.build_vae_recipe((vae.CropPhase(3, 2, 1, 32), vae.CropPhase(3, 1, 5, 32)))


def make_vae_decoder_recipe(request):
    torch.manual_seed(0)
    return vae.build_vae_decoder_recipe(AutoencoderKLWan(**TINY.vae), steps=STEPS, batch_size=1)


def make_text_recipe(request):
    return text_encoder.build_text_recipe(
        request.getfixturevalue("text_tokenizer"), steps=STEPS, caption_count=3, instruction_count=1
    )


def make_decoder_recipe(request, known_decoder=None):
    torch.manual_seed(0)
    folder = request.getfixturevalue("tmp_path_factory").getbasetemp() / "cache"
    model = AutoencoderKLWan(**TINY.vae).eval().requires_grad_(False)
    sources = [
        decoder.CaptionedLatents(folder, model, frame_count, 8, lambda done, count: None) for frame_count in (1, 9, 17)
    ]
    torch.manual_seed(1)
    encoder = UMT5EncoderModel(UMT5Config(**text_encoder.CONFIG))
    tokenizer = request.getfixturevalue("text_tokenizer")
    return decoder.build_decoder_recipe(
        sources, tokenizer, encoder, steps=STEPS, batch_sizes={1: 2, 9: 2, 17: 1}, known_decoder=known_decoder
    )


def make_mllm_recipe(request):
    return mllm.build_mllm_recipe(request.getfixturevalue("mllm_tokenizer"), steps=STEPS, batch_size=3)


def make_visual_encoder_recipe(request):
    return visual_encoder.build_visual_encoder_recipe(steps=STEPS, batch_size=2)


def copy_model(request):
    """Return a copy of the session's model, because stages train it in place."""
    return copy.deepcopy(request.getfixturevalue("omni"))


def load_task_data(request, omni):
    """Return four cached requests of every task, and of clips that continue another one."""
    folder = request.getfixturevalue("tmp_path_factory").getbasetemp() / "cache"
    return {
        task: load_cached_task(
            folder,
            omni,
            make_visual_encoder(),
            sample_requests(1, task, 4),
            PreparationConfig(),
        )
        for task in (*TASKS, "video-extension")
    }


def make_stage1_recipe(request):
    return alignment_stages.build_stage1_recipe(copy_model(request), make_visual_encoder(), steps=STEPS, batch_size=4)


def make_stage2a_recipe(request):
    return alignment_stages.build_stage2a_recipe(copy_model(request), steps=STEPS, batch_size=2)


def make_stage2b_recipe(request):
    omni = copy_model(request)
    return flow_stages.build_stage2b_recipe(omni, load_task_data(request, omni), steps=STEPS, batch_sizes=(2, 2))


def make_stage2b_generation_recipe(request):
    omni = copy_model(request)
    return flow_stages.build_stage2b_generation_recipe(
        omni, load_task_data(request, omni), steps=STEPS, batch_sizes=(2, 2)
    )


def make_stage3_recipe(request):
    omni = copy_model(request)
    return flow_stages.build_stage3_recipe(omni, load_task_data(request, omni), steps=STEPS, batch_sizes=(2, 2))


FOUNDATIONS = [
    make_vae_recipe,
    make_vae_decoder_recipe,
    make_text_recipe,
    make_decoder_recipe,
    make_mllm_recipe,
    make_visual_encoder_recipe,
]
STAGES = {
    make_stage1_recipe: {"mllm.lm_head", "bridge.vision_head"},
    make_stage2a_recipe: {"bridge.adapter"},
    make_stage2b_generation_recipe: {"bridge.adapter", "bridge.markers"},
    make_stage2b_recipe: {"bridge.adapter", "bridge.visual_context", "bridge.markers"},
    make_stage3_recipe: {"bridge.vision_head", "bridge.adapter", "bridge.visual_context", "bridge.markers", "decoder"},
}
RECIPES = [*FOUNDATIONS, *STAGES]


def read_losses(folder: Path) -> list[float]:
    """Return the losses that a run has logged in its folder."""
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def make_toy_recipe(trainable=("",)) -> Recipe:
    """Return a recipe that trains a small autoencoder."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))

    def loss(step):
        x = torch.randn(16, 4)
        return {"loss": (model(x) - x).square().mean()}

    return Recipe("toy", model, trainable, single_micro_batch(loss), steps=60, lr=2e-2, ema_decay=0.9)


def count_flops(recipe, step) -> int:
    """Return the FLOPs of a step by torch's counter, without those of the teachers.

    Fused attention is disabled, because the counter does not support it.
    """
    fastpath_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            recipe.compute_losses(step)["loss"].backward()
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath_enabled)
    flops = counter.get_flop_counts()
    return counter.get_total_flops() - sum(sum(flops[name].values()) for name in TEACHERS if name in flops)
