"""The commands of evaluation: evaluate and ablate."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from omnivideo.cli.app import OUTPUT, DeviceOption, WeightsOption, console, error_console, open_studio
from omnivideo.errors import InvalidInput
from omnivideo.presets import PRESETS, get_preset


def evaluate(
    preset: Annotated[str, typer.Argument(help="A preset whose world has a scorer: tiny.")] = "tiny",
    weights: WeightsOption = None,
    device: DeviceOption = "auto",
    count: Annotated[int, typer.Option(min=1, max=10_000, help="Held-out prompts per category.")] = 50,
    planner: Annotated[
        bool, typer.Option("--planner", help="Score the planner's turns instead of single clips.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="File to write the scores to, as JSON.", rich_help_panel=OUTPUT)
    ] = None,
) -> None:
    """Score a preset on held-out prompts, edits, questions and routes, or the planner on whole conversations."""
    from omnivideo.agent.english_rules import split_actions
    from omnivideo.evaluation.everything import evaluate_all
    from omnivideo.evaluation.report import build_score_table, score_planner, scores_to_json

    if not get_preset(preset).has_scorer:
        allowed = ", ".join(name for name, known in PRESETS.items() if known.has_scorer)
        raise InvalidInput("preset", f"{preset!r} has no scorer; allowed: {allowed}")
    studio = open_studio(preset, weights, device)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=error_console, transient=True) as bar:
        rows: dict[str, TaskID] = {}

        def on_progress(name: str, done: int, total: int) -> None:
            if name not in rows:
                rows[name] = bar.add_task(name)
            bar.update(rows[name], completed=done, total=total)

        scores = (
            score_planner(studio.conversations, split_actions, count, on_progress)
            if planner
            else evaluate_all(studio.omni, count, on_progress)
        )
    console.print(build_score_table(scores))
    if report is not None:
        report.write_text(scores_to_json(scores))


def ablate(
    runs: Annotated[Path, typer.Option(help="Folder in which all recipes have been trained.")] = Path("runs"),
    count: Annotated[int, typer.Option(min=1, max=10_000, help="Held-out prompts per category.")] = 50,
) -> None:
    """Score the tiny preset after each training stage, and without its visual tokens."""
    from omnivideo.evaluation.ablation import build_ablation_table, run_ablation
    from omnivideo.training.config import TrainingConfig
    from omnivideo.training.engine.run import RunContext
    from omnivideo.training.tiny.pipeline import TinyPipeline

    tiny = TinyPipeline(RunContext(TrainingConfig(recipe="tiny", runs=runs)))
    with error_console.status("") as status:

        def on_progress(name: str, done: int, total: int) -> None:
            status.update(f"{name} {done}/{total}")

        rows = dict(run_ablation(tiny.load_omni, count, on_progress))
    console.print(build_ablation_table(rows))
