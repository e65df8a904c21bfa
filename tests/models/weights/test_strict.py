"""Loading the libraries' models: shortcuts on the meta device change nothing of what is loaded."""

from contextlib import nullcontext

import torch

from omnivideo.models.weights import strict
from omnivideo.models.weights.checkpoint import load
from omnivideo.models.weights.strict import MetaShortcuts


def test_a_model_is_loaded_with_the_same_tensors_as_without_the_shortcuts(weights, monkeypatch):
    quick = load(weights)
    monkeypatch.setattr(strict, "MetaShortcuts", nullcontext)
    for name, part in load(weights).parts.items():
        expected = dict(part.named_parameters()) | dict(part.named_buffers())  # buffers: also those in no file
        loaded = dict(quick.parts[name].named_parameters()) | dict(quick.parts[name].named_buffers())
        assert loaded.keys() == expected.keys()
        for key, tensor in expected.items():
            assert loaded[key].dtype == tensor.dtype and loaded[key].device == tensor.device
            assert torch.equal(loaded[key], tensor), f"{name}.{key}"


def test_only_tensors_without_values_keep_none():
    with MetaShortcuts():
        torch.manual_seed(0)
        real = torch.nn.Linear(3, 2)
        with torch.device("meta"):
            empty, table = torch.nn.Linear(3, 2), torch.arange(3)
    torch.manual_seed(0)
    assert torch.equal(real.weight, torch.nn.Linear(3, 2).weight)
    assert empty.weight.is_meta and table.tolist() == [0, 1, 2]
