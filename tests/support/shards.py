"""Shards of small samples, and the stages that train on them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from omnivideo.models.weights.checkpoint import load
from omnivideo.training.data.batch_sampler import MixConfig, build_buckets
from omnivideo.training.data.dataset import EpochDataset, FlowDataset, Stage1Dataset
from omnivideo.training.data.file_store import open_file_store
from omnivideo.training.data.latent_cache import BucketAssigner, FrozenEncoders, LatentCache
from omnivideo.training.data.sample import SkipReport, TrainingSample
from omnivideo.training.data.webdataset import ShardDataset, write_shards
from omnivideo.training.engine.data_parallel import DataParallelRank
from omnivideo.training.engine.recipe import Recipe, step_seed
from omnivideo.training.engine.trainer import Trainer
from omnivideo.training.recipes.flow import build_flow_recipe
from omnivideo.training.recipes.stage1 import assemble_stage1_recipe
from omnivideo.training.recipes.stage2a import assemble_stage2a_recipe
from omnivideo.training.tiny import visual_encoder
from tests.support.training_samples import make_mp4, make_png

ASSIGNER = BucketAssigner(tuple(build_buckets(64, 64, (1, 5))))
SAMPLES = [
    *(TrainingSample("text-to-image", f"a red ball {at}", target=make_png(at, (32, 32))) for at in range(4)),
    TrainingSample("text-to-image", "a wide ball", target=make_png(9, (64, 32))),
    TrainingSample("text-to-video", "a red ball rolls", target=make_mp4(9)),
    TrainingSample("image-editing", "make it blue", make_png(3, (32, 32)), make_png(4, (32, 32))),
    *(TrainingSample("video-editing", f"make it blue {at}", make_mp4(6 + at), make_mp4(8 + at)) for at in range(2)),
    TrainingSample(
        "image-understanding", source=make_png(1, (32, 32)), turns=(("what is it?", "a ball"), ("how many?", "two"))
    ),
]


class HalfRank(DataParallelRank):
    """A rank with fixed reductions: `sample_count` samples count over all ranks; no condition exceeds 120 tokens."""

    def __init__(self, rank: int, world: int, sample_count: int):
        self.rank, self.world_size, self.sample_count = rank, world, sample_count

    def global_mean(self, counts: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.sample_count / self.world_size)

    def global_max(self, length: int) -> int:
        return 120


def write_dataset(folder: Path, samples: Sequence[TrainingSample]) -> ShardDataset:
    """Write the samples to shards in the folder, and open them."""
    write_shards(samples, open_file_store(folder), SkipReport())
    return ShardDataset(open_file_store(folder), SkipReport())


def make_visual_encoder() -> SiglipVisionModel:
    """Return a frozen visual encoder of the tiny preset with random weights."""
    torch.manual_seed(2)
    return SiglipVisionModel(SiglipVisionConfig(**visual_encoder.CONFIG)).eval().requires_grad_(False)


def make_flow_dataset(encoded_dataset, weights, name: str = "stage3", embedded: bool = True) -> FlowDataset:
    """Return the data of a stage, with targets embedded for Eq. 1 if `embedded`."""
    cache = LatentCache(encoded_dataset.file_store, FrozenEncoders.load(weights, "cpu").compute_digest(ASSIGNER))
    mix = MixConfig(task_ratio=None, batch_sizes={"image": 3, "video": 2}, batch_multiple=1)
    return FlowDataset(
        name, load(weights), encoded_dataset, cache, ASSIGNER, mix, make_visual_encoder() if embedded else None
    )


def make_stage1_dataset(dataset: ShardDataset, weights) -> Stage1Dataset:
    """Return the data of stage 1."""
    mix = MixConfig(task_ratio=None, batch_sizes={"image": 3, "video": 2}, batch_multiple=1)
    return Stage1Dataset(load(weights), dataset, ASSIGNER, mix, make_visual_encoder())


def damage_target(dataset: ShardDataset, number: int) -> str:
    """Overwrite a sample's target in its shard, which keeps its size; return the sample's location."""
    entry = dataset.entries[number]
    name = next(name for name in entry.members if name.startswith("target"))
    offset, length = entry.members[name]
    with (dataset.file_store.folder / entry.shard).open("r+b") as file:
        file.seek(offset)
        file.write(b"x" * length)
    return f"{entry.shard}/{entry.key}"


def build_stage(
    encoded_dataset, weights, name: str, micro: int | None, workers: int = 0
) -> tuple[EpochDataset, Recipe]:
    """Return a stage's data and recipe, with at most `micro` samples in a micro-batch."""
    if name == "stage1":
        lessons = make_stage1_dataset(encoded_dataset, weights)
        recipe = assemble_stage1_recipe(
            lessons.omni, lessons.encoder, lessons.load_batch, 6, lessons.batch_size, workers, lessons.to_micro_batches
        )
        lessons.micro_batch_size = micro
        return lessons, recipe
    one = make_flow_dataset(encoded_dataset, weights, name, embedded=name == "stage3")
    one.micro_batch_size = micro
    if name == "stage2a":
        return one, assemble_stage2a_recipe(one.omni, one, 6, workers)
    return one, build_flow_recipe(name, one.omni, one, 6, 1e-3, 0.1 * (name == "stage3"), workers=workers)


def run_epoch(encoded_dataset, weights, name: str, micro: int | None, folder: Path, workers: int = 0) -> list:
    """Return the loss and the gradients of every step of an epoch."""
    one, recipe = build_stage(encoded_dataset, weights, name, micro, workers)
    trainer, found = Trainer(recipe, folder), []
    for trainer.step in range(len(one.batch_sampler.get_epoch_batches(0))):
        torch.manual_seed(step_seed(name, trainer.step))
        loss = float(trainer.accumulate_gradients()["loss"])
        gradients = {key: weight.grad for key, weight in trainer.trainable_parameters if weight.grad is not None}
        found.append((loss, gradients))
        recipe.model.zero_grad()
        if micro:
            assert (
                len(recipe.micro_batch_losses(trainer.step)) >= -(-one.batch_size(trainer.step) // micro) - 1
            )  # an unreadable sample may leave one out
    return found
