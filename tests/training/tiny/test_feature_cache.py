"""The cached features of requests."""

import torch

from tests.support.recipes import copy_model, load_task_data


def test_cached_requests_are_concatenated(request):
    first = load_task_data(request, copy_model(request))["video-editing"]
    both = first + first
    assert len(both) == 8
    for name in ("target_latents", "source_latents", "hidden_states", "text_embeddings", "visual_embeddings"):
        features, expected = getattr(both, name), getattr(first, name)
        assert all(torch.equal(features[index], expected[index % 4]) for index in range(8)), name
