"""The commands of evaluation: evaluate and ablate."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn

from omnivideo.cli.app import OUTPUT, DeviceOption, WeightsOption, console, error_console, open_studio
from omnivideo.errors import InvalidInput
from omnivideo.presets import PRESETS, get_preset
from omnivideo.training.engine.progress_bar import LoggedProgress

if TYPE_CHECKING:
    from omnivideo.evaluation.suite import EvaluationProgress, Score

DEFAULT_COUNT = 50


PRESET_HELP = "A preset whose world has a scorer: tiny; for --phrases also one whose MLLM plans."


def evaluate(
    preset: Annotated[str, typer.Argument(help=PRESET_HELP)] = "tiny",
    weights: WeightsOption = None,
    device: DeviceOption = "auto",
    count: Annotated[
        int | None,
        typer.Option(min=1, max=10_000, help="Held-out prompts per category, by default 50; for --phrases, all."),
    ] = None,
    planner: Annotated[
        bool, typer.Option("--planner", help="Score the planner's turns instead of single clips.")
    ] = False,
    phrases: Annotated[
        bool, typer.Option("--phrases", help="Score what the assistant does with things that people say.")
    ] = False,
    steps: Annotated[
        int | None, typer.Option(min=1, max=200, help="Denoising steps for --phrases, by default the preset's.")
    ] = None,
    log: Annotated[
        Path | None,
        typer.Option(
            help="File with a line for each judged phrase; a run continues after its last line.", rich_help_panel=OUTPUT
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="File to write the scores to, as JSON.", rich_help_panel=OUTPUT)
    ] = None,
    sheets: Annotated[
        Path | None,
        typer.Option(help="Folder for a contact sheet of 64 random cases of each task.", rich_help_panel=OUTPUT),
    ] = None,
) -> None:
    """Score a preset on held-out prompts, edits, questions and routes, or the planner on whole conversations."""
    from omnivideo.agent.english_rules import split_actions
    from omnivideo.evaluation.case_sheets import CaseSheets
    from omnivideo.evaluation.everything import evaluate_all
    from omnivideo.evaluation.phrases.runner import evaluate_phrases, score_phrases
    from omnivideo.evaluation.report import build_phrase_table, build_score_table, score_planner, scores_to_json

    check_evaluation(preset, phrases=phrases)
    if sheets is not None and (phrases or planner):
        raise InvalidInput("sheets", "sheets show single clips; they are not made for --phrases and --planner")
    studio = open_studio(preset, weights, device)
    with show_evaluation_progress() as on_progress:
        scores: dict[str, Score | float] = {}
        if phrases:
            judged_phrases = evaluate_phrases(
                studio.conversations, studio.omni.preset, on_progress, count=count, log=log, steps=steps
            )
            scores |= score_phrases(judged_phrases)
        elif planner:
            scores |= score_planner(studio.conversations, split_actions, count or DEFAULT_COUNT, on_progress)
        else:
            case_sheets = CaseSheets()
            scores |= evaluate_all(studio.omni, count or DEFAULT_COUNT, on_progress, case_sheets.record)
            if sheets is not None:
                case_sheets.write(sheets)
    console.print(build_phrase_table(scores) if phrases else build_score_table(scores))
    if report is not None:
        report.write_text(scores_to_json(scores))


def check_evaluation(preset: str, *, phrases: bool) -> None:
    """Raise InvalidInput if the preset cannot be evaluated in this way."""
    known = get_preset(preset)
    if known.has_scorer or (phrases and known.mllm.can_plan):
        return
    allowed = ", ".join(name for name, known in PRESETS.items() if known.has_scorer)
    raise InvalidInput("preset", f"{preset!r} has no scorer; allowed: {allowed}")


@contextmanager
def show_evaluation_progress() -> Iterator["EvaluationProgress"]:
    """Show a bar for each thing that is evaluated; yields the function to call with its name, done and total."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with LoggedProgress(*columns, console=error_console, transient=True) as bar:
        rows: dict[str, TaskID] = {}

        def on_progress(name: str, done: int, total: int) -> None:
            if name not in rows:
                rows[name] = bar.add_task(name)
            bar.update(rows[name], completed=done, total=total)

        yield on_progress


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
