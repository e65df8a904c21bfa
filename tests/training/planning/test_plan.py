"""The plan's formulas against torch's own counters at tiny size, and what the command says."""

import sys
from dataclasses import replace
from pathlib import Path
from weakref import finalize

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from omnivideo.cli.main import main
from omnivideo.errors import InvalidInput
from omnivideo.models.bridge import VisionHead, VisualContextAdapter
from omnivideo.models.omni import build_decoder
from omnivideo.presets import TINY
from omnivideo.training.planning.config import TASKS_BY_STAGE, PlanConfig
from omnivideo.training.planning.duration import estimate_sample_flops
from omnivideo.training.planning.flops import (
    count_decoder_flops,
    count_query_transformer_flops,
    count_visual_context_flops,
)
from omnivideo.training.planning.gpus import GPUS, compute_mfu, parse_gpus, tflops_per_second
from omnivideo.training.planning.memory import (
    FIXED_OVERHEAD_GB,
    count_stage_weights,
    estimate_activations,
    estimate_decoder_activations,
    estimate_encoding_bytes,
    estimate_query_transformer_activations,
    estimate_resident_gb,
)
from omnivideo.training.planning.models import count_table_parameters
from omnivideo.training.planning.plan import build_plan, check_fits

GRID, CONDITION = (3, 8, 8), 40
TOKENS = 48


def counted(run) -> int:
    """All operations, attention in the form that the counter knows on a CPU."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def decoder(trained: bool = True):
    torch.manual_seed(0)
    return build_decoder(TINY).requires_grad_(trained).train()


def inputs(samples: int = 1, of_condition: bool = True):
    condition = torch.randn(samples, CONDITION, 192, requires_grad=of_condition)
    return torch.randn(samples, 16, *GRID), torch.full((samples,), 500.0), condition


def velocity(model, given):
    return model(*given, return_dict=False)[0]


# ---------------------------------------------------------------- operations


@pytest.mark.parametrize("samples", [1, 3])
def test_the_decoders_forward_is_counted_to_the_last_operation(samples):
    model, given = decoder(), inputs(samples)
    with torch.no_grad():
        assert (
            counted(lambda: velocity(model, given))
            == samples * count_decoder_flops(TINY.decoder, TOKENS, CONDITION).total
        )


def test_training_is_three_times_the_forward_and_through_frozen_weights_twice_and_attention_three_times():
    """But for what lies before the first gradient: the embeddings, and half of the first frozen block (of eight)."""
    forward = count_decoder_flops(TINY.decoder, TOKENS, CONDITION)
    for trained, expected, share in ((True, forward.with_backward, 0.002), (False, forward.with_frozen_backward, 0.03)):
        model, given = decoder(trained), inputs()
        found = counted(lambda: velocity(model, given).sum().backward())  # noqa: B023
        assert found == pytest.approx(expected.total, rel=share) and found <= expected.total


def test_attention_is_a_part_of_its_own_and_grows_with_the_square():
    short, long = (count_decoder_flops(TINY.decoder, tokens, 0) for tokens in (100, 200))
    assert long.attention == 4 * short.attention
    assert 1.9 < long.weights / short.weights < 2.0


def test_the_joining_parts_are_counted_to_the_last_operation():
    size, context = TINY.vision_head, TINY.visual_context
    head = VisionHead(size.input_dim, size.width, size.num_queries, size.num_layers, size.num_heads).train()
    states = torch.randn(1, 30, size.input_dim)
    assert counted(lambda: head(states)) == count_query_transformer_flops(size, 30).total
    adapter = VisualContextAdapter(16, context.hidden_dim, TINY.text_width, context.kernel_size, False)
    with torch.no_grad():
        found = counted(lambda: adapter(torch.randn(1, 16, *GRID)))
    assert found == count_visual_context_flops(TINY, TOKENS).total


def test_rates_and_shares_of_a_peak():
    assert tflops_per_second(8e12, 2.0, gpus=4) == 1.0
    assert compute_mfu(989e12 * 3, 6.0, GPUS["H100"].peak_tflops) == pytest.approx(0.5)


# ---------------------------------------------------------------- memory


def kept(run, model) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    del out
    return sum(found.values())


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_decoder_keeps_for_the_backward_pass(trained, dtype):
    model = decoder(trained).to(dtype)
    given = [value.to(dtype) for value in inputs(2)]
    found = kept(lambda: velocity(model, given), model)
    formula = estimate_decoder_activations(TINY.decoder, TOKENS, CONDITION, trained, False, dtype.itemsize)
    # A GPU's RMS norm keeps its input; a CPU's keeps it in fp32, and its normalised values where weights are trained.
    rows = TINY.decoder["num_layers"] * (3 * TOKENS + CONDITION) * 192
    formula += rows * (4 - dtype.itemsize + (4 if trained else 0))
    if not trained:  # the first block's self-attention comes before the condition, which is what has gradients
        formula -= TOKENS * 192 * (4 + 4 * dtype.itemsize + 2 * 4)
    assert found == pytest.approx(2 * formula, rel=0.02)


def test_what_the_vision_head_keeps_for_the_backward_pass():
    size = TINY.vision_head
    head = VisionHead(size.input_dim, size.width, size.num_queries, size.num_layers, size.num_heads).train()
    states = torch.randn(1, 30, size.input_dim)
    found = kept(lambda: head(states), head)
    assert found == pytest.approx(estimate_query_transformer_activations(size, 30, 4), rel=0.1)


def test_checkpointing_keeps_the_blocks_inputs_alone():
    model, given = decoder(), inputs()
    model.enable_gradient_checkpointing()
    found = kept(lambda: velocity(model, given), model)
    whole = estimate_decoder_activations(TINY.decoder, TOKENS, CONDITION, True, True, 4)
    one_block = estimate_decoder_activations(TINY.decoder | {"num_layers": 1}, TOKENS, CONDITION, True, False, 4)
    ends = estimate_decoder_activations(TINY.decoder | {"num_layers": 0}, TOKENS, CONDITION, True, False, 4)
    assert found == pytest.approx(whole - (one_block - ends), rel=0.15)  # the block that is computed again comes later


# ---------------------------------------------------------------- the plan


STAGE_3 = PlanConfig("stage3", GPUS["H100"], 8)
SIZES = count_stage_weights("omnivideo-1.3b", "stage3", True).parameters_by_part | count_table_parameters()


@pytest.fixture(scope="module")
def made():
    return build_plan(STAGE_3)


def test_parameters_are_those_of_the_released_model(made):
    """`model.pt` with the six markers is trained; MLLM and SigLIP2 are frozen beside it, the rest is cached."""
    assert made.trained_parameters == 3_482_668_864 + 6 * 4096
    assert made.frozen_parameters == 8_767_123_696 + 428_225_600
    assert made.offloaded_parameters == 5_680_910_336 + 126_892_531  # UMT5-XXL and the VAE
    frozen = build_plan(replace(STAGE_3, recipe="stage2b"))
    assert frozen.trained_parameters == 1_902_141_440 + 6_690_304 + 6 * 4096
    assert (
        frozen.trained_parameters + frozen.frozen_parameters == made.trained_parameters + 8_767_123_696
    )  # nothing is aligned
    uncached = build_plan(replace(STAGE_3, cached=False))
    assert (
        uncached.frozen_parameters == made.frozen_parameters + made.offloaded_parameters
        and uncached.offloaded_parameters == 0
    )
    assert (
        build_plan(replace(STAGE_3, recipe="stage1", cached=False)).offloaded_parameters == made.offloaded_parameters
    )  # there is nothing to cache


def test_memory_of_zero_1_by_hand(made):
    """Stage 3 on 8 GPUs, T = 3,482,693,440 weights trained and F = 9,195,349,296 frozen.

    2 T = 6.965, 12 T / 8 = 5.224, 4 T / 8 = 1.741, 2 F = 18.391; in turn the activations, or the gradients with a
    bucket of them, 2 (T + 5e8) = 7.965, which is more than the share thrice, 8 T / 8 = 3.483.
    """
    assert list(made.resident_gb.values()) == pytest.approx([6.965, 5.224, 1.741, 18.391, 2.5], abs=1e-3)
    # A clip's: 30 blocks of 7800 (2 (13 d + 2 f) + 24 d + 96) + 6 d 2560 bytes, d = 1536, f = 8960, are 27.098 GB; the
    # decoder's ends 0.154; vision head, adapter and visual context 0.296 + 0.539 + 0.050.  Five stills have more: their
    # five conditions are as long as the clip's.
    assert estimate_activations(STAGE_3, "clip") / 1e9 == pytest.approx(
        27.098 + 0.154 + 0.296 + 0.539 + 0.050, abs=2e-3
    )
    assert list(made.transient_gb.values()) == pytest.approx(
        [estimate_activations(STAGE_3, "still") / 1e9, 7.965], abs=1e-3
    )
    assert made.required_gb == pytest.approx(34.821 + 31.556, abs=2e-3)
    two = build_plan(replace(STAGE_3, gpus=2))  # the share thrice, 8 T / 2
    assert two.transient_gb["gradients (bf16; own part also fp32)"] == pytest.approx(13.931, abs=1e-3)


def test_memory_of_one_process_by_hand():
    """Stage 2b on one GPU, by the plain trainer: T = 1,908,856,320, F = 8,767,123,696 + 1,573,837,120.

    4 T = 7.635, 8 T = 15.271, 4 T = 7.635, 2 F = 20.682; in turn activations with bf16 copies, 2 T = 3.818, or
    gradients, 4 T.
    """
    setting = replace(STAGE_3, recipe="stage2b", gpus=1)
    made = build_plan(setting)
    assert list(made.resident_gb.values()) == pytest.approx([7.635, 15.271, 7.635, 20.682, 2.5], abs=1e-3)
    kept = estimate_activations(setting, "still") / 1e9
    assert list(made.transient_gb.values()) == pytest.approx([kept + 3.818, 7.635], abs=1e-3)
    assert made.required_gb == pytest.approx(53.723 + kept + 3.818, abs=2e-3)
    # Stage 2a averages nothing: T = 1.902 of the adapter, F = 12.250 - 1.902 at two bytes.
    adapter = build_plan(replace(setting, recipe="stage2a"))
    assert list(adapter.resident_gb.values()) == pytest.approx([7.609, 15.217, 0, 20.695, 2.5], abs=1e-3)


@pytest.mark.parametrize(
    ("stage", "gpus", "one", "two", "frozen", "copies"),
    [
        ("stage2b", 1, 57.9, 72.2, 4 * 1.5738, 2 * (1.9089 + 1.4190)),
        ("stage3", 1, 85.4, 108.0, 0.0, 2 * 3.4827),
    ],
)
def test_memory_is_what_was_measured(stage, gpus, one, two, frozen, copies):
    """On an H200 with one clip and two (docs/training.md), when all was loaded in fp32 and the MLLM was not there: two
    clips less one are the activations of one, and without them one clip's step is what the plan says is always there.
    Autocast's copies were of the frozen decoder as well."""
    trained = count_stage_weights("omnivideo-1.3b", stage, True).trained_parameters
    there = sum(estimate_resident_gb(trained, int(frozen * 1e9), True, gpus).values()) - FIXED_OVERHEAD_GB
    assert there + copies == pytest.approx(one - (two - one), abs=0.3)
    kept = estimate_activations(replace(STAGE_3, recipe=stage), "clip") / 1e9
    assert 1 < kept / (two - one) < 1.3  # the blocks were compiled, which keep less


def test_what_saves_memory_saves_it(made):
    few = build_plan(replace(STAGE_3, checkpointing=True))
    assert made.transient_gb["activations"] > 4 * few.transient_gb["activations"]
    shared = build_plan(replace(STAGE_3, sequence_parallel_size=4))
    assert 0.25 < shared.transient_gb["activations"] / made.transient_gb["activations"] < 0.4
    uncached = build_plan(replace(STAGE_3, cached=False))
    assert sum(uncached.resident_gb.values()) - sum(made.resident_gb.values()) == pytest.approx(
        2 * 5.6809 + 4 * 0.1269, abs=1e-3
    )


class Live(TorchDispatchMode):
    """The most bytes that are alive at a time, each storage once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            storage = one.untyped_storage() if isinstance(one, torch.Tensor) and one._base is None else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return out

    def gone(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.now -= size


@pytest.mark.parametrize(("kind", "frames", "together"), [("still", 1, 3), ("clip", 17, 1)])
def test_what_the_vae_works_in(kind, frames, together):
    small = replace(STAGE_3, width=208, height=128)
    with torch.device("meta"):
        vae, pixels = AutoencoderKLWan(**STAGE_3.preset.vae), torch.empty(together, 3, frames, 128, 208)
    with torch.no_grad(), Live() as live:
        vae.encode(pixels)
    many = {"still": min(8, 2 * small.stills_per_gpu), "clip": 1}[kind] / together
    assert estimate_encoding_bytes(small, kind) == pytest.approx(live.most * many, rel=0.1)
    uncached = build_plan(replace(STAGE_3, cached=False, checkpointing=True))
    assert (
        uncached.transient_gb["encoding (fp32)"]
        == estimate_encoding_bytes(STAGE_3, "still") / 1e9
        == max(uncached.transient_gb.values())
    )


def test_times_follow_from_the_operations(made):
    """Twice the GPUs halve the days but for the exchange; checkpointing adds a third of the decoder's; MFU is under the
    utilisation."""
    assert 0.3 < made.mfu < 0.45
    again = build_plan(replace(STAGE_3, checkpointing=True))
    forward = count_decoder_flops(STAGE_3.preset.decoder, 7800, 2560).total / (989e12 * 0.45)
    assert again.step_seconds["clip"]["compute"] - made.step_seconds["clip"]["compute"] == pytest.approx(forward)
    assert again.step_flops == made.step_flops  # MFU does not count it
    shared = build_plan(
        replace(STAGE_3, sequence_parallel_size=4)
    )  # of the tokens; the MLLM sees every sample on each of the four
    rest = made.step_seconds["clip"]["compute"] - 3 * forward
    assert shared.step_seconds["clip"]["compute"] == pytest.approx(3 * forward / 4 + rest)
    more = build_plan(replace(STAGE_3, gpus=64))
    assert 1 / 8 < more.days / made.days < 1 / 3 and sum(more.steps.values()) == pytest.approx(
        sum(made.steps.values()) / 8
    )
    some = build_plan(replace(STAGE_3, steps=1000))
    assert sum(some.steps.values()) == pytest.approx(1000)
    assert some.days / made.days == pytest.approx(1000 / sum(made.steps.values()))


def test_a_step_of_several_passes_exchanges_once_and_keeps_what_they_add_up_to(made):
    """4 T = 13.931 GB beside the activations; of several processes also beside a pass's bf16 gradients, 2 T."""
    many = build_plan(replace(STAGE_3, grad_accum_steps=3))
    assert many.resident_gb == made.resident_gb
    assert many.transient_gb["activations"] == pytest.approx(made.transient_gb["activations"] + 13.931, abs=1e-3)
    assert many.transient_gb["gradients (bf16; own part also fp32)"] == pytest.approx(13.931 + 6.965, abs=1e-3)
    alone, several = (build_plan(replace(STAGE_3, gpus=1, grad_accum_steps=passes)).transient_gb for passes in (1, 3))
    assert [several[name] - alone[name] for name in alone] == pytest.approx([13.931, 0], abs=1e-3)
    for kind, times in many.step_seconds.items():
        assert times == made.step_seconds[kind] | {"compute": pytest.approx(3 * made.step_seconds[kind]["compute"])}
        assert many.step_flops[kind] == pytest.approx(3 * made.step_flops[kind])
        assert many.steps[kind] == pytest.approx(made.steps[kind] / 3)
    shared = [
        build_plan(replace(STAGE_3, sequence_parallel_size=2, grad_accum_steps=passes)).step_seconds["clip"][
            "all-to-all"
        ]
        for passes in (1, 3)
    ]
    assert shared[1] == pytest.approx(3 * shared[0])


def test_the_mllm_and_what_is_not_cached_take_time(made):
    """Of a clip: the MLLM's products with its 7.52e9 weights (without both tables) and its causal attention; uncached,
    target and source at 34.92 TFLOP in TF32, which has half the rate, and 512 words through UMT5's 4.63e9 weights."""
    own, beside = estimate_sample_flops(STAGE_3, "clip", SIZES)
    without, _ = estimate_sample_flops(STAGE_3, "clip", SIZES | {"mllm": SIZES["lm_head"] + SIZES["embeddings"]})
    assert (own + without * -1).total == pytest.approx(2 * 2048 * (8_767_123_696 - 2 * 151_936 * 4096))
    _, uncached = estimate_sample_flops(replace(STAGE_3, cached=False), "clip", SIZES)
    text = 2 * 512 * (5_680_910_336 - 256_384 * 4096) + 4 * 512**2 * 4096 * 24
    assert (uncached + beside * -1).total == pytest.approx(2 * 2 * 34.9246e12 + text, rel=1e-4)
    generated = replace(STAGE_3, recipe="stage2a")
    _, uncached = estimate_sample_flops(replace(generated, cached=False), "clip", SIZES)
    assert uncached.total == pytest.approx(2 * 34.9246e12 + text, rel=1e-4)  # no source
    assert build_plan(replace(STAGE_3, cached=False)).mfu < made.mfu


def test_an_epoch_is_table_1_in_its_ratio(made):
    stills, clips = (made.steps[kind] * STAGE_3.samples_per_gpu(kind) * 8 for kind in ("still", "clip"))
    assert stills == pytest.approx(23.6e6) and clips == pytest.approx(2.6e6)


def test_the_figures_of_the_documentation_are_the_plans():
    lines = (Path(__file__).parents[3] / "docs" / "plan.md").read_text().splitlines()
    rows = {line.split("`")[1]: line for line in lines if line.startswith("| `stage")}
    assert rows.keys() == TASKS_BY_STAGE.keys()
    for recipe, row in rows.items():
        setting = replace(STAGE_3, recipe=recipe)
        changes = ({}, {"checkpointing": True}, {"cached": False}, {"gpus": 1})
        some, few, uncached, alone = (build_plan(replace(setting, **change)) for change in changes)
        figures = [f"{count / 1e9:.2f}" for count in (some.trained_parameters, some.frozen_parameters)]
        figures += [f"{one.required_gb:.1f}" for one in (some, few, uncached, alone)]
        figures += [f"{sum(one.step_seconds['clip'].values()):.2f}" for one in (some, uncached)]
        assert row == f"| `{recipe}` | {' | '.join([*figures, f'{some.days:.1f}'])} |"


def test_what_does_not_fit_is_refused_with_what_would(made):
    check_fits(made)
    with pytest.raises(InvalidInput, match=r"do not fit the 80 GB of one H100; it fits with --checkpointing") as caught:
        check_fits(build_plan(replace(STAGE_3, clips_per_gpu=4)))
    assert caught.value.field == "gpus"
    with pytest.raises(InvalidInput, match=r"115\.1 GB do not fit the 48 GB of one L40S; it fits with --gpus 1xH200"):
        check_fits(build_plan(replace(STAGE_3, gpu=GPUS["L40S"], gpus=1)))
    with pytest.raises(InvalidInput, match="it fits with --cached"):
        check_fits(build_plan(replace(STAGE_3, gpus=4, cached=False)))


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"recipe": "vae"}, "recipe"),
        ({"recipe": "stage1_text"}, "recipe"),  # does not train over shards
        ({"preset": TINY}, "preset"),
        ({"frames": 16}, "frames"),
        ({"sequence_parallel_size": 3}, "sequence-parallel"),
        ({"sequence_parallel_size": 8}, "sequence-parallel"),
        ({"utilisation": 0.0}, "utilisation"),
    ],
)
def test_settings_that_cannot_be_are_named(changed, field):
    with pytest.raises(InvalidInput) as caught:
        build_plan(replace(STAGE_3, **changed))
    assert caught.value.field == field


@pytest.mark.parametrize("text", ["H100", "xH100", "0xH100", "8xV100", "-1xH100"])
def test_gpus_that_are_not_known_are_named(text):
    with pytest.raises(InvalidInput, match="gpus"):
        parse_gpus(text)
    assert parse_gpus("16xH100") == (16, GPUS["H100"])


def test_the_command_line_prints_the_plan_or_refuses_it(monkeypatch, capsys):
    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["omnivideo", "plan", *args])
        with pytest.raises(SystemExit) as caught:
            main()
        printed = capsys.readouterr()
        return caught.value.code or 0, printed.out, printed.err

    code, text, _ = run("stage3", "--gpus", "8xH100")
    assert code == 0 and "3,482,693,440" in text and "days" in text and "optimizer" in text
    assert run("stage3", "--no-checkpointing")[1] == text != run("stage3", "--checkpointing")[1]  # as `train` does it
    assert "3 x 1 x 7,800 tokens" in run("stage3", "--grad-accum", "3", "--checkpointing")[1]
    code, text, error = run("stage3", "--gpus", "1xL40S")
    assert code == 2 and "days" in text and error.startswith("error: gpus: ") and error.count("\n") == 1
    code, text, error = run("stage9")
    assert code == 2 and error.startswith("error: recipe: 'stage9' has no plan")
