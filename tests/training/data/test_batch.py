"""Batches that mix tasks."""

import random

from omnivideo.training.data.batch import collate_flow_batch, sample_mixed_batch
from tests.support.recipes import copy_model, load_task_data


def test_a_mixed_batch_has_one_size_and_several_tasks(request):
    rows = collate_flow_batch(
        sample_mixed_batch(random.Random(0), list(load_task_data(request, copy_model(request)).values())[1::2], 16)
    )
    assert rows.target_latents.shape == (16, 16, 3, 8, 8)
    assert set(rows.has_source.tolist()) == {True, False}
    assert rows.source_latents is not None and len(rows.source_latents) == rows.has_source.sum()
