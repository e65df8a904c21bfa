"""The plan's times and steps, its documentation, and the command `omnivideo plan`."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from omnivideo.cli.main import main
from omnivideo.errors import InvalidInput
from omnivideo.presets import TINY
from omnivideo.training.planning.config import TASKS_BY_STAGE, PlanConfig
from omnivideo.training.planning.duration import estimate_sample_flops
from omnivideo.training.planning.flops import count_decoder_flops
from omnivideo.training.planning.gpus import GPUS
from omnivideo.training.planning.memory import count_stage_weights
from omnivideo.training.planning.models import count_table_parameters
from omnivideo.training.planning.plan import TrainingPlan, build_plan, check_fits

STAGE_3 = PlanConfig("stage3", GPUS["H100"], 8)


@pytest.fixture(scope="module")
def plan() -> TrainingPlan:
    return build_plan(STAGE_3)


@pytest.fixture(scope="module")
def parameters_by_part() -> dict[str, int]:
    return count_stage_weights("omnivideo-1.3b", "stage3", True).parameters_by_part | count_table_parameters()


# ---------------------------------------------------------------- time


def test_times_follow_from_the_operations(plan):
    """Checkpointing adds a forward pass of the decoder, which MFU does not count; MFU stays below the utilisation."""
    assert 0.3 < plan.mfu < 0.45
    checkpointed = build_plan(replace(STAGE_3, checkpointing=True))
    forward = count_decoder_flops(STAGE_3.preset.decoder, 7800, 2560).total / (989e12 * 0.45)
    compute_seconds = plan.step_seconds["clip"]["compute"]
    assert checkpointed.step_seconds["clip"]["compute"] - compute_seconds == pytest.approx(forward)
    assert checkpointed.step_flops == plan.step_flops
    # Four GPUs share the tokens of the decoder, but the MLLM processes every sample on each of them.
    divided = build_plan(replace(STAGE_3, sequence_parallel_size=4))
    other_seconds = compute_seconds - 3 * forward
    assert divided.step_seconds["clip"]["compute"] == pytest.approx(3 * forward / 4 + other_seconds)


def test_more_gpus_and_fewer_steps_take_less_time(plan):
    """Twice the GPUs halve the days, apart from the exchange of gradients and weights."""
    larger = build_plan(replace(STAGE_3, gpus=64))
    assert 1 / 8 < larger.days / plan.days < 1 / 3
    assert sum(larger.steps.values()) == pytest.approx(sum(plan.steps.values()) / 8)
    shorter = build_plan(replace(STAGE_3, steps=1000))
    assert sum(shorter.steps.values()) == pytest.approx(1000)
    assert shorter.days / plan.days == pytest.approx(1000 / sum(plan.steps.values()))


def test_a_step_of_several_micro_batches_exchanges_gradients_once_and_keeps_their_sum(plan):
    """The sums have 4 T = 13.931 GB, beside the activations or, on several GPUs, bf16 gradients of 2 T."""
    accumulating = build_plan(replace(STAGE_3, grad_accum_steps=3))
    assert accumulating.resident_gb == plan.resident_gb
    gradients = "gradients (bf16; own part also fp32)"
    assert accumulating.transient_gb["activations"] == pytest.approx(
        plan.transient_gb["activations"] + 13.931, abs=1e-3
    )
    assert accumulating.transient_gb[gradients] == pytest.approx(13.931 + 6.965, abs=1e-3)
    one_gpu = [build_plan(replace(STAGE_3, gpus=1, grad_accum_steps=count)).transient_gb for count in (1, 3)]
    assert [one_gpu[1][name] - one_gpu[0][name] for name in one_gpu[0]] == pytest.approx([13.931, 0], abs=1e-3)
    for kind, times in accumulating.step_seconds.items():
        assert times == plan.step_seconds[kind] | {"compute": pytest.approx(3 * plan.step_seconds[kind]["compute"])}
        assert accumulating.step_flops[kind] == pytest.approx(3 * plan.step_flops[kind])
        assert accumulating.steps[kind] == pytest.approx(plan.steps[kind] / 3)


def test_the_all_to_all_of_sequence_parallelism_grows_with_the_micro_batches():
    configs = [replace(STAGE_3, sequence_parallel_size=2, grad_accum_steps=count) for count in (1, 3)]
    seconds = [build_plan(config).step_seconds["clip"]["all-to-all"] for config in configs]
    assert seconds[1] == pytest.approx(3 * seconds[0])


def test_the_mllm_and_uncached_encoding_take_time(plan, parameters_by_part):
    """For a clip the MLLM has products with 7.52e9 weights (without both tables), and causal attention.

    Without a cache, target and source take 34.92 TFLOP each in TF32, at half the rate, and 512 words pass through
    UMT5's 4.63e9 weights.
    """
    model_flops, extra_flops = estimate_sample_flops(STAGE_3, "clip", parameters_by_part)
    no_mllm = parameters_by_part | {"mllm": parameters_by_part["lm_head"] + parameters_by_part["embeddings"]}
    flops_without_mllm, _ = estimate_sample_flops(STAGE_3, "clip", no_mllm)
    mllm_flops = model_flops.total - flops_without_mllm.total
    assert mllm_flops == pytest.approx(2 * 2048 * (8_767_123_696 - 2 * 151_936 * 4096))
    _, uncached = estimate_sample_flops(replace(STAGE_3, cached=False), "clip", parameters_by_part)
    text = 2 * 512 * (5_680_910_336 - 256_384 * 4096) + 4 * 512**2 * 4096 * 24
    assert uncached.total - extra_flops.total == pytest.approx(2 * 2 * 34.9246e12 + text, rel=1e-4)
    generation = replace(STAGE_3, recipe="stage2a", cached=False)  # without a source
    _, uncached = estimate_sample_flops(generation, "clip", parameters_by_part)
    assert uncached.total == pytest.approx(2 * 34.9246e12 + text, rel=1e-4)
    assert build_plan(replace(STAGE_3, cached=False)).mfu < plan.mfu


def test_an_epoch_has_the_samples_of_table_1(plan):
    stills, clips = (plan.steps[kind] * STAGE_3.samples_per_gpu(kind) * 8 for kind in ("still", "clip"))
    assert stills == pytest.approx(23.6e6) and clips == pytest.approx(2.6e6)


# ---------------------------------------------------------------- documentation, errors, command line


def test_the_documentation_has_the_figures_of_the_plan():
    lines = (Path(__file__).parents[3] / "docs" / "plan.md").read_text().splitlines()
    rows = {line.split("`")[1]: line for line in lines if line.startswith("| `stage")}
    assert rows.keys() == TASKS_BY_STAGE.keys()
    for recipe, row in rows.items():
        config = replace(STAGE_3, recipe=recipe)
        changes = ({}, {"checkpointing": True}, {"cached": False}, {"gpus": 1})
        default, checkpointed, uncached, one_gpu = (build_plan(replace(config, **change)) for change in changes)
        figures = [f"{count / 1e9:.2f}" for count in (default.trained_parameters, default.frozen_parameters)]
        figures += [f"{plan.required_gb:.1f}" for plan in (default, checkpointed, uncached, one_gpu)]
        figures += [f"{sum(plan.step_seconds['clip'].values()):.2f}" for plan in (default, uncached)]
        assert row == f"| `{recipe}` | {' | '.join([*figures, f'{default.days:.1f}'])} |"


def test_a_plan_that_does_not_fit_is_refused_with_changes_that_help(plan):
    check_fits(plan)
    with pytest.raises(InvalidInput, match=r"do not fit the 80 GB of one H100; it fits with --checkpointing") as caught:
        check_fits(build_plan(replace(STAGE_3, clips_per_gpu=4)))
    assert caught.value.field == "gpus"
    with pytest.raises(InvalidInput, match=r"115\.1 GB do not fit the 48 GB of one L40S; it fits with --gpus 1xH200"):
        check_fits(build_plan(replace(STAGE_3, gpu=GPUS["L40S"], gpus=1)))
    with pytest.raises(InvalidInput, match="it fits with --cached"):
        check_fits(build_plan(replace(STAGE_3, gpus=4, cached=False)))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"recipe": "vae"}, "recipe"),
        ({"recipe": "stage1_text"}, "recipe"),  # it does not train over shards
        ({"preset": TINY}, "preset"),
        ({"frames": 16}, "frames"),
        ({"sequence_parallel_size": 3}, "sequence-parallel"),
        ({"sequence_parallel_size": 8}, "sequence-parallel"),
        ({"utilisation": 0.0}, "utilisation"),
    ],
)
def test_invalid_values_are_refused_by_name(changes, field):
    with pytest.raises(InvalidInput) as caught:
        build_plan(replace(STAGE_3, **changes))
    assert caught.value.field == field


def test_the_command_prints_the_plan_or_refuses_it(monkeypatch, capsys):
    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["omnivideo", "plan", *args])
        with pytest.raises(SystemExit) as caught:
            main()
        printed = capsys.readouterr()
        return caught.value.code or 0, printed.out, printed.err

    code, text, _ = run("stage3", "--gpus", "8xH100")
    assert code == 0 and "3,482,693,440" in text and "days" in text and "optimizer" in text
    # No checkpointing is the default, as in `omnivideo train`.
    assert run("stage3", "--no-checkpointing")[1] == text != run("stage3", "--checkpointing")[1]
    assert "3 x 1 x 7,800 tokens" in run("stage3", "--grad-accum", "3", "--checkpointing")[1]
    code, text, error = run("stage3", "--gpus", "1xL40S")
    assert code == 2 and "days" in text and error.startswith("error: gpus: ") and error.count("\n") == 1
    code, text, error = run("stage9")
    assert code == 2 and error.startswith("error: recipe: 'stage9' has no plan")
