"""`omnivideo train`: from a configuration to a finished run, over the synthetic world or over shards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from omnivideo.training.config import TrainingConfig
from omnivideo.training.data.sample import SkipReport
from omnivideo.training.engine.distributed.processes import ProcessContext, open_process_context
from omnivideo.training.engine.monitor import SampleRenderer
from omnivideo.training.engine.recipe import Recipe
from omnivideo.training.engine.run import RunContext
from omnivideo.training.recipes.over_shards import build_mix, build_stage_recipe, check_stage, open_dataset
from omnivideo.training.recipes.parts import check_sampling
from omnivideo.training.tiny.pipeline import TinyPipeline

SkipPrinter = Callable[[SkipReport], None]


def run_training(
    config: TrainingConfig, console: Console, print_skips: SkipPrinter, render_samples: SampleRenderer | None = None
) -> None:
    """Train what the configuration describes, in this process or as one of the processes of a launcher."""
    with open_process_context(config.processes, config.sequence_parallel, config.device) as processes:
        run = RunContext(config, processes, console, render_samples)
        if config.data is None:
            TinyPipeline(run).train()
        else:
            train_over_shards(run, config.data, print_skips)


def train_over_shards(run: RunContext, shards: str, print_skips: SkipPrinter) -> None:
    """Train a stage of any preset over shards; samples that cannot be used are reported before and after the run."""
    config = run.config
    check_stage(config)
    check_sampling(config)
    mix = build_mix(config.stills, config.clips, config.batch_scale, config.ratio, config.group_weight, *config.seeds)
    dataset, assigner = open_dataset(shards, config.size, config.frames, config.fps)

    def build_recipe() -> Recipe:
        recipe = build_stage_recipe(dataset, assigner, run, mix)
        if run.processes.is_main_process:
            print_skips(dataset.skip_report)
        return recipe

    with report_skips(dataset.skip_report, run.processes, print_skips):
        run.build_and_train(build_recipe)


@contextmanager
def report_skips(skip_report: SkipReport, processes: ProcessContext, print_skips: SkipPrinter) -> Iterator[None]:
    """Print the samples that any process skipped, at the end of a run, even if it fails."""
    try:
        yield
        skip_report.merge_skips(processes.all_gather(skip_report.skipped_samples))
    finally:
        if processes.is_main_process:
            print_skips(skip_report)
