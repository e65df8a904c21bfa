"""Where a stage's weights lie and in which precision, by the rule that a GPU has, on a CPU at tiny size."""

from dataclasses import replace

import pytest
import torch

from omnivideo.models.weights import checkpoint
from omnivideo.models.weights.checkpoint import load, load_parts, save_library_model
from omnivideo.training.config import TrainingConfig
from omnivideo.training.data.latent_cache import FrozenEncoders, encode_shards
from omnivideo.training.engine import placement
from omnivideo.training.engine.placement import (
    CPU,
    StageLoader,
    WeightPlacement,
    choose_placement,
    move_cpu_parts_to_device,
)
from omnivideo.training.engine.run import RunContext
from omnivideo.training.engine.trainer import Trainer
from omnivideo.training.planning.config import ALIGNED_STAGES, FLOW_STAGES, TASKS_BY_STAGE
from omnivideo.training.recipes import flow
from omnivideo.training.recipes.over_shards import PREVIOUS_STAGE, build_mix, build_stage_recipe
from omnivideo.training.recipes.parts import TRAINABLE_BY_STAGE
from tests.support.shards import ASSIGNER as FIT
from tests.support.shards import SAMPLES
from tests.support.shards import make_visual_encoder as encoder
from tests.support.shards import write_dataset as library

GPU, BF16, FP32 = torch.device("cuda"), torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def made(weights, tmp_path_factory):
    save_library_model(encoder(), weights / "visual_encoder", torch.float16)
    there = library(tmp_path_factory.mktemp("shards"), SAMPLES)
    encode_shards(there, FrozenEncoders.load(weights, "cpu"), FIT, lambda done, count: None)
    return there


@pytest.fixture
def asked(monkeypatch) -> dict[str, WeightPlacement]:
    """The places that the rule gives on a GPU, which are then taken on the CPU."""
    found: dict[str, WeightPlacement] = {}

    def on_a_gpu(stage: str, name: str, device: torch.device, precision: torch.dtype) -> WeightPlacement:
        found[name] = choose_placement(stage, name, GPU, BF16)
        return replace(found[name], device=CPU)

    monkeypatch.setattr(placement, "choose_placement", on_a_gpu)
    return found


def test_what_is_trained_is_fp32_and_what_is_frozen_bf16_on_a_gpu():
    assert choose_placement("stage1", "mllm.lm_head.weight", GPU, BF16) == WeightPlacement(GPU, FP32)
    assert choose_placement("stage1", "mllm.model.norm.weight", GPU, BF16) == WeightPlacement(GPU, BF16)
    assert choose_placement("stage2b", "decoder.proj_out.weight", GPU, BF16) == WeightPlacement(GPU, BF16)
    assert choose_placement("stage3", "decoder.proj_out.weight", GPU, BF16) == WeightPlacement(GPU, FP32)
    assert choose_placement("stage3", "visual_encoder.head.probe", GPU, BF16) == WeightPlacement(GPU, BF16)
    assert choose_placement("stage3", "text_encoder.shared.weight", GPU, BF16) == WeightPlacement(CPU, BF16)
    assert choose_placement("stage3", "vae.quant_conv.weight", GPU, BF16) == WeightPlacement(CPU, FP32)
    assert choose_placement("stage3", "text_encoder.shared.weight", GPU, BF16, cached=False) == WeightPlacement(
        GPU, BF16
    )
    assert choose_placement("stage3", "vae.quant_conv.weight", GPU, BF16, cached=False) == WeightPlacement(GPU, FP32)
    assert choose_placement("stage3", "mllm.model.norm.weight", GPU, FP32) == WeightPlacement(GPU, FP32)
    assert choose_placement("stage3", "mllm.model.norm.weight", CPU, BF16) == WeightPlacement(CPU, FP32)


def test_every_stage_trains_with_its_parts_in_their_places(made, weights, asked, tmp_path, monkeypatch):
    """A step of each in a GPU's precisions, every one from the run of the one before."""
    nulls, condition = [], flow.build_condition
    monkeypatch.setattr(flow, "build_condition", lambda *given: nulls.append(given[5]) or condition(*given))
    before: dict[str, torch.Tensor] = {}
    for name in PREVIOUS_STAGE:
        asked.clear()
        run = RunContext(TrainingConfig(recipe=name, runs=tmp_path, data="shards", weights=weights))
        recipe = replace(build_stage_recipe(made, FIT, run, build_mix()), precision=BF16)
        assert {part.partition(".")[0] for part, place in asked.items() if place.device != GPU} == set(
            placement.CPU_PARTS
        )
        assert any(part.startswith("visual_encoder.") for part in asked) == (name in ALIGNED_STAGES)
        assert bool(recipe.ema_decay) == (name in FLOW_STAGES)
        held = dict(recipe.model.named_parameters())
        assert {key for key, one in held.items() if one.dtype == FP32} == {
            k for k in held if k.startswith(TRAINABLE_BY_STAGE[name])
        }
        assert all(one.dtype in (FP32, BF16) for one in held.values())
        for key, value in before.items():
            assert torch.equal(held[key], value.to(held[key].dtype)), key
        trainer = Trainer(recipe, tmp_path / name)
        trainer.run(stop_at_step=1)
        before = {key: one.detach().clone() for key, one in trainer.trainable_parameters} | trainer.ema_weights
    assert {one.dtype for one in nulls} == {FP32} and len(nulls) == 3
    assert set(PREVIOUS_STAGE) == set(TASKS_BY_STAGE)


def test_on_a_cpu_the_models_are_those_of_the_weights(weights):
    made, there = StageLoader("stage3", weights, CPU, FP32).load_omni(), load(weights)
    for mine, its in zip(made.modules, there.modules, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(mine.parameters(), its.parameters(), strict=True))
        assert not any(one.requires_grad for one in mine.parameters()) and not mine.training


def test_a_part_is_in_its_place_before_the_next_is_read(weights, monkeypatch):
    steps, read = [], checkpoint.load_strict

    def reading(cls, folder, name, dtype):
        steps.append(f"read {name}")
        return read(cls, folder, name, dtype)

    monkeypatch.setattr(checkpoint, "load_strict", reading)
    load_parts(weights, lambda name, part: steps.append(f"put {name}") or part)
    assert steps == ["read transformer", "put decoder", "read mllm", "put mllm", "put bridge", "read text_encoder",
                     "put text_encoder", "read vae", "put vae"]  # fmt: skip


def test_what_stays_on_the_cpu_can_be_brought_to_the_rest(weights):
    omni = StageLoader("stage3", weights, CPU, FP32).load_omni()
    omni.decoder.to("meta")
    move_cpu_parts_to_device(omni)
    assert omni.text_encoder.device == omni.vae.device == omni.device == torch.device("meta")
    assert omni.mllm.device == CPU
