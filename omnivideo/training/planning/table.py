"""Print a plan as a table, with the assumptions on which its numbers depend."""

from rich.table import Table

from omnivideo.training.planning.duration import find_slowest_link
from omnivideo.training.planning.plan import TrainingPlan


def build_plan_table(plan: TrainingPlan) -> Table:
    config, gpu = plan.config, plan.config.gpu
    table = Table(title=f"{config.recipe} of {config.preset.name} on {config.gpus} x {gpu.name}")
    table.add_column("item")
    table.add_column("value", justify="right")
    for rows in (format_weight_rows(plan), format_memory_rows(plan), format_time_rows(plan)):
        for row in rows:
            table.add_row(*row)
        table.add_section()
    table.caption = (
        f"Assumed: {config.utilisation:.0%} of {gpu.peak_tflops:g} TFLOP/s (dense bf16) in products and attention; "
        f"{gpu.memory_gb_per_second:g} GB/s of memory, {find_slowest_link(config):g} GB/s between GPUs; nothing "
        f"overlaps. Source of the peaks: {gpu.datasheet}"
    )
    return table


def format_weight_rows(plan: TrainingPlan) -> list[tuple[str, str]]:
    return [
        ("trained parameters", f"{plan.trained_parameters:,}"),
        ("frozen parameters on the GPU", f"{plan.frozen_parameters:,}"),
        ("parameters on the CPU (text encoder, VAE)", f"{plan.offloaded_parameters:,}"),
    ]


def format_memory_rows(plan: TrainingPlan) -> list[tuple[str, str]]:
    rows = [(f"GB, {name}", f"{value:.2f}") for name, value in plan.resident_gb.items()]
    rows += [(f"GB (transient), {name}", f"{value:.2f}") for name, value in plan.transient_gb.items()]
    return [*rows, (f"GB in total, of {plan.config.gpu.memory_gb:g} on one GPU", f"{plan.required_gb:.2f}")]


def format_time_rows(plan: TrainingPlan) -> list[tuple[str, str]]:
    config = plan.config
    rows: list[tuple[str, str]] = []
    for kind, times in plan.step_seconds.items():
        condition = "" if config.recipe.startswith("stage1") else f", condition {config.count_condition_tokens(kind):,}"
        passes = f"{config.grad_accum_steps} x " if config.grad_accum_steps > 1 else ""
        batch = f"{passes}{config.samples_per_gpu(kind)} x {config.count_model_tokens(kind):,} tokens{condition}"
        rows.append((f"a step of {kind}s on each GPU", batch))
        rows += [(f"  seconds, {name}", f"{seconds:.3f}") for name, seconds in times.items()]
    rows.append(("TFLOP per GPU in a step of clips", f"{plan.step_flops['clip'] / 1e12:.1f}"))
    rows.append(("resulting MFU", f"{plan.mfu:.2f}"))
    counts = ", ".join(f"{count:,.0f} of {kind}s" for kind, count in plan.steps.items())
    rows.append(("steps" if config.steps else "steps of one epoch of Table 1", counts))
    return [*rows, ("days", f"{plan.days:.2f}")]
