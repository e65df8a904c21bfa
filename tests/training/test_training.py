"""Every recipe trains, saves, and resumes in a new process's state to the same losses."""

import copy
import json
import math
import random
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import SiglipVisionConfig, SiglipVisionModel, UMT5Config, UMT5EncoderModel

from omnivideo.contracts import TASKS
from omnivideo.errors import CheckpointError, TrainingDiverged
from omnivideo.models.mllm import VISUAL_TOKENS
from omnivideo.models.weights import checkpoint
from omnivideo.presets import TINY
from omnivideo.synthetic.captions import RELATIONS, Caption
from omnivideo.synthetic.facts import ObjectSpec, SceneSpec
from omnivideo.synthetic.requests import sample_requests
from omnivideo.synthetic.scenes import BACKGROUNDS, COLOURS
from omnivideo.training.config import TrainingConfig
from omnivideo.training.data.batch import collate_flow_batch, sample_mixed_batch
from omnivideo.training.engine.optim import build_optimizers, orthogonalise, trapezoidal_lr_scale
from omnivideo.training.engine.plots import plot_losses, read_curves
from omnivideo.training.engine.recipe import Recipe, single_micro_batch
from omnivideo.training.engine.run import RunContext
from omnivideo.training.engine.trainer import Trainer, freeze_except
from omnivideo.training.recipes import stage1
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
from omnivideo.training.tiny.model_card import build_model_card
from omnivideo.training.tiny.pipeline import TinyPipeline

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


@pytest.mark.parametrize("make", RECIPES, ids=lambda make: make.__name__)
def test_resume_gives_the_same_losses(make, request, tmp_path):
    Trainer(make(request), tmp_path / "whole").run()
    Trainer(make(request), tmp_path / "cut").run(stop_at_step=2)
    resumed = Trainer(make(request), tmp_path / "cut")
    assert resumed.step == 2
    resumed.run()
    assert logged(tmp_path / "cut") == pytest.approx(logged(tmp_path / "whole"), abs=1e-6)
    assert len(logged(tmp_path / "whole")) == STEPS


@pytest.mark.parametrize("make", STAGES, ids=lambda make: make.__name__)
def test_each_stage_trains_what_the_paper_says(make, request, tmp_path):
    """By name, and in fact: every named part moves and nothing else does."""
    recipe = make(request)
    before = {key: value.clone() for key, value in recipe.model.state_dict().items()}
    trainer = Trainer(recipe, tmp_path)
    trainer.run()
    # The first sub-stage has no sources, so the visual context, though trainable, stays as it is.
    trainable = STAGES[make] | ({"bridge.visual_context"} if make is stage2b_generation_recipe else set())
    expected = {key for key in before if any(key.startswith(f"{part}.") for part in trainable)}
    assert {name for name, _ in trainer.trainable_parameters} == expected
    moved = {key for key, value in recipe.model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved <= expected
    for part in STAGES[make]:
        assert any(key.startswith(f"{part}.") for key in moved), part


def test_products_in_half_precision_give_about_the_same_losses(request, tmp_path):
    losses = {}
    for precision in (torch.float32, torch.bfloat16):
        recipe = replace(stage3_recipe(request), precision=precision)
        losses[precision] = Trainer(recipe, tmp_path / str(precision)).train_step()["loss"]
        assert all(parameter.dtype == torch.float32 for parameter in recipe.model.parameters())
    assert losses[torch.bfloat16] != losses[torch.float32]
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.02)


def test_a_vae_whose_decoder_goes_on_encodes_as_before(request, tmp_path):
    recipe = vae_decoder_recipe(request)
    before = {key: value.clone() for key, value in recipe.model.state_dict().items()}
    Trainer(recipe, tmp_path).run(stop_at_step=2)
    moved = {
        key.split(".")[0] for key, value in recipe.model.state_dict().items() if not torch.equal(value, before[key])
    }
    assert moved == {"decoder", "post_quant_conv"}


def test_mixed_batches_share_size_and_hold_several_tasks(request):
    rows = collate_flow_batch(
        sample_mixed_batch(random.Random(0), list(data(request, fresh(request)).values())[1::2], 16)
    )
    assert rows.target_latents.shape == (16, 16, 3, 8, 8)
    assert set(rows.has_source.tolist()) == {True, False}
    assert rows.source_latents is not None and len(rows.source_latents) == rows.has_source.sum()


def test_more_requests_of_a_task_follow_the_others(request):
    first = data(request, fresh(request))["video-editing"]
    both = first + first
    assert len(both) == 8
    for name in ("target_latents", "source_latents", "hidden_states", "text_embeddings", "visual_embeddings"):
        whole, part = getattr(both, name), getattr(first, name)
        assert all(torch.equal(whole[at], part[at % 4]) for at in range(8)), name


def toy(trainable=("",)) -> Recipe:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))

    def loss(step):
        x = torch.randn(16, 4)
        return {"loss": (model(x) - x).square().mean()}

    return Recipe("toy", model, trainable, single_micro_batch(loss), steps=60, lr=2e-2, ema_decay=0.9)


def test_only_what_is_named_is_trained(tmp_path):
    recipe = toy(("1.",))
    before = {key: value.clone() for key, value in recipe.model.state_dict().items()}
    Trainer(recipe, tmp_path).run()
    after = recipe.model.state_dict()
    assert all(torch.equal(before[key], after[key]) == key.startswith("0.") for key in before)
    with pytest.raises(AssertionError, match="nothing"):
        freeze_except(recipe.model, ("nothing",))


def test_training_learns_and_draws_its_losses(tmp_path):
    Trainer(toy(), tmp_path).run()
    steps, values = read_curves(tmp_path / "log.jsonl")["loss"]
    assert len(steps) == 60 and values[-10:].mean() < 0.5 * values[:10].mean()
    plot_losses(tmp_path / "log.jsonl", tmp_path / "loss.png", "toy")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path):
    Trainer(toy(), tmp_path).run(stop_at_step=1)
    with pytest.raises(CheckpointError, match="different parameters"):
        Trainer(toy(("1.",)), tmp_path)


def test_a_log_cut_in_mid_line_is_mended_on_resume(tmp_path):
    Trainer(toy(), tmp_path).run(stop_at_step=5)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 1.0}\n{"step": 7, "lo')
    Trainer(toy(), tmp_path).run(stop_at_step=8)
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == list(range(1, 9))


class Steep(torch.autograd.Function):
    """Finite, with a gradient that is not."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.inf


@pytest.mark.parametrize(
    ("spoiled", "what"), [(lambda value: value * math.nan, "loss: nan"), (Steep.apply, "gradient's norm: ")]
)
def test_what_is_not_finite_ends_the_run_and_leaves_the_checkpoint(spoiled, what, tmp_path):
    Trainer(toy(), tmp_path).run(stop_at_step=2)
    recipe = toy()
    micro_batch_losses = single_micro_batch(lambda step: {"loss": spoiled(recipe.compute_losses(step)["loss"])})
    with pytest.raises(TrainingDiverged, match=f"{what}.* at step 3"):
        Trainer(replace(recipe, micro_batch_losses=micro_batch_losses), tmp_path).run(save_every_seconds=0)
    again = Trainer(toy(), tmp_path)
    assert again.step == 2 and all(weight.isfinite().all() for weight in again.weights.values())


def test_muon_orthogonalises():
    torch.manual_seed(0)
    for shape in ((3, 24, 48), (2, 48, 24)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape), torch.float32))
        assert values.min() > 0.6 and values.max() < 1.3


def test_tables_are_left_to_adam():
    model = torch.nn.ModuleDict({"embed_tokens": torch.nn.Embedding(5, 4), "proj": torch.nn.Linear(4, 4)})
    muon, adam = build_optimizers(model.named_parameters(), 1e-2, 1e-3)
    assert [p.shape for p in muon.param_groups[0]["params"]] == [(4, 4)]
    assert len(adam.param_groups[0]["params"]) == 2


def test_the_rate_rises_stays_and_falls_to_nothing():
    shares = [trapezoidal_lr_scale(step, 100, warmup=10, decay_from=0.6) for step in range(101)]
    assert shares[0] == pytest.approx(0.1) and shares[30] == 1 and shares[100] == 0
    assert shares[60:] == sorted(shares[60:], reverse=True)


def run_in(folder, **options) -> RunContext:
    return RunContext(TrainingConfig(recipe="tiny", runs=folder, **options))


def test_the_shipped_weights_stand_in_for_runs_that_are_not_at_hand(omni, weights, tmp_path):
    tiny = TinyPipeline(run_in(tmp_path / "runs"), shipped_weights=weights)
    shipped = tiny.load_vae().state_dict()
    assert all(torch.allclose(value.half().float(), shipped[key]) for key, value in omni.vae.state_dict().items())
    foundation = tiny.load_foundation()
    x = torch.zeros(1, 16, 1, 8, 8)
    with torch.no_grad():
        out = [one(x, torch.tensor([500.0]), torch.zeros(1, 8, 192), return_dict=False)[0]
               for one in (foundation.decoder, omni.decoder)]  # fmt: skip
    assert torch.allclose(*out, atol=1e-2)
    with pytest.raises(CheckpointError, match="omnivideo train mllm"):
        tiny.load_omni("mllm")


def test_foundations_are_exported_in_the_shipped_layout(weights, tmp_path):
    first = TinyPipeline(run_in(tmp_path / "runs"), shipped_weights=weights)
    first.export_foundations(tmp_path / "out")
    again = TinyPipeline(run_in(tmp_path / "runs"), shipped_weights=tmp_path / "out")
    for one, two in ((first.load_vae(), again.load_vae()), (first.load_text_encoder(), again.load_text_encoder())):
        assert all(torch.equal(value, two.state_dict()[key]) for key, value in one.state_dict().items())


def test_every_token_is_told_about_the_object_whose_phrase_it_is_in(text_tokenizer):
    things = (ObjectSpec("circle", "red", "small"), ObjectSpec("square", "blue"))
    words = "a small red circle left of a blue square on black"
    said = Caption(words, SceneSpec(things, background="black", relation="left of"), ((0, 18), (27, 40)))
    offsets = text_tokenizer(words, return_offsets_mapping=True).offset_mapping
    told = text_encoder.label_caption_tokens(said, offsets)
    colour, role, background = 1, 4, len(text_encoder.OBJECT_LABEL_SIZES)
    for (start, end), labels in zip(offsets, told, strict=True):
        inside = next((at for at, span in enumerate(said.object_spans) if span[0] <= start < end <= span[1]), None)
        red_blue = [2 + list(COLOURS).index(thing.colour) for thing in things]
        assert labels[colour] == (text_encoder.IGNORE_INDEX if inside is None else red_blue[inside])
        assert labels[role] == (
            text_encoder.IGNORE_INDEX if inside is None else 1 + RELATIONS.index(("left of", "right of")[inside])
        )
        assert labels[background] == 1 + list(BACKGROUNDS).index("black")


def test_the_card_says_what_ran_and_what_came_of_it(tmp_path):
    (tmp_path / "vae").mkdir()
    torch.save({"step": 1200, "seconds": 5400.0}, tmp_path / "vae" / "state.pt")
    lines = [{"step": at, "loss": 0.5, "kl": 2.0} for at in range(1, 201)]
    (tmp_path / "vae" / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    made = build_model_card(
        tmp_path, ("vae", "text"), "abc123", "x86_64", {"single": {"mean": 0.98, "count": 50}, "dB": 27.5}
    )
    assert "| `vae` | 1,200 | 1.5 | loss 0.5, kl 2 |" in made and "`text`" not in made
    later = build_model_card(
        tmp_path, ("vae", "text"), "abc123", "x86_64", {}, "| `text` | 7 | 0.1 | loss 1 |\n| `vae` | 1 | 0 | |"
    )
    assert "| `vae` | 1,200 |" in later and "| `text` | 7 | 0.1 | loss 1 |" in later
    assert "| single | 0.980 | 50 |" in made and "| dB | 27.500 |  |" in made and "abc123" in made


def test_batches_made_ahead_are_those_of_one_process(mllm_tokenizer):
    one, several = (
        mllm.build_mllm_recipe(mllm_tokenizer, steps=4, batch_size=2, workers=workers) for workers in (0, 2)
    )
    losses = [float(one.compute_losses(step)["loss"].detach()) for step in (1, 2, 5)]
    assert [float(several.compute_losses(step)["loss"].detach()) for step in (1, 2, 5)] == losses


def test_text_is_learned_as_it_is_said(mllm_tokenizer):
    """A visual token that would come up in a text costs nothing, and none is asked for there."""
    routes = torch.tensor(mllm_tokenizer.convert_tokens_to_ids(list(VISUAL_TOKENS)))
    labels = torch.tensor([[-100, 5, int(routes[0])]])
    logits = torch.zeros(1, 3, len(mllm_tokenizer))
    expected, _ = stage1.text_only_loss(logits, labels, routes)
    logits[:, :, routes] = 9.0
    value, _ = stage1.text_only_loss(logits, labels, routes)
    assert value == expected == pytest.approx(math.log(len(mllm_tokenizer) - len(routes)), abs=1e-4)


def test_training_goes_on_from_a_folder_of_weights(weights, tmp_path):
    there, tiny = checkpoint.load(weights), TinyPipeline(run_in(tmp_path, weights=weights))
    begun = tiny.load_omni("stage2b")
    for name in ("mllm", "bridge", "decoder", "text_encoder", "vae"):
        expected = getattr(there, name).state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in getattr(begun, name).state_dict().items()), name
    assert torch.equal(tiny.build_mllm_recipe().model.lm_head.weight, there.mllm.lm_head.weight)
    with pytest.raises(CheckpointError, match="mllm has not been trained"):
        TinyPipeline(run_in(tmp_path), shipped_weights=weights).load_omni("stage2b")


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


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("make", [stage1_recipe, stage2a_recipe, stage2b_recipe, stage3_recipe])
def test_a_steps_operations_are_those_that_torch_counts(make, step, request, tmp_path):
    """Backwards some frozen first layers have less to do, and of causal attention half is counted."""
    recipe = make(request)
    Trainer(recipe, tmp_path)
    near = 0.005 if make is stage3_recipe else 0.03
    counted = operations(recipe, step)
    assert recipe.step_flops(step) == pytest.approx(counted, rel=near)
