"""The loss of stage 1 on text."""

import math

import pytest
import torch

from omnivideo.models.mllm import VISUAL_TOKENS
from omnivideo.training.recipes import stage1


def test_text_is_learned_as_it_is_said(mllm_tokenizer):
    """A visual token that would come up in a text costs nothing, and none is asked for there."""
    routes = torch.tensor(mllm_tokenizer.convert_tokens_to_ids(list(VISUAL_TOKENS)))
    labels = torch.tensor([[-100, 5, int(routes[0])]])
    logits = torch.zeros(1, 3, len(mllm_tokenizer))
    expected, _ = stage1.text_only_loss(logits, labels, routes)
    logits[:, :, routes] = 9.0
    value, _ = stage1.text_only_loss(logits, labels, routes)
    assert value == expected == pytest.approx(math.log(len(mllm_tokenizer) - len(routes)), abs=1e-4)
