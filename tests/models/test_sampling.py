"""Guidance: both conditions in one pass of the decoder, or in two, have the same velocity."""

import pytest
import torch

from omnivideo.models import sampling
from omnivideo.models.sampling import Expert, expand_timestep, predict_velocity
from tests.support.tiny_decoder import build_tiny_decoder, make_inputs


@pytest.mark.parametrize("given_frames", [0, 1])
@torch.no_grad()
def test_guidance_in_one_pass_has_the_velocity_of_two(monkeypatch, given_frames):
    decoder, batches = build_tiny_decoder(trained=False).eval(), []
    latents, times, condition = make_inputs(samples=2)
    expert = Expert(decoder, condition, torch.zeros_like(condition))
    times = expand_timestep(decoder, latents, times, given_frames)
    decoder.register_forward_pre_hook(lambda _, arguments: batches.append(len(arguments[0])))
    once = predict_velocity(expert, latents, times, 3.0)
    monkeypatch.setattr(sampling, "MAX_TOKENS_IN_ONE_PASS", 95)  # of the 2 x 48 tokens
    twice = predict_velocity(expert, latents, times, 3.0)
    assert batches == [4, 2, 2]
    torch.testing.assert_close(once, twice, rtol=0, atol=1e-5)
    predict_velocity(expert, latents, times, 1.0)
    assert batches == [4, 2, 2, 2]


@torch.no_grad()
def test_conditions_of_different_lengths_take_two_passes():
    decoder, batches = build_tiny_decoder(trained=False).eval(), []
    latents, times, condition = make_inputs()
    decoder.register_forward_pre_hook(lambda _, arguments: batches.append(len(arguments[0])))
    predict_velocity(Expert(decoder, condition, condition[:, :1]), latents, times, 3.0)
    assert batches == [1, 1]
