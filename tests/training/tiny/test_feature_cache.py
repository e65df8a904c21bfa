"""Cached features of several sets of requests."""

import torch

from tests.support.recipes import data, fresh


def test_more_requests_of_a_task_follow_the_others(request):
    first = data(request, fresh(request))["video-editing"]
    both = first + first
    assert len(both) == 8
    for name in ("target_latents", "source_latents", "hidden_states", "text_embeddings", "visual_embeddings"):
        whole, part = getattr(both, name), getattr(first, name)
        assert all(torch.equal(whole[at], part[at % 4]) for at in range(8)), name
