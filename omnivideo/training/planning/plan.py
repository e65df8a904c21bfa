"""Estimate what a stage of training costs at full size: weights, memory, seconds per step and days.

Nothing is measured and nothing is allocated. The models are built on the meta device, and every number follows from
formulas that docs/plan.md states and that the tests compare with torch's own counters on a small model.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from omnivideo.errors import InvalidInput
from omnivideo.training.planning.config import FLOW_STAGES, KINDS, Kind, PlanConfig, validate_config
from omnivideo.training.planning.duration import count_steps, estimate_sample_flops, estimate_step_seconds
from omnivideo.training.planning.gpus import GPUS, compute_mfu
from omnivideo.training.planning.memory import count_stage_weights, estimate_resident_gb, estimate_transient_gb
from omnivideo.training.planning.models import count_table_parameters

SECONDS_PER_DAY = 86_400.0


@dataclass(frozen=True)
class TrainingPlan:
    """Numbers of parameters, the memory of one GPU by part, and the seconds and operations of a step of each kind.

    Resident memory is always allocated; only one of the transient parts is allocated at a time. `step_flops` are those
    of one GPU.
    """

    config: PlanConfig
    trained_parameters: int
    frozen_parameters: int
    offloaded_parameters: int
    resident_gb: dict[str, float]
    transient_gb: dict[str, float]
    step_seconds: dict[Kind, dict[str, float]]
    step_flops: dict[Kind, float]
    steps: dict[Kind, float]

    @property
    def required_gb(self) -> float:
        return sum(self.resident_gb.values()) + max(self.transient_gb.values())

    @property
    def total_seconds(self) -> float:
        return sum(count * sum(self.step_seconds[kind].values()) for kind, count in self.steps.items())

    @property
    def days(self) -> float:
        return self.total_seconds / SECONDS_PER_DAY

    @property
    def mfu(self) -> float:
        operations = sum(self.step_flops[kind] * count for kind, count in self.steps.items())
        return compute_mfu(operations, self.total_seconds, self.config.gpu.peak_tflops)


def build_plan(config: PlanConfig) -> TrainingPlan:
    """Return the plan of a run; raise InvalidInput for invalid values. `check_fits` checks the memory."""
    validate_config(config)
    weights = count_stage_weights(config.preset.name, config.recipe, config.cached)
    trained, frozen = weights.trained_parameters, weights.frozen_parameters
    parameters_by_part = weights.parameters_by_part | count_table_parameters()
    step_seconds: dict[Kind, dict[str, float]] = {}
    step_flops: dict[Kind, float] = {}
    for kind in KINDS:
        model_flops, extra_flops = estimate_sample_flops(config, kind, parameters_by_part)
        step_seconds[kind] = estimate_step_seconds(config, kind, trained, model_flops, extra_flops)
        samples = config.samples_per_gpu(kind) * config.grad_accum_steps
        step_flops[kind] = model_flops.total * samples / config.sequence_parallel_size
    return TrainingPlan(
        config,
        trained_parameters=trained,
        frozen_parameters=frozen,
        offloaded_parameters=sum(weights.parameters_by_part.values()) - trained - frozen,
        resident_gb=estimate_resident_gb(trained, weights.frozen_bytes, config.recipe in FLOW_STAGES, config.gpus),
        transient_gb=estimate_transient_gb(config, trained),
        step_seconds=step_seconds,
        step_flops=step_flops,
        steps=count_steps(config),
    )


def check_fits(plan: TrainingPlan) -> None:
    """Raise InvalidInput if the plan needs more memory than its GPU has; the message lists changes that would help."""
    gpu = plan.config.gpu
    if plan.required_gb <= gpu.memory_gb:
        return
    changes = [
        change
        for change, config in iter_remedies(plan.config)
        if build_plan(config).required_gb <= config.gpu.memory_gb
    ]
    hint = f"it fits with {' or with '.join(changes[:3])}" if changes else "no change of a single option makes it fit"
    raise InvalidInput(
        "gpus", f"{plan.required_gb:.1f} GB do not fit the {gpu.memory_gb:g} GB of one {gpu.name}; {hint}"
    )


def iter_remedies(config: PlanConfig) -> Iterator[tuple[str, PlanConfig]]:
    """Yield single options that reduce the memory of a GPU, the cheapest first, with the changed configuration."""
    if not config.cached:
        yield "--cached", replace(config, cached=True)
    if not config.checkpointing:
        yield "--checkpointing", replace(config, checkpointing=True)
    for clips in (config.clips_per_gpu // 2, 1):
        if 1 <= clips < config.clips_per_gpu:
            yield f"--batch {clips}", replace(config, clips_per_gpu=clips)
    for size in (2, 4):
        if size > config.sequence_parallel_size and config.gpus % size == 0:
            yield f"--sequence-parallel {size}", replace(config, sequence_parallel_size=size)
    for factor in (2, 4, 8):
        yield f"--gpus {config.gpus * factor}x{config.gpu.name}", replace(config, gpus=config.gpus * factor)
    for gpu in sorted(GPUS.values(), key=lambda candidate: candidate.memory_gb):
        if gpu.memory_gb > config.gpu.memory_gb:
            yield f"--gpus {config.gpus}x{gpu.name}", replace(config, gpu=gpu)
