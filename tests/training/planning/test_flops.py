"""The counts of operations agree with torch's own counter for the tiny preset."""

from collections.abc import Callable

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from omnivideo.errors import InvalidInput
from omnivideo.models.bridge import VisionHead, VisualContextAdapter
from omnivideo.presets import TINY
from omnivideo.training.planning.flops import (
    count_decoder_flops,
    count_query_transformer_flops,
    count_visual_context_flops,
)
from omnivideo.training.planning.gpus import GPUS, compute_mfu, parse_gpus, tflops_per_second
from tests.support.tiny_decoder import CONDITION_TOKENS, GRID, TOKENS, build_tiny_decoder, make_inputs, predict_velocity


def count_operations(run: Callable[[], object]) -> int:
    """Return all operations of `run`, with attention in the form that the counter supports on a CPU."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("samples", [1, 3])
def test_the_decoders_forward_pass_is_counted_exactly(samples):
    decoder, inputs = build_tiny_decoder(), make_inputs(samples)
    with torch.no_grad():
        assert (
            count_operations(lambda: predict_velocity(decoder, inputs))
            == samples * count_decoder_flops(TINY.decoder, TOKENS, CONDITION_TOKENS).total
        )


@pytest.mark.parametrize(("trained", "tolerance"), [(True, 0.002), (False, 0.03)])
def test_training_costs_three_forward_passes_and_less_through_frozen_weights(trained, tolerance):
    """What precedes the first gradient costs less: the embeddings, and half of the first of eight frozen blocks."""
    forward = count_decoder_flops(TINY.decoder, TOKENS, CONDITION_TOKENS)
    expected = forward.with_backward if trained else forward.with_frozen_backward
    decoder, inputs = build_tiny_decoder(trained), make_inputs()
    operations = count_operations(lambda: compute_gradients(decoder, inputs))
    assert operations == pytest.approx(expected.total, rel=tolerance) and operations <= expected.total


def compute_gradients(decoder: WanTransformer3DModel, inputs: tuple[Tensor, ...]) -> None:
    predict_velocity(decoder, inputs).sum().backward()


def test_attention_is_separate_and_grows_with_the_square():
    short, long = (count_decoder_flops(TINY.decoder, tokens, 0) for tokens in (100, 200))
    assert long.attention == 4 * short.attention
    assert 1.9 < long.weights / short.weights < 2.0


def test_the_bridge_is_counted_exactly():
    size, context = TINY.vision_head, TINY.visual_context
    head = VisionHead(size.input_dim, size.width, size.num_queries, size.num_layers, size.num_heads).train()
    states = torch.randn(1, 30, size.input_dim)
    assert count_operations(lambda: head(states)) == count_query_transformer_flops(size, 30).total
    adapter = VisualContextAdapter(16, context.hidden_dim, TINY.text_width, context.kernel_size, False)
    with torch.no_grad():
        operations = count_operations(lambda: adapter(torch.randn(1, 16, *GRID)))
    assert operations == count_visual_context_flops(TINY, TOKENS).total


def test_rates_and_fractions_of_a_peak():
    assert tflops_per_second(8e12, 2.0, gpus=4) == 1.0
    assert compute_mfu(989e12 * 3, 6.0, GPUS["H100"].peak_tflops) == pytest.approx(0.5)


@pytest.mark.parametrize("text", ["H100", "xH100", "0xH100", "8xV100", "-1xH100"])
def test_unknown_gpus_are_refused(text):
    with pytest.raises(InvalidInput, match="gpus"):
        parse_gpus(text)
    assert parse_gpus("16xH100") == (16, GPUS["H100"])
