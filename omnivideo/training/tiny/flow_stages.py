"""Stages 2b and 3 over cached features of synthetic requests, with the tiny preset's steps and learning rates."""

import random
from collections.abc import Mapping

import torch

from omnivideo.models.omni import OmniVideoModel
from omnivideo.training.data.batch import CachedTask, MicroBatch, collate_flow_batch, sample_mixed_batch
from omnivideo.training.engine.data_parallel import current_rank
from omnivideo.training.engine.recipe import Recipe, step_seed
from omnivideo.training.recipes.flow import FLOW_BATCH_SIZES, build_flow_recipe
from omnivideo.training.recipes.parts import ADAPTER_PARTS

LONG = "long "  # before a task's name: its clips have 17 frames
# The tasks of a group share resolution, length and given frames, so they can share a batch; with the factor on the
# number of clips in a batch (None: it has images).
TASK_GROUPS: tuple[tuple[tuple[str, ...], float | None], ...] = (
    (("text-to-image", "image-editing"), None),
    (("text-to-video", "video-editing"), 1.0),
    ((f"{LONG}text-to-video", f"{LONG}video-editing"), 0.6),
    (("image-to-video",), 1.0),
    (("video-extension",), 0.6),
    (("keyframes-to-video",), 1.0),
)
# Stage 3 has more clips and edits than images and generation: they are harder, and new to the decoder.
STAGE3_SCHEDULE = (0, 1, 2, 1, 3, 1, 4, 0, 1, 5, 1, 2, 0, 1, 3, 1, 4, 1)


class SyntheticSource:
    """Batches of cached requests, each of one group of `TASK_GROUPS`.

    `data` has the cached requests of each task by its name; a group without any is left out. `group_schedule` is the
    cycle of the groups over the steps. `edit_share` is the share of edits in a batch, if there are both edits and
    generation requests for its group.
    """

    def __init__(
        self,
        name: str,
        data: Mapping[str, CachedTask],
        batch_sizes: tuple[int, int],
        group_schedule: tuple[int, ...] = tuple(range(len(TASK_GROUPS))),
        edit_share: float = 0.5,
    ):
        self.name = name
        self.edit_share = edit_share
        groups = [[data[task] for task in tasks if task in data] for tasks, _ in TASK_GROUPS]
        self.task_groups = groups
        self.group_schedule = tuple(group for group in group_schedule if groups[group])
        stills, clips = batch_sizes
        self.batch_sizes = [stills if factor is None else round(clips * factor) for _, factor in TASK_GROUPS]

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
    data: Mapping[str, CachedTask],
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
    data: Mapping[str, CachedTask],
    steps: int = 600,
    batch_sizes: tuple[int, int] = FLOW_BATCH_SIZES,
    workers: int = 0,
) -> Recipe:
    """Build the first sub-stage of stage 2b: text to image and text to video."""
    generation_data = {task: cached_task for task, cached_task in data.items() if cached_task.source_latents is None}
    return build_adapter_recipe("stage2b_generation", omni, generation_data, steps, batch_sizes, workers)


def build_stage2b_recipe(
    omni: OmniVideoModel,
    data: Mapping[str, CachedTask],
    steps: int = 800,
    batch_sizes: tuple[int, int] = FLOW_BATCH_SIZES,
    workers: int = 0,
) -> Recipe:
    """Build the second sub-stage of stage 2b: all generative tasks."""
    return build_adapter_recipe("stage2b", omni, data, steps, batch_sizes, workers)


def build_stage3_recipe(
    omni: OmniVideoModel,
    data: Mapping[str, CachedTask],
    steps: int = 21_000,
    batch_sizes: tuple[int, int] = FLOW_BATCH_SIZES,
    workers: int = 0,
) -> Recipe:
    """Build stage 3.

    At low noise the noisy latents show what to generate; the condition is learned at high noise.
    """
    torch.manual_seed(14)
    source = SyntheticSource("stage3", data, batch_sizes, STAGE3_SCHEDULE, edit_share=0.8)
    return build_flow_recipe(
        "stage3", omni, source, steps, lr=7e-3, alignment_weight=0.1, high_noise_share=0.9, workers=workers
    )
