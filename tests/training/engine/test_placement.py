"""The device and precision of a stage's weights: the rule for GPUs, applied to the tiny preset on a CPU."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from omnivideo.models.weights import checkpoint
from omnivideo.models.weights.checkpoint import load, load_parts, save_library_model
from omnivideo.training.config import TrainingConfig
from omnivideo.training.data.latent_cache import FrozenEncoders, encode_shards
from omnivideo.training.data.webdataset import ShardDataset
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
def weights(weights, tmp_path_factory) -> Path:
    """Return a copy of the weights with a visual encoder."""
    folder = shutil.copytree(weights, tmp_path_factory.mktemp("weights") / "tiny")
    save_library_model(encoder(), folder / "visual_encoder", torch.float16)
    return folder


@pytest.fixture(scope="module")
def dataset(weights, tmp_path_factory) -> ShardDataset:
    """Return shards of every task with a full cache."""
    shards = library(tmp_path_factory.mktemp("shards"), SAMPLES)
    encode_shards(shards, FrozenEncoders.load(weights, "cpu"), FIT, lambda done, count: None)
    return shards


@pytest.fixture
def gpu_placements(monkeypatch) -> dict[str, WeightPlacement]:
    """Return the placements on a GPU that are requested, by parameter; the weights are placed on the CPU instead."""
    placements: dict[str, WeightPlacement] = {}

    def choose_gpu_placement(stage: str, name: str, device: torch.device, precision: torch.dtype) -> WeightPlacement:
        placements[name] = choose_placement(stage, name, GPU, BF16)
        return replace(placements[name], device=CPU)

    monkeypatch.setattr(placement, "choose_placement", choose_gpu_placement)
    return placements


def test_trained_weights_are_fp32_and_frozen_ones_bf16_on_a_gpu():
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


def test_every_stage_trains_with_the_precisions_of_a_gpu(dataset, weights, gpu_placements, tmp_path, monkeypatch):
    """Train one step of each stage, which starts from the run of the preceding stage."""
    null_prompts, build_condition = [], flow.build_condition
    monkeypatch.setattr(flow, "build_condition", lambda *args: null_prompts.append(args[5]) or build_condition(*args))
    previous: dict[str, torch.Tensor] = {}
    for name in PREVIOUS_STAGE:
        gpu_placements.clear()
        run = RunContext(TrainingConfig(recipe=name, runs=tmp_path, data="shards", weights=weights))
        recipe = replace(build_stage_recipe(dataset, FIT, run, build_mix()), precision=BF16)
        parts_on_cpu = {key.partition(".")[0] for key, place in gpu_placements.items() if place.device != GPU}
        assert parts_on_cpu == set(placement.CPU_PARTS)
        assert any(key.startswith("visual_encoder.") for key in gpu_placements) == (name in ALIGNED_STAGES)
        assert bool(recipe.ema_decay) == (name in FLOW_STAGES)
        parameters = dict(recipe.model.named_parameters())
        trained = {key for key in parameters if key.startswith(TRAINABLE_BY_STAGE[name])}
        assert {key for key, parameter in parameters.items() if parameter.dtype == FP32} == trained
        assert all(parameter.dtype in (FP32, BF16) for parameter in parameters.values())
        for key, value in previous.items():
            assert torch.equal(parameters[key], value.to(parameters[key].dtype)), key
        trainer = Trainer(recipe, tmp_path / name)
        trainer.run(stop_at_step=1)
        previous = {key: parameter.detach().clone() for key, parameter in trainer.trainable_parameters}
        previous |= trainer.ema_weights
    assert {embedding.dtype for embedding in null_prompts} == {FP32} and len(null_prompts) == 3
    assert set(PREVIOUS_STAGE) == set(TASKS_BY_STAGE)


def test_the_stage_loader_loads_the_stored_models_on_a_cpu(weights):
    loaded, stored = StageLoader("stage3", weights, CPU, FP32).load_omni(), load(weights)
    for module, expected in zip(loaded.modules, stored.modules, strict=True):
        pairs = zip(module.parameters(), expected.parameters(), strict=True)
        assert all(torch.equal(parameter, other) for parameter, other in pairs)
        assert not any(parameter.requires_grad for parameter in module.parameters()) and not module.training


def test_each_part_is_placed_before_the_next_is_read(weights, monkeypatch):
    steps, load_strict, load_qwen3_vl = [], checkpoint.load_strict, checkpoint.load_qwen3_vl

    def load_and_record(cls, folder, name, dtype):
        steps.append(f"read {name}")
        return load_strict(cls, folder, name, dtype)

    def load_mllm_and_record(folder, name, dtype):
        steps.append(f"read {name}")
        return load_qwen3_vl(folder, name, dtype)

    monkeypatch.setattr(checkpoint, "load_strict", load_and_record)
    monkeypatch.setattr(checkpoint, "load_qwen3_vl", load_mllm_and_record)
    load_parts(weights, lambda name, part: steps.append(f"place {name}") or part)
    assert steps == ["read transformer", "place decoder", "read mllm", "place mllm", "place bridge",
                     "read text_encoder", "place text_encoder", "read vae", "place vae"]  # fmt: skip


def test_parts_on_the_cpu_can_be_moved_to_the_others(weights):
    omni = StageLoader("stage3", weights, CPU, FP32).load_omni()
    omni.decoder.to("meta")
    move_cpu_parts_to_device(omni)
    assert omni.text_encoder.device == omni.vae.device == omni.device == torch.device("meta")
    assert omni.mllm.device == CPU
