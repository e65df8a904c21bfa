"""The optimizers and the learning-rate schedule."""

import pytest
import torch

from omnivideo.training.engine.optim import build_optimizers, orthogonalise, trapezoidal_lr_scale


def test_muon_orthogonalises():
    torch.manual_seed(0)
    for shape in ((3, 24, 48), (2, 48, 24)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape), torch.float32))
        assert values.min() > 0.6 and values.max() < 1.3


def test_tables_are_left_to_adam():
    model = torch.nn.ModuleDict({"embed_tokens": torch.nn.Embedding(5, 4), "proj": torch.nn.Linear(4, 4)})
    muon, adam = build_optimizers(model.named_parameters(), 1e-2, 1e-3)
    assert [p.shape for p in muon.param_groups[0]["params"]] == [(4, 4)]
    assert len(adam.param_groups[0]["params"]) == 2


def test_the_rate_rises_stays_and_falls_to_nothing():
    shares = [trapezoidal_lr_scale(step, 100, warmup=10, decay_from=0.6) for step in range(101)]
    assert shares[0] == pytest.approx(0.1) and shares[30] == 1 and shares[100] == 0
    assert shares[60:] == sorted(shares[60:], reverse=True)
