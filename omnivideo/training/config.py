"""The configuration of a training run: one frozen object, which is built once and passed on unchanged.

`omnivideo train` generates an option with the help text and the panel of each field.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from omnivideo.contracts import FrozenModel
from omnivideo.errors import InvalidInput

OPTIMIZATION, BATCHES, SHARDS = "Optimization", "Batches", "Training over shards"
# In the order in which they are trained.
TINY_RECIPES = (
    "vae", "vae_decoder", "text", "decoder", "visual_encoder", "mllm", "stage1", "stage1_text", "stage2a",
    "stage2b_generation", "stage2b", "stage3",
)  # fmt: skip
SHARD_RECIPES = ("stage1", "stage2a", "stage2b_generation", "stage2b", "stage3")
DEVICES, OUTPUT = "Devices and processes", "Checkpoints and logs"


def option(
    default: Any, description: str, panel: str, flag: str = "", ge: float | None = None, le: float | None = None
) -> Any:
    """Return a field that the command line offers as an option, named `flag`, or after the field without a `flag`."""
    return Field(default, description=description, json_schema_extra={"panel": panel, "flag": flag}, ge=ge, le=le)


class TrainingConfig(FrozenModel):
    """What to train, on what data, how, and where; None keeps a recipe's own value."""

    recipe: str = Field(
        description="tiny for all recipes of the tiny preset in order, export to write what has been trained, or one "
        f"recipe: {', '.join(TINY_RECIPES)}. With --data: {', '.join(SHARD_RECIPES)}."
    )

    steps: int | None = option(None, "Number of steps; default: the recipe's.", OPTIMIZATION, ge=1)
    stop_at_step: int | None = option(
        None, "Stop at this step; 0 trains nothing and only writes state.pt.", OPTIMIZATION, ge=0
    )
    optimizer: Literal["muon", "adamw"] | None = option(None, "Optimizer; default: the recipe's.", OPTIMIZATION)
    lr_scale: float = option(1.0, "Factor on the recipe's learning rates.", OPTIMIZATION, ge=0)
    precision: Literal["fp32", "bf16"] | None = option(
        None, "Precision of matrix products; default: the recipe's.", OPTIMIZATION
    )
    checkpointing: bool | None = option(
        None, "Recompute activations in the backward pass: less memory, more time.", OPTIMIZATION
    )
    weights: Path | None = option(
        None, "Folder of weights to start from if the preceding recipe has no run.", OPTIMIZATION
    )

    batch_scale: int = option(1, "Factor on the recipe's batch sizes.", BATCHES, ge=1)
    seeds: tuple[int, ...] = option(
        (),
        "Seed of the synthetic samples; each further seed adds edits to stage 3. "
        "With --data: one seed, for the order of the samples.",
        BATCHES,
        flag="--seed",
    )
    workers: int = option(0, "Extra processes that prepare batches.", BATCHES, ge=0)

    data: str | None = option(None, "Folder of shards or s3://bucket/prefix; default: the synthetic world.", SHARDS)
    size: str = option("832x480", "WIDTHxHEIGHT in px; all buckets have about this area.", SHARDS)
    frames: str = option("17", "Frame counts of the clip buckets, separated by commas (4k + 1).", SHARDS)
    fps: float = option(8.0, "Frames per second at which clips are sampled.", SHARDS, ge=0.1, le=240)
    stills: int | None = option(None, "Images in a batch, over all processes; default: 64.", SHARDS, ge=1)
    clips: int | None = option(None, "Clips in a batch, over all processes; default: 24.", SHARDS, ge=1)
    ratio: tuple[str, ...] = option(
        (), "TASK=SHARE: the task's share of the samples; repeatable; default: the paper's Table 1.", SHARDS
    )
    group_weight: tuple[str, ...] = option(
        (),
        "image=N or video=M: N image batches for every M video batches; repeatable; default: by task.",
        SHARDS,
    )
    micro_batch_size: int | None = option(
        None,
        "Maximum samples in a forward and backward pass of one process; default: no limit.",
        SHARDS,
        ge=1,
    )
    report: Path | None = option(None, "File to which skipped samples are written as JSON lines.", SHARDS)

    device: Literal["cpu", "cuda"] = option("cpu", "Device to train on.", DEVICES)
    processes: int = option(1, "Processes that share every batch.", DEVICES, ge=1)
    sequence_parallel: int = option(1, "Processes that share the tokens of each sample.", DEVICES, ge=1)
    compiled: bool = option(False, "Compile the decoder with torch.compile (needs a C++ compiler).", DEVICES)

    runs: Path = option(Path("runs"), "Folder for checkpoints, logs and plots.", OUTPUT)
    save_every: float = option(120.0, "Seconds between checkpoints.", OUTPUT, ge=0)
    log_to: tuple[Literal["tensorboard", "wandb"], ...] = option(
        (), "Also write metrics to tensorboard or wandb; repeatable.", OUTPUT
    )
    sample_every: int | None = option(
        None, "Steps between sample sheets, which are generated, scored and written to RUN/samples.", OUTPUT, ge=1
    )

    def model_post_init(self, context: object) -> None:
        if self.data is None and (
            self.stills or self.clips or self.ratio or self.group_weight or self.micro_batch_size
        ):
            raise InvalidInput(
                "data", "--stills, --clips, --ratio, --group-weight and --micro-batch-size apply only with --data"
            )
        if self.data is not None and len(self.seeds) > 1:
            raise InvalidInput("seed", f"{len(self.seeds)} seeds are given; only one is allowed with --data")
