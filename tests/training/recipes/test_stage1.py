"""The loss of stage 1 on text."""

import math

import pytest
import torch

from omnivideo.models.mllm import VISUAL_TOKENS
from omnivideo.training.recipes import stage1


def test_visual_tokens_do_not_count_in_the_loss_on_text(mllm_tokenizer):
    """The logits of visual tokens do not change the loss, and labels that are visual tokens are ignored."""
    visual_tokens = torch.tensor(mllm_tokenizer.convert_tokens_to_ids(list(VISUAL_TOKENS)))
    labels = torch.tensor([[-100, 5, int(visual_tokens[0])]])
    logits = torch.zeros(1, 3, len(mllm_tokenizer))
    expected, _ = stage1.text_only_loss(logits, labels, visual_tokens)
    logits[:, :, visual_tokens] = 9.0
    loss, _ = stage1.text_only_loss(logits, labels, visual_tokens)
    assert loss == expected == pytest.approx(math.log(len(mllm_tokenizer) - len(visual_tokens)), abs=1e-4)
