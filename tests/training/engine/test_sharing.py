"""Batches, owners, shards and throughput of several processes, tested in one process."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from omnivideo.errors import CheckpointError, InvalidInput
from omnivideo.models.parallel.ulysses import take_local_part
from omnivideo.training.engine import checkpoint
from omnivideo.training.engine.data_parallel import DataParallelRank, current_rank, use_rank
from omnivideo.training.engine.distributed.launcher import wait_for_processes
from omnivideo.training.engine.distributed.processes import check_process_counts
from omnivideo.training.engine.distributed.sharded_muon import assign_owners, group_into_buckets
from omnivideo.training.engine.distributed.zero import build_deepspeed_config
from omnivideo.training.engine.monitor import (
    build_writer_factory,
    format_progress_line,
    measure_throughput,
)
from omnivideo.training.engine.optim import cosine_lr_scale, group_names_by_optimizer
from omnivideo.training.engine.recipe import Recipe, single_micro_batch
from omnivideo.training.engine.trainer import Trainer, TrainingProgress
from omnivideo.training.planning.gpus import find_peak_flops


class SecondRank(DataParallelRank):
    rank, world_size = 1, 2


def build_toy_recipe(**changes: Any) -> Recipe:
    """Return a recipe that trains a small autoencoder."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))

    def loss(step):
        x = torch.randn(16, 4)
        return {"loss": (model(x) - x).square().mean()}

    return Recipe("toy", model, ("",), single_micro_batch(loss), steps=20, **changes)


def test_ranks_take_rows_in_order_and_refuse_uneven_batches():
    assert current_rank().take_local_rows([1, 2, 3]) == [1, 2, 3]
    with use_rank(SecondRank()):
        assert current_rank().take_local_rows([1, 2, 3, 4]) == [3, 4]
        assert current_rank().take_local_rows(torch.arange(6)).tolist() == [3, 4, 5]
        with pytest.raises(InvalidInput, match="processes: a batch of 3 samples does not divide by 2"):
            current_rank().take_local_rows([1, 2, 3])
    assert current_rank().world_size == 1


def test_sequence_parallelism_must_divide_the_processes():
    check_process_counts(8, 4)
    for processes, sequence_parallel_size in ((2, 3), (2, 4), (3, 2), (2, 0)):
        with pytest.raises(InvalidInput, match="sequence"):
            check_process_counts(processes, sequence_parallel_size)


def test_sequence_parts_are_equal_and_padded():
    full = torch.arange(10.0).view(1, 5, 2)
    parts = [take_local_part(full, rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat(parts, 1)[:, :5], full) and parts[1][0, 2].tolist() == [0, 0]
    assert take_local_part(full, 3, 4).shape == (1, 2, 2) and not take_local_part(full, 3, 4).any()


def test_owners_are_balanced_and_buckets_hold_all_parameters():
    sizes = (90, 50, 40, 30, 10)
    parameters = [(f"w{index}", torch.nn.Parameter(torch.zeros(size))) for index, size in enumerate(sizes)]
    owner_ranks = assign_owners(parameters, 2)
    loads = [sum(weight.numel() for name, weight in parameters if owner_ranks[name] == rank) for rank in range(2)]
    assert sorted(loads) == [100, 120]
    buckets = group_into_buckets(parameters, owner_ranks)
    assert sorted(name for _, bucket in buckets for name, _ in bucket) == sorted(owner_ranks)


def test_adamw_updates_parameters_that_a_batch_does_not_use(tmp_path):
    """ZeRO cannot skip a parameter among flattened weights, so AdamW in one process does not skip it either."""
    recipe = build_toy_recipe(optimizer="adamw", weight_decay=0.1)
    recipe.model.spare = torch.nn.Linear(2, 2)
    recipe.model.forward = recipe.model[:2].forward
    weight, bias = (parameter.detach().clone() for parameter in recipe.model.spare.parameters())
    trainer = Trainer(recipe, tmp_path)
    trainer.train_step()
    decay = 1 - 0.1 * recipe.adam_lr * recipe.lr_scale(0)
    assert torch.allclose(recipe.model.spare.weight, weight * decay, rtol=1e-6)
    assert torch.equal(recipe.model.spare.bias, bias)
    assert group_names_by_optimizer(trainer.trainable_parameters, "adamw") == [
        ["0.weight", "1.weight", "spare.weight", "0.bias", "1.bias", "spare.bias"]
    ]


def test_the_cosine_schedule_warms_up_and_falls_to_zero():
    scales = [cosine_lr_scale(step, 100, 10) for step in range(101)]
    assert scales[0] == pytest.approx(0.1) and max(scales) == scales[9] == scales[10] == 1
    assert scales[55] == pytest.approx(0.5) and scales[100] == pytest.approx(0, abs=1e-9)
    assert scales[10:] == sorted(scales[10:], reverse=True)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("cuts", [(0, 13, 32), (0, 32)])
def test_a_run_resumes_from_shards_with_the_same_losses(optimizer, cuts, tmp_path):
    """The shards are cut from the state of one process, as two or three processes would hold it."""
    reference = Trainer(build_toy_recipe(optimizer=optimizer, ema_decay=0.9), tmp_path / "reference")
    losses = [reference.train_step() for _ in range(4)]
    trainer = Trainer(build_toy_recipe(optimizer=optimizer, ema_decay=0.9), tmp_path / "sharded")
    assert [trainer.train_step() for _ in range(2)] == losses[:2]
    names = group_names_by_optimizer(trainer.trainable_parameters, optimizer)
    trainer.save()
    saved = checkpoint.find_latest_checkpoint(tmp_path / "sharded", names)
    bounds = [*cuts, 1000]
    checkpoint.create_partial_folder(tmp_path / "sharded", 2)
    for rank, (start, stop) in enumerate(pairwise(bounds)):
        shards = [
            cut_shard(saved, name, start, min(stop, parameter.numel()))
            for name, parameter in trainer.trainable_parameters
            if start < parameter.numel()
        ]
        metadata = {"names": saved.parameter_names, "seconds": 1.0}
        checkpoint.write_shard(tmp_path / "sharded", 2, rank, len(bounds) - 1, metadata, iter(shards))
    trainer.state_file.unlink()
    assert checkpoint.find_latest_checkpoint(tmp_path / "sharded", names) is None  # not yet committed
    checkpoint.commit_shards(tmp_path / "sharded", 2)
    resumed = Trainer(build_toy_recipe(optimizer=optimizer, ema_decay=0.9), tmp_path / "sharded")
    assert resumed.step == 2 and [resumed.train_step() for _ in range(2)] == losses[2:]
    assert all(torch.equal(value, reference.ema_weights[name]) for name, value in resumed.ema_weights.items())


def cut_shard(saved: checkpoint.Checkpoint, name: str, start: int, stop: int) -> checkpoint.ParameterShard:
    """Return a range of a parameter's tensors from a checkpoint."""
    tensors = {
        kind: saved.read_tensor(name, kind, start, stop)
        for kind in saved.list_optimizer_tensors(name) | {"weight", "average"}
    }
    return checkpoint.ParameterShard(name, start, tensors, saved.read_optimizer_steps(name))


def test_a_missing_shard_is_reported(tmp_path):
    checkpoint.create_partial_folder(tmp_path, 7)
    checkpoint.write_shard(tmp_path, 7, 0, 2, {"names": [], "seconds": 0.0}, iter(()))
    checkpoint.commit_shards(tmp_path, 7)
    with pytest.raises(CheckpointError, match="step 7 are not complete: 1 file"):
        checkpoint.find_latest_checkpoint(tmp_path, [])


def test_deepspeed_is_configured_from_the_recipe():
    config = build_deepspeed_config(build_toy_recipe(max_grad_norm=0.5, precision=torch.bfloat16))
    assert config["gradient_clipping"] == 0.5 and config["bf16"]["enabled"]
    assert config["zero_optimization"]["stage"] == 1


def test_throughput_is_shown_if_it_is_known():
    recipe = build_toy_recipe(batch_size=lambda step: 32, step_flops=lambda step: 4e12)
    metrics = measure_throughput(recipe, TrainingProgress(1, 20, {"loss": 0.5}, 9.0, 2.0), 2).to_metrics()
    assert metrics["samples/s"] == 16 and metrics["TFLOP/s"] == 2 and "MFU" not in metrics and metrics["GB"] > 0.01
    assert format_progress_line(TrainingProgress(1, 20, {"loss": 0.5}, 9.0, 2.0), {"GB": 1.0}) == "loss 0.5  GB 1"
    assert (
        "samples/s" not in measure_throughput(build_toy_recipe(), TrainingProgress(1, 20, {}, 9.0, 2.0), 1).to_metrics()
    )
    assert find_peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and find_peak_flops("a CPU") is None


def test_unknown_metric_writers_are_refused():
    with pytest.raises(InvalidInput, match="log-to: 'x' is not one of tensorboard, wandb"):
        build_writer_factory(["x"])


def test_the_exit_code_is_that_of_the_first_process_that_fails():
    class FakeProcess:
        def __init__(self, code):
            self.code = code

        def poll(self):
            return self.code

    assert wait_for_processes([FakeProcess(0), FakeProcess(0)]) == 0
    assert wait_for_processes([FakeProcess(None), FakeProcess(3)]) == 3
    assert wait_for_processes([FakeProcess(-9), FakeProcess(None)]) == 137
