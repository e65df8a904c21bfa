"""The plan's formulas against torch's own counters at tiny size, and what the command says."""

import sys
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from omnivideo.cli import main
from omnivideo.errors import InvalidInput
from omnivideo.models.bridge import VisionHead, VisualContextAdapter
from omnivideo.models.omni import build_decoder
from omnivideo.presets import TINY
from omnivideo.training.flops import (
    GPUS,
    decoder_flops,
    gpus_of,
    mfu,
    query_transformer_flops,
    tflops_per_second,
    visual_context_flops,
)
from omnivideo.training.plan import Setting, check, decoder_activations, plan, query_transformer_activations

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
        assert counted(lambda: velocity(model, given)) == samples * decoder_flops(TINY.decoder, TOKENS, CONDITION).total


def test_training_is_three_times_the_forward_and_through_frozen_weights_twice_and_attention_three_times():
    """But for what lies before the first gradient: the embeddings, and half of the first frozen block (of eight)."""
    forward = decoder_flops(TINY.decoder, TOKENS, CONDITION)
    for trained, expected, share in ((True, forward.trained, 0.002), (False, forward.passed, 0.03)):
        model, given = decoder(trained), inputs()
        found = counted(lambda: velocity(model, given).sum().backward())  # noqa: B023
        assert found == pytest.approx(expected.total, rel=share) and found <= expected.total


def test_attention_is_a_part_of_its_own_and_grows_with_the_square():
    short, long = (decoder_flops(TINY.decoder, tokens, 0) for tokens in (100, 200))
    assert long.attention == 4 * short.attention
    assert 1.9 < long.weights / short.weights < 2.0


def test_the_joining_parts_are_counted_to_the_last_operation():
    size, context = TINY.vision_head, TINY.visual_context
    head = VisionHead(size.dim_in, size.width, size.queries, size.layers, size.heads).train()
    states = torch.randn(1, 30, size.dim_in)
    assert counted(lambda: head(states)) == query_transformer_flops(size, 30).total
    adapter = VisualContextAdapter(16, context.hidden, TINY.text_width, context.kernel, False)
    with torch.no_grad():
        found = counted(lambda: adapter(torch.randn(1, 16, *GRID)))
    assert found == visual_context_flops(TINY, TOKENS).total


def test_rates_and_shares_of_a_peak():
    assert tflops_per_second(8e12, 2.0, gpus=4) == 1.0
    assert mfu(989e12 * 3, 6.0, GPUS["H100"].tflops) == pytest.approx(0.5)


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
    formula = decoder_activations(TINY.decoder, TOKENS, CONDITION, trained, False, dtype.itemsize)
    # A GPU's RMS norm keeps its input; a CPU's keeps it in fp32, and its normalised values where weights are trained.
    rows = TINY.decoder["num_layers"] * (3 * TOKENS + CONDITION) * 192
    formula += rows * (4 - dtype.itemsize + (4 if trained else 0))
    if not trained:  # the first block's self-attention comes before the condition, which is what has gradients
        formula -= TOKENS * 192 * (4 + 4 * dtype.itemsize + 2 * 4)
    assert found == pytest.approx(2 * formula, rel=0.02)


def test_what_the_vision_head_keeps_for_the_backward_pass():
    size = TINY.vision_head
    head = VisionHead(size.dim_in, size.width, size.queries, size.layers, size.heads).train()
    states = torch.randn(1, 30, size.dim_in)
    found = kept(lambda: head(states), head)
    assert found == pytest.approx(query_transformer_activations(size, 30, 4), rel=0.1)


def test_checkpointing_keeps_the_blocks_inputs_alone():
    model, given = decoder(), inputs()
    model.enable_gradient_checkpointing()
    found = kept(lambda: velocity(model, given), model)
    whole = decoder_activations(TINY.decoder, TOKENS, CONDITION, True, True, 4)
    one_block = decoder_activations(TINY.decoder | {"num_layers": 1}, TOKENS, CONDITION, True, False, 4)
    ends = decoder_activations(TINY.decoder | {"num_layers": 0}, TOKENS, CONDITION, True, False, 4)
    assert found == pytest.approx(whole - (one_block - ends), rel=0.15)  # the block that is computed again comes later


# ---------------------------------------------------------------- the plan


STAGE_3 = Setting("stage3", GPUS["H100"], 8)


@pytest.fixture(scope="module")
def made():
    return plan(STAGE_3)


def test_parameters_are_those_of_the_released_model(made):
    """`model.pt` with the six markers is trained; the rest is cached, and its count is that of the meta models."""
    assert made.trained == 3_482_668_864 + 6 * 4096 and made.frozen == 0
    assert 14e9 < made.away < 15e9  # the MLLM's 8.8, UMT5-XXL's 5.7, the VAE's 0.1
    frozen = plan(replace(STAGE_3, recipe="stage2b"))
    assert frozen.trained == 1_902_141_440 + 6_690_304 + 6 * 4096
    assert frozen.trained + frozen.frozen == made.trained


def test_zero_1_divides_the_optimizer_and_the_average_alone(made):
    alone = plan(replace(STAGE_3, gpus=1))
    for name, value in made.memory.items():
        divided = any(word in name for word in ("optimizer", "average", "share"))
        assert alone.memory[name] == pytest.approx(value * (8 if divided else 1)), name
    assert made.memory["weights (bf16)"] == pytest.approx(2 * made.trained / 1e9)


def test_what_saves_memory_saves_it(made):
    kept_all = plan(replace(STAGE_3, checkpointing=False))
    assert kept_all.memory["activations"] > 4 * made.memory["activations"]
    shared = plan(replace(STAGE_3, checkpointing=False, sequence=4))
    assert 0.25 < shared.memory["activations"] / kept_all.memory["activations"] < 0.4
    assert plan(replace(STAGE_3, cached=False)).memory["weights (bf16)"] > 3 * made.memory["weights (bf16)"]


def test_times_follow_from_the_operations(made):
    """Twice the GPUs halve the days but for the exchange; checkpointing adds a third; MFU is under the utilisation."""
    assert 0.3 < made.mfu < 0.45
    free = plan(replace(STAGE_3, checkpointing=False))
    assert made.step["clip"]["compute"] / free.step["clip"]["compute"] == pytest.approx(4 / 3, rel=0.02)
    more = plan(replace(STAGE_3, gpus=64))
    assert 1 / 8 < more.days / made.days < 1 / 3 and sum(more.steps.values()) == pytest.approx(
        sum(made.steps.values()) / 8
    )
    some = plan(replace(STAGE_3, steps=1000))
    assert sum(some.steps.values()) == pytest.approx(1000)
    assert some.days / made.days == pytest.approx(1000 / sum(made.steps.values()))


def test_an_epoch_is_table_1_in_its_ratio(made):
    stills, clips = (made.steps[kind] * STAGE_3.count(kind) * 8 for kind in ("still", "clip"))
    assert stills == pytest.approx(23.6e6) and clips == pytest.approx(2.6e6)


def test_what_does_not_fit_is_refused_with_what_would(made):
    check(made)
    with pytest.raises(InvalidInput, match=r"do not fit the 80 GB of one H100; it fits with --checkpointing") as caught:
        check(plan(replace(STAGE_3, checkpointing=False, batch=4)))
    assert caught.value.field == "gpus"
    with pytest.raises(
        InvalidInput, match=r"do not fit the 48 GB of one L40S; it fits with --gpus 2xL40S|4xL40S|1xA100"
    ):
        check(plan(replace(STAGE_3, gpu=GPUS["L40S"], gpus=1)))
    with pytest.raises(InvalidInput, match="it fits with --cached"):
        check(plan(replace(STAGE_3, gpu=GPUS["A100-40"], gpus=8, cached=False)))


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"recipe": "vae"}, "recipe"),
        ({"preset": TINY}, "preset"),
        ({"frames": 16}, "frames"),
        ({"sequence": 3}, "sequence-parallel"),
        ({"sequence": 8}, "sequence-parallel"),
        ({"utilisation": 0.0}, "utilisation"),
    ],
)
def test_settings_that_cannot_be_are_named(changed, field):
    with pytest.raises(InvalidInput) as caught:
        plan(replace(STAGE_3, **changed))
    assert caught.value.field == field


@pytest.mark.parametrize("text", ["H100", "xH100", "0xH100", "8xV100", "-1xH100"])
def test_gpus_that_are_not_known_are_named(text):
    with pytest.raises(InvalidInput, match="gpus"):
        gpus_of(text)
    assert gpus_of("16xH100") == (16, GPUS["H100"])


def test_the_command_line_prints_the_plan_or_refuses_it(monkeypatch, capsys):
    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["omnivideo", "train", *args, "--plan"])
        with pytest.raises(SystemExit) as caught:
            main()
        printed = capsys.readouterr()
        return caught.value.code or 0, printed.out, printed.err

    code, text, _ = run("stage3", "--gpus", "8xH100")
    assert code == 0 and "3,482,693,440" in text and "days" in text and "optimizer" in text
    code, text, error = run("stage3", "--gpus", "1xL40S", "--no-checkpointing")
    assert code == 2 and "days" in text and error.startswith("error: gpus: ") and error.count("\n") == 1
    code, text, error = run("stage9")
    assert code == 2 and error.startswith("error: recipe: 'stage9' has no plan")
