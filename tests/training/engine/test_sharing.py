"""What several processes deal out among themselves, without any: shares, owners, shards, speed."""

from itertools import pairwise

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


class Second(DataParallelRank):
    rank, world_size = 1, 2


def toy(**changes) -> Recipe:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))

    def loss(step):
        x = torch.randn(16, 4)
        return {"loss": (model(x) - x).square().mean()}

    return Recipe("toy", model, ("",), single_micro_batch(loss), steps=20, **changes)


def test_shares_are_taken_in_order_and_must_be_even():
    assert current_rank().take_local_rows([1, 2, 3]) == [1, 2, 3]
    with use_rank(Second()):
        assert current_rank().take_local_rows([1, 2, 3, 4]) == [3, 4]
        assert current_rank().take_local_rows(torch.arange(6)).tolist() == [3, 4, 5]
        with pytest.raises(InvalidInput, match="processes: a batch of 3 samples does not divide by 2"):
            current_rank().take_local_rows([1, 2, 3])
    assert current_rank().world_size == 1


def test_sequence_and_processes_must_divide():
    check_process_counts(8, 4)
    for processes, sequence in ((2, 3), (2, 4), (3, 2), (2, 0)):
        with pytest.raises(InvalidInput, match="sequence"):
            check_process_counts(processes, sequence)


def test_parts_are_equal_and_filled_up():
    whole = torch.arange(10.0).view(1, 5, 2)
    both = [take_local_part(whole, rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat(both, 1)[:, :5], whole) and both[1][0, 2].tolist() == [0, 0]
    assert take_local_part(whole, 3, 4).shape == (1, 2, 2) and not take_local_part(whole, 3, 4).any()


def test_owners_have_about_as_many_weights_and_buckets_hold_all():
    named = [(f"w{at}", torch.nn.Parameter(torch.zeros(size))) for at, size in enumerate((90, 50, 40, 30, 10))]
    owned = assign_owners(named, 2)
    loads = [sum(one.numel() for name, one in named if owned[name] == rank) for rank in range(2)]
    assert sorted(loads) == [100, 120]
    assert sorted(name for _, bucket in group_into_buckets(named, owned) for name, _ in bucket) == sorted(owned)


def test_adamw_moves_what_a_batch_does_not_touch(tmp_path):
    """As it must where weights are flattened and none can be left out."""
    recipe = toy(optimizer="adamw", weight_decay=0.1)
    recipe.model.spare = torch.nn.Linear(2, 2)
    recipe.model.forward = recipe.model[:2].forward
    before = recipe.model.spare.weight.detach().clone(), recipe.model.spare.bias.detach().clone()
    trainer = Trainer(recipe, tmp_path)
    trainer.train_step()
    shrunk = 1 - 0.1 * recipe.adam_lr * recipe.lr_scale(0)
    assert torch.allclose(recipe.model.spare.weight, before[0] * shrunk, rtol=1e-6)
    assert torch.equal(recipe.model.spare.bias, before[1])
    assert group_names_by_optimizer(trainer.trainable_parameters, "adamw") == [
        ["0.weight", "1.weight", "spare.weight", "0.bias", "1.bias", "spare.bias"]
    ]


def test_the_cosine_rises_once_and_falls_to_nothing():
    shares = [cosine_lr_scale(step, 100, 10) for step in range(101)]
    assert shares[0] == pytest.approx(0.1) and max(shares) == shares[9] == shares[10] == 1
    assert shares[55] == pytest.approx(0.5) and shares[100] == pytest.approx(0, abs=1e-9)
    assert shares[10:] == sorted(shares[10:], reverse=True)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("cuts", [(0, 13, 32), (0, 32)])
def test_shards_of_any_number_of_processes_go_on_to_the_same_losses(optimizer, cuts, tmp_path):
    """Shards are cut by hand from one process's state, as two or three processes would hold it."""
    whole = Trainer(toy(optimizer=optimizer, ema_decay=0.9), tmp_path / "whole")
    losses = [whole.train_step() for _ in range(4)]
    trainer = Trainer(toy(optimizer=optimizer, ema_decay=0.9), tmp_path / "cut")
    assert [trainer.train_step() for _ in range(2)] == losses[:2]
    names = group_names_by_optimizer(trainer.trainable_parameters, optimizer)
    trainer.save()
    saved = checkpoint.find_latest_checkpoint(tmp_path / "cut", names)
    bounds = [*cuts, 1000]
    checkpoint.create_partial_folder(tmp_path / "cut", 2)
    for rank, (low, high) in enumerate(pairwise(bounds)):
        held = [
            cut_out(saved, name, low, min(high, one.numel()))
            for name, one in trainer.trainable_parameters
            if low < one.numel()
        ]
        about = {"names": saved.parameter_names, "seconds": 1.0}
        checkpoint.write_shard(tmp_path / "cut", 2, rank, len(bounds) - 1, about, iter(held))
    trainer.state_file.unlink()
    assert checkpoint.find_latest_checkpoint(tmp_path / "cut", names) is None  # not finished
    checkpoint.commit_shards(tmp_path / "cut", 2)
    again = Trainer(toy(optimizer=optimizer, ema_decay=0.9), tmp_path / "cut")
    assert again.step == 2 and [again.train_step() for _ in range(2)] == losses[2:]
    assert all(torch.equal(value, whole.ema_weights[name]) for name, value in again.ema_weights.items())


def cut_out(saved, name, low, high):
    tensors = {
        kind: saved.read_tensor(name, kind, low, high)
        for kind in saved.list_optimizer_tensors(name) | {"weight", "average"}
    }
    return checkpoint.ParameterShard(name, low, tensors, saved.read_optimizer_steps(name))


def test_a_missing_shard_is_said(tmp_path):
    checkpoint.create_partial_folder(tmp_path, 7)
    checkpoint.write_shard(tmp_path, 7, 0, 2, {"names": [], "seconds": 0.0}, iter(()))
    checkpoint.commit_shards(tmp_path, 7)
    with pytest.raises(CheckpointError, match="step 7 are not complete: 1 file"):
        checkpoint.find_latest_checkpoint(tmp_path, [])


def test_deepspeed_is_told_what_the_recipe_says():
    made = build_deepspeed_config(toy(max_grad_norm=0.5, precision=torch.bfloat16))
    assert made["gradient_clipping"] == 0.5 and made["bf16"]["enabled"]
    assert made["zero_optimization"]["stage"] == 1


def test_speed_is_shown_where_it_is_known():
    recipe = toy(batch_size=lambda step: 32, step_flops=lambda step: 4e12)
    figures = measure_throughput(recipe, TrainingProgress(1, 20, {"loss": 0.5}, 9.0, 2.0), 2).to_metrics()
    assert figures["samples/s"] == 16 and figures["TFLOP/s"] == 2 and "MFU" not in figures and figures["GB"] > 0.01
    assert format_progress_line(TrainingProgress(1, 20, {"loss": 0.5}, 9.0, 2.0), {"GB": 1.0}) == "loss 0.5  GB 1"
    assert "samples/s" not in measure_throughput(toy(), TrainingProgress(1, 20, {}, 9.0, 2.0), 1).to_metrics()
    assert find_peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and find_peak_flops("a CPU") is None


def test_unknown_watchers_are_refused():
    with pytest.raises(InvalidInput, match="log-to: 'x' is not one of tensorboard, wandb"):
        build_writer_factory(["x"])


def test_the_first_process_that_fails_gives_its_code():
    class Ended:
        def __init__(self, code):
            self.code = code

        def poll(self):
            return self.code

    assert wait_for_processes([Ended(0), Ended(0)]) == 0
    assert wait_for_processes([Ended(None), Ended(3)]) == 3
    assert wait_for_processes([Ended(-9), Ended(None)]) == 137
