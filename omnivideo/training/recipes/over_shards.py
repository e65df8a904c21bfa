"""Train the stages of any preset over shards: `omnivideo train stage2b --data SHARDS --weights FOLDER`."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from omnivideo.errors import InvalidInput
from omnivideo.models.omni import OmniVideoModel
from omnivideo.training.config import TrainingConfig
from omnivideo.training.data.batch_sampler import PAPER_TASK_MIX, MixConfig, build_buckets
from omnivideo.training.data.dataset import EpochDataset, FlowDataset, Stage1Dataset
from omnivideo.training.data.file_store import open_file_store
from omnivideo.training.data.latent_cache import BucketAssigner, LatentCache, compute_cache_digest, fingerprint_weights
from omnivideo.training.data.sample import SkipReport
from omnivideo.training.data.webdataset import ShardDataset
from omnivideo.training.engine.placement import StageLoader
from omnivideo.training.engine.recipe import Recipe
from omnivideo.training.engine.run import RunContext
from omnivideo.training.engine.trainer import PRECISIONS
from omnivideo.training.recipes.flow import FLOW_BATCH_SIZES, build_flow_recipe
from omnivideo.training.recipes.parts import TrainableParts
from omnivideo.training.recipes.stage1 import assemble_stage1_recipe
from omnivideo.training.recipes.stage2a import assemble_stage2a_recipe

PREVIOUS_STAGE = {
    "stage1": "", "stage2a": "stage1", "stage2b_generation": "stage2a", "stage2b": "stage2b_generation",
    "stage3": "stage2b",
}  # fmt: skip
ALIGNMENT_WEIGHT = 0.1
BASE_LR = 1e-5  # of AdamW; stages 1 and 2a start from random weights and use ten times as much
DEFAULT_STEPS = 20_000
BATCH_UNIT = 8  # number of processes among which nearly every batch divides evenly


def build_mix(
    stills: int | None = None, clips: int | None = None, batch_scale: int = 1, ratio: Sequence[str] = (),
    weights: Sequence[str] = (), seed: int = 0,
) -> MixConfig:  # fmt: skip
    """Return the mix of tasks and batches; raise InvalidInput for malformed shares.

    `stills` and `clips` are samples in a batch (None: as over the synthetic world). `ratio` and `weights` are
    NAME=NUMBER shares of the tasks (default: the paper's Table 1) and of the batches of each medium (default: by the
    tasks' shares). Buckets are not merged, since cached latents belong to one bucket.
    """
    sizes = {
        "image": (FLOW_BATCH_SIZES[0] if stills is None else stills) * batch_scale,
        "video": (FLOW_BATCH_SIZES[1] if clips is None else clips) * batch_scale,
    }
    task_shares, group_weights = (
        parse_named_numbers("ratio", ratio) or PAPER_TASK_MIX,
        parse_named_numbers("group-weight", weights),
    )
    unit = max(1, math.gcd(BATCH_UNIT, *sizes.values()))
    return MixConfig(task_shares, sizes, group_weights or None, unit, fold_small_buckets=False, seed=seed)  # type: ignore[arg-type]


def parse_named_numbers(field: str, items: Sequence[str]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for item in items:
        name, _, number = item.partition("=")
        try:
            value = float(number)
        except ValueError:
            raise InvalidInput(field, f"{item!r} is not NAME=NUMBER") from None
        if name in numbers:
            raise InvalidInput(field, f"{name!r} is repeated")
        numbers[name] = value
    return numbers


def open_dataset(shards: str, size: str, frames: str, fps: float) -> tuple[ShardDataset, BucketAssigner]:
    """Return a folder of shards (or s3://bucket/prefix), with the buckets for a WIDTHxHEIGHT and frame counts."""
    width, height = parse_integers("size", size.lower().split("x"), 2)
    buckets = build_buckets(width, height, (1, *parse_integers("frames", frames.split(","))))
    return ShardDataset(open_file_store(shards), SkipReport()), BucketAssigner(tuple(buckets), fps)


def parse_integers(field: str, parts: Sequence[str], count: int | None = None) -> list[int]:
    """Return the parts of an option as integers; raise InvalidInput if they are not `count` integers."""
    if not all(part.isascii() and part.isdigit() for part in parts) or count not in (None, len(parts)):
        raise InvalidInput(field, "whole numbers, e.g. --size 832x480 --frames 17,41,81")
    return [int(part) for part in parts]


def check_stage(config: TrainingConfig) -> tuple[str, Path]:
    """Return the stage that is trained and the weights that it starts from; raise InvalidInput for other recipes."""
    if config.recipe not in PREVIOUS_STAGE:
        allowed = ", ".join(PREVIOUS_STAGE)
        raise InvalidInput("recipe", f"{config.recipe!r} does not train over shards; allowed: {allowed}")
    if config.weights is None:
        raise InvalidInput("weights", "shards need a folder of weights to start from")
    return config.recipe, config.weights


def build_stage_recipe(library: ShardDataset, fit: BucketAssigner, run: RunContext, mix: MixConfig) -> Recipe:
    """Build the recipe of a stage, which starts from the previous stage's run, or from the weights without a run.

    It uses AdamW with a cosine schedule, and by default bf16 on a GPU. From stage 2a on it reads the cache that was
    computed with the same weights. Raises InvalidInput for a recipe that is not a stage, or if weights are missing.
    """
    stage, weights = check_stage(run.config)
    precision = PRECISIONS[run.config.precision or ("bf16" if run.device.type == "cuda" else "fp32")]
    loader = StageLoader(stage, weights, run.device, precision)
    omni = loader.load_omni()
    if PREVIOUS_STAGE[stage] and run.has_run(PREVIOUS_STAGE[stage]):
        state = torch.load(run.get_state_file(PREVIOUS_STAGE[stage]), weights_only=True, map_location="cpu", mmap=True)
        TrainableParts(omni).load_state_dict(state["model"] | state["average"])
    source, recipe = (build_stage1_recipe if stage == "stage1" else build_flow_stage_recipe)(
        library, fit, stage, run, loader, omni, mix
    )
    source.micro_batch_size = run.config.micro_batch_size
    return replace(
        recipe, optimizer="adamw", lr_schedule="cosine", precision=precision, data_digest=source.compute_digest()
    )


def build_stage1_recipe(
    library: ShardDataset,
    fit: BucketAssigner,
    stage: str,
    run: RunContext,
    loader: StageLoader,
    omni: OmniVideoModel,
    mix: MixConfig,
) -> tuple[EpochDataset, Recipe]:
    """Build stage 1 over the samples of all tasks."""
    encoder = loader.load_visual_encoder()
    source = Stage1Dataset(omni, library, fit, mix, encoder)
    recipe = assemble_stage1_recipe(
        omni, encoder, source.load_batch, DEFAULT_STEPS, source.batch_size, run.config.workers, source.to_micro_batches
    )
    return source, replace(recipe, lr=100 * BASE_LR, adam_lr=10 * BASE_LR)


def build_flow_stage_recipe(
    library: ShardDataset,
    fit: BucketAssigner,
    stage: str,
    run: RunContext,
    loader: StageLoader,
    omni: OmniVideoModel,
    mix: MixConfig,
) -> tuple[EpochDataset, Recipe]:
    """Build a stage from 2a on, with latents and text embeddings from the cache if it contains them."""
    encoder = loader.load_visual_encoder() if stage == "stage3" else None
    cache = LatentCache(library.file_store, compute_cache_digest(fingerprint_weights(loader.weights), fit))
    source = FlowDataset(stage, omni, library, cache, fit, mix, encoder)
    if stage == "stage2a":
        recipe = replace(
            assemble_stage2a_recipe(omni, source, DEFAULT_STEPS, run.config.workers),
            lr=100 * BASE_LR,
            adam_lr=10 * BASE_LR,
        )
        return source, recipe
    alignment_weight, high_noise_share = (ALIGNMENT_WEIGHT, 0.9) if stage == "stage3" else (0.0, 0.5)
    return source, build_flow_recipe(
        stage,
        omni,
        source,
        DEFAULT_STEPS,
        lr=10 * BASE_LR,
        alignment_weight=alignment_weight,
        high_noise_share=high_noise_share,
        workers=run.config.workers,
    )
