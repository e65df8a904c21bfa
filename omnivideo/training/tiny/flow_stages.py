"""Stages 2b and 3 over cached features of synthetic requests, with the tiny preset's steps and learning rates."""

import random
from collections.abc import Mapping

import torch

from omnivideo.contracts import TASKS, get_task_medium, is_editing_task
from omnivideo.models.omni import OmniVideoModel
from omnivideo.presets import Task
from omnivideo.training.data.batch import CachedTask, MicroBatch, collate_flow_batch, sample_mixed_batch
from omnivideo.training.engine.data_parallel import current_rank
from omnivideo.training.engine.recipe import Recipe, step_seed
from omnivideo.training.recipes.flow import FLOW_BATCH_SIZES, build_flow_recipe
from omnivideo.training.recipes.parts import ADAPTER_PARTS

# The tasks of a medium share resolution and frame count, so they can share a batch.
TASK_GROUPS: tuple[tuple[Task, ...], ...] = tuple(
    tuple(task for task in TASKS if get_task_medium(task) == medium) for medium in ("image", "video")
)


class SyntheticSource:
    """Batches of cached requests, alternately of images and of clips.

    `group_schedule` is the cycle of the groups (0 images, 1 clips) over the steps. `edit_share` is the share of edits
    in a batch, if there are both edits and generation requests for its group.
    """

    def __init__(
        self,
        name: str,
        data: Mapping[Task, CachedTask],
        batch_sizes: tuple[int, int],
        group_schedule: tuple[int, ...] = (0, 1),
        edit_share: float = 0.5,
    ):
        self.name = name
        self.batch_sizes = batch_sizes
        self.group_schedule = group_schedule
        self.edit_share = edit_share
        self.task_groups = [
            [cached_task for task, cached_task in data.items() if task in group] for group in TASK_GROUPS
        ]

    def load_batch(self, step: int) -> MicroBatch:
        rng = random.Random(step_seed(f"{self.name}/data", step))
        group = self.task_groups[self.group_schedule[step % len(self.group_schedule)]]
        samples = sample_mixed_batch(rng, group, self.batch_size(step), self.edit_share)
        dropout_draws = [rng.random() for _ in samples]
        return MicroBatch(
            collate_flow_batch(current_rank().take_local_rows(samples)),
            current_rank().take_local_rows(dropout_draws),
            len(samples),
            current_rank().local_slice(len(samples)),
        )

    def to_micro_batches(self, batch: MicroBatch) -> list[MicroBatch]:
        return [batch]

    def batch_size(self, step: int) -> int:
        return self.batch_sizes[self.group_schedule[step % len(self.group_schedule)]]


def build_adapter_recipe(
    name: str,
    omni: OmniVideoModel,
    data: Mapping[Task, CachedTask],
    steps: int,
    batch_sizes: tuple[int, int],
    workers: int,
) -> Recipe:
    """Build a recipe that trains the adapter and the visual context through the frozen decoder."""
    torch.manual_seed(13)
    source = SyntheticSource(name, data, batch_sizes)
    return build_flow_recipe(
        name, omni, source, steps, lr=5e-3, alignment_weight=0.0, workers=workers, trainable=ADAPTER_PARTS
    )


def build_stage2b_generation_recipe(
    omni: OmniVideoModel,
    data: Mapping[Task, CachedTask],
    steps: int = 600,
    batch_sizes: tuple[int, int] = FLOW_BATCH_SIZES,
    workers: int = 0,
) -> Recipe:
    """Build the first sub-stage of stage 2b: text to image and text to video."""
    generation_data = {task: cached_task for task, cached_task in data.items() if not is_editing_task(task)}
    return build_adapter_recipe("stage2b_generation", omni, generation_data, steps, batch_sizes, workers)


def build_stage2b_recipe(
    omni: OmniVideoModel,
    data: Mapping[Task, CachedTask],
    steps: int = 800,
    batch_sizes: tuple[int, int] = FLOW_BATCH_SIZES,
    workers: int = 0,
) -> Recipe:
    """Build the second sub-stage of stage 2b: all four generative tasks."""
    return build_adapter_recipe("stage2b", omni, data, steps, batch_sizes, workers)


def build_stage3_recipe(
    omni: OmniVideoModel,
    data: Mapping[Task, CachedTask],
    steps: int = 21_000,
    batch_sizes: tuple[int, int] = FLOW_BATCH_SIZES,
    workers: int = 0,
) -> Recipe:
    """Build stage 3, with more clips and edits than images and generation: they are harder, and new to the decoder.

    At low noise the noisy latents show what to generate; the condition is learned at high noise.
    """
    torch.manual_seed(14)
    source = SyntheticSource("stage3", data, batch_sizes, group_schedule=(0, 1, 1, 1, 1), edit_share=0.8)
    return build_flow_recipe(
        "stage3", omni, source, steps, lr=7e-3, alignment_weight=0.1, high_noise_share=0.9, workers=workers
    )
