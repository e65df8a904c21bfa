"""The optimizers and the learning-rate schedule."""

import pytest
import torch

from omnivideo.training.engine.optim import build_optimizers, orthogonalise, trapezoidal_lr_scale


def test_muon_orthogonalises_the_update():
    torch.manual_seed(0)
    for shape in ((3, 24, 48), (2, 48, 24)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape), torch.float32))
        assert values.min() > 0.6 and values.max() < 1.3


def test_embedding_tables_are_trained_with_adam():
    model = torch.nn.ModuleDict({"embed_tokens": torch.nn.Embedding(5, 4), "proj": torch.nn.Linear(4, 4)})
    muon, adam = build_optimizers(model.named_parameters(), 1e-2, 1e-3)
    assert [p.shape for p in muon.param_groups[0]["params"]] == [(4, 4)]
    assert len(adam.param_groups[0]["params"]) == 2


def test_the_trapezoidal_schedule_warms_up_and_decays_to_zero():
    scales = [trapezoidal_lr_scale(step, 100, warmup=10, decay_from=0.6) for step in range(101)]
    assert scales[0] == pytest.approx(0.1) and scales[30] == 1 and scales[100] == 0
    assert scales[60:] == sorted(scales[60:], reverse=True)
