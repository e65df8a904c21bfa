"""Small recipes of every kind, and functions that read the losses and FLOPs of a run."""

import copy
import json

import torch
from diffusers import AutoencoderKLWan
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import SiglipVisionConfig, SiglipVisionModel, UMT5Config, UMT5EncoderModel

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

STEPS = 6


TEACHERS = ("SiglipVisionModel", "UMT5EncoderModel")  # their results are targets


def vae_recipe(request):
    return vae.build_vae_recipe((vae.CropPhase(3, 2, 1, 32), vae.CropPhase(3, 1, 5, 32)))


def vae_decoder_recipe(request):
    torch.manual_seed(0)
    return vae.build_vae_decoder_recipe(AutoencoderKLWan(**TINY.vae), steps=STEPS, batch_size=1)


def text_recipe(request):
    return text_encoder.build_text_recipe(
        request.getfixturevalue("text_tokenizer"), steps=STEPS, caption_count=3, instruction_count=1
    )


def decoder_recipe(request):
    torch.manual_seed(0)
    folder = request.getfixturevalue("tmp_path_factory").getbasetemp() / "cache"
    model = AutoencoderKLWan(**TINY.vae).eval().requires_grad_(False)
    stills, clips = (
        decoder.CaptionedLatents(folder, model, video, 8, lambda done, count: None) for video in (False, True)
    )
    torch.manual_seed(1)
    encoder = UMT5EncoderModel(UMT5Config(**text_encoder.CONFIG))
    tokenizer = request.getfixturevalue("text_tokenizer")
    return decoder.build_decoder_recipe(stills, clips, tokenizer, encoder, steps=STEPS, batch_sizes=(2, 2))


def mllm_recipe(request):
    return mllm.build_mllm_recipe(request.getfixturevalue("mllm_tokenizer"), steps=STEPS, batch_size=3)


def visual_encoder_recipe(request):
    return visual_encoder.build_visual_encoder_recipe(steps=STEPS, batch_size=2)


def fresh(request):
    """The session's model, copied: stages train it in place."""
    return copy.deepcopy(request.getfixturevalue("omni"))


def encoder():
    torch.manual_seed(2)
    return SiglipVisionModel(SiglipVisionConfig(**visual_encoder.CONFIG)).eval().requires_grad_(False)


def data(request, omni):
    folder = request.getfixturevalue("tmp_path_factory").getbasetemp() / "cache"
    return {
        task: load_cached_task(
            folder, omni, encoder(), sample_requests(1, task, 4), PreparationConfig(lambda done, count: None)
        )
        for task in TASKS
    }


def stage1_recipe(request):
    return alignment_stages.build_stage1_recipe(fresh(request), encoder(), steps=STEPS, batch_size=4)


def stage2a_recipe(request):
    return alignment_stages.build_stage2a_recipe(fresh(request), steps=STEPS, batch_size=2)


def stage2b_recipe(request):
    omni = fresh(request)
    return flow_stages.build_stage2b_recipe(omni, data(request, omni), steps=STEPS, batch_sizes=(2, 2))


def stage2b_generation_recipe(request):
    omni = fresh(request)
    return flow_stages.build_stage2b_generation_recipe(omni, data(request, omni), steps=STEPS, batch_sizes=(2, 2))


def stage3_recipe(request):
    omni = fresh(request)
    return flow_stages.build_stage3_recipe(omni, data(request, omni), steps=STEPS, batch_sizes=(2, 2))


FOUNDATIONS = [vae_recipe, vae_decoder_recipe, text_recipe, decoder_recipe, mllm_recipe, visual_encoder_recipe]


STAGES = {
    stage1_recipe: {"mllm.lm_head", "bridge.vision_head"},
    stage2a_recipe: {"bridge.adapter"},
    stage2b_generation_recipe: {"bridge.adapter", "bridge.markers"},
    stage2b_recipe: {"bridge.adapter", "bridge.visual_context", "bridge.markers"},
    stage3_recipe: {"bridge.vision_head", "bridge.adapter", "bridge.visual_context", "bridge.markers", "decoder"},
}


RECIPES = [*FOUNDATIONS, *STAGES]


def logged(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def toy(trainable=("",)) -> Recipe:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))

    def loss(step):
        x = torch.randn(16, 4)
        return {"loss": (model(x) - x).square().mean()}

    return Recipe("toy", model, trainable, single_micro_batch(loss), steps=60, lr=2e-2, ema_decay=0.9)


def operations(recipe, step) -> int:
    """What torch counts of a step but for the teachers, in the forms that it knows."""
    quick = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            recipe.compute_losses(step)["loss"].backward()
    finally:
        torch.backends.mha.set_fastpath_enabled(quick)
    parts = counter.get_flop_counts()
    return counter.get_total_flops() - sum(sum(parts[name].values()) for name in TEACHERS if name in parts)
