"""Where a stage's weights lie and in which precision, by the rule that a GPU has, on a CPU at tiny size."""

from dataclasses import replace

import pytest
import torch

from omnivideo.models import checkpoint
from omnivideo.models.checkpoint import load, load_parts, save_library_model
from omnivideo.training import loading
from omnivideo.training.data.encode import Frozen, encode_all
from omnivideo.training.loading import CPU, Loader, Place, bring, place_of
from omnivideo.training.plan import ALIGNED, AVERAGED, TASKS_OF
from omnivideo.training.real import EARLIER, mix_of, recipe_over
from omnivideo.training.recipes import stages
from omnivideo.training.recipes.stages import TRAINED
from omnivideo.training.tiny import Tiny
from omnivideo.training.trainer import Trainer
from tests.unit.test_encode import FIT, library
from tests.unit.test_rows import SAMPLES, encoder

GPU, BF16, FP32 = torch.device("cuda"), torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def made(weights, tmp_path_factory):
    save_library_model(encoder(), weights / "visual_encoder", torch.float16)
    there = library(tmp_path_factory.mktemp("shards"), SAMPLES)
    encode_all(there, Frozen.load(weights, "cpu"), FIT, lambda done, count: None)
    return there


@pytest.fixture
def asked(monkeypatch) -> dict[str, Place]:
    """The places that the rule gives on a GPU, which are then taken on the CPU."""
    found: dict[str, Place] = {}

    def on_a_gpu(stage: str, name: str, device: torch.device, precision: torch.dtype) -> Place:
        found[name] = place_of(stage, name, GPU, BF16)
        return replace(found[name], device=CPU)

    monkeypatch.setattr(loading, "place_of", on_a_gpu)
    return found


def test_what_is_trained_is_fp32_and_what_is_frozen_bf16_on_a_gpu():
    assert place_of("stage1", "mllm.lm_head.weight", GPU, BF16) == Place(GPU, FP32)
    assert place_of("stage1", "mllm.model.norm.weight", GPU, BF16) == Place(GPU, BF16)
    assert place_of("stage2b", "decoder.proj_out.weight", GPU, BF16) == Place(GPU, BF16)
    assert place_of("stage3", "decoder.proj_out.weight", GPU, BF16) == Place(GPU, FP32)
    assert place_of("stage3", "visual_encoder.head.probe", GPU, BF16) == Place(GPU, BF16)
    assert place_of("stage3", "text_encoder.shared.weight", GPU, BF16) == Place(CPU, BF16)
    assert place_of("stage3", "vae.quant_conv.weight", GPU, BF16) == Place(CPU, FP32)
    assert place_of("stage3", "text_encoder.shared.weight", GPU, BF16, cached=False) == Place(GPU, BF16)
    assert place_of("stage3", "vae.quant_conv.weight", GPU, BF16, cached=False) == Place(GPU, FP32)
    assert place_of("stage3", "mllm.model.norm.weight", GPU, FP32) == Place(GPU, FP32)
    assert place_of("stage3", "mllm.model.norm.weight", CPU, BF16) == Place(CPU, FP32)


def test_every_stage_trains_with_its_parts_in_their_places(made, weights, asked, tmp_path, monkeypatch):
    """A step of each in a GPU's precisions, every one from the run of the one before."""
    nulls, condition = [], stages.group_condition
    monkeypatch.setattr(stages, "group_condition", lambda *given: nulls.append(given[5]) or condition(*given))
    before: dict[str, torch.Tensor] = {}
    for name in EARLIER:
        asked.clear()
        tiny = Tiny(tmp_path, weights=weights)
        recipe = replace(recipe_over(made, FIT, name, tiny, weights, mix_of()), precision=BF16)
        assert {part.partition(".")[0] for part, place in asked.items() if place.device != GPU} == set(loading.KEPT)
        assert any(part.startswith("visual_encoder.") for part in asked) == (name in ALIGNED)
        assert bool(recipe.ema) == (name in AVERAGED)
        held = dict(recipe.model.named_parameters())
        assert {key for key, one in held.items() if one.dtype == FP32} == {
            k for k in held if k.startswith(TRAINED[name])
        }
        assert all(one.dtype in (FP32, BF16) for one in held.values())
        for key, value in before.items():
            assert torch.equal(held[key], value.to(held[key].dtype)), key
        trainer = Trainer(recipe, tmp_path / name)
        trainer.run(until=1)
        before = {key: one.detach().clone() for key, one in trainer.named} | trainer.average
    assert {one.dtype for one in nulls} == {FP32} and len(nulls) == 3
    assert set(EARLIER) == set(TASKS_OF)


def test_on_a_cpu_the_models_are_those_of_the_weights(weights):
    made, there = Loader("stage3", weights, CPU, FP32).omni(), load(weights)
    for mine, its in zip(made.parts, there.parts, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(mine.parameters(), its.parameters(), strict=True))
        assert not any(one.requires_grad for one in mine.parameters()) and not mine.training


def test_a_part_is_in_its_place_before_the_next_is_read(weights, monkeypatch):
    steps, read = [], checkpoint.strictly

    def reading(cls, folder, name, dtype):
        steps.append(f"read {name}")
        return read(cls, folder, name, dtype)

    monkeypatch.setattr(checkpoint, "strictly", reading)
    load_parts(weights, lambda name, part: steps.append(f"put {name}") or part)
    assert steps == ["read transformer", "put decoder", "read mllm", "put mllm", "put bridge", "read text_encoder",
                     "put text_encoder", "read vae", "put vae"]  # fmt: skip


def test_what_stays_on_the_cpu_can_be_brought_to_the_rest(weights):
    omni = Loader("stage3", weights, CPU, FP32).omni()
    omni.decoder.to("meta")
    bring(omni)
    assert omni.text_encoder.device == omni.vae.device == omni.device == torch.device("meta")
    assert omni.mllm.device == CPU
