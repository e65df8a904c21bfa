"""vLLM with a LoRA: every answer is that of the twin into whose weights it is merged, visual tokens included.

Real vLLM in float32, and a LoRA at random in the layout in which PEFT saves one.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from omnivideo.backends.mllm.local import LocalMLLM
from omnivideo.backends.mllm.remote import RemoteMLLM
from omnivideo.contracts import Artifact, MLLMRequest
from omnivideo.media.artifacts import encode_clip
from omnivideo.models.omni import OmniVideoModel
from omnivideo.models.weights import checkpoint
from omnivideo.storage.objects.local import LocalObjectStore
from omnivideo.storage.objects.tensors import get_tensors
from tests.support.servers import free_port
from tests.support.vllm_server import Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

CLOSE = 1e-4
RANK, ALPHA = 24, 48.0  # above vLLM's own limit of 16
ASKS = ("a red ball moves left", "what is this?", "make it snow", "draw " * 100 + "a small star")


def adapted(omni: OmniVideoModel, folder: Path) -> Path:
    """Writes a LoRA for every linear layer of the language model, and merges it into `omni`."""
    generator = torch.Generator().manual_seed(7)
    tensors, targets = {}, set()
    for name, layer in omni.mllm.named_modules():
        if isinstance(layer, torch.nn.Linear) and ".language_model." in name:
            down = 0.07 * torch.randn(RANK, layer.in_features, generator=generator)
            up = 0.07 * torch.randn(layer.out_features, RANK, generator=generator)
            tensors[f"base_model.model.{name}.lora_A.weight"] = down
            tensors[f"base_model.model.{name}.lora_B.weight"] = up
            targets.add(name.rpartition(".")[2])
            layer.weight.data += ALPHA / RANK * up @ down
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": sorted(targets), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def twins(vllm_python, weights, tmp_path_factory):
    """The folder of loud weights and of the LoRA, the twin without it, and the twin with it."""
    folder = tmp_path_factory.mktemp("lora")
    omni = checkpoint.load(weights)
    torch.manual_seed(5)
    for parameter in omni.mllm.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0, 0.08)
    checkpoint.save(omni, folder / "tiny")
    store = LocalObjectStore(folder / "store")
    base, merged = (LocalMLLM(checkpoint.load(folder / "tiny"), store) for _ in range(2))
    lora = adapted(merged.omni, folder / "adapter")
    server = Server(vllm_python, folder / "tiny", folder, free_port(), lora=lora).start()
    try:
        away = RemoteMLLM(server.wait(900).address, store)
        yield away, base, merged
        away.close()
    finally:
        server.stop()


def asks(store: LocalObjectStore) -> list[MLLMRequest]:
    frames = np.random.default_rng(1).integers(0, 255, (9, 64, 64, 3), dtype=np.uint8)
    data, suffix = encode_clip(frames, 8.0)
    clip = Artifact(key=store.put(data, suffix), medium="video", width=64, height=64, frames=9, fps=8.0, caption="",
                    created_by="test")  # fmt: skip
    return [*(MLLMRequest(text=text) for text in ASKS), MLLMRequest(text="how does it move?", artifacts=(clip,))]


def test_every_answer_is_that_of_the_merged_twin(twins, monkeypatch):
    away, base, merged = twins
    for kind in (LocalMLLM, RemoteMLLM):
        monkeypatch.setattr(kind, "max_tokens", 40)
    for ask in asks(away.store):
        said = "".join(away.stream_text(ask))
        assert said == "".join(merged.stream_text(ask)) and said != "".join(base.stream_text(ask))
        routed, expected = away.route(ask), merged.route(ask)
        assert routed.kind == expected.kind and routed.probability == pytest.approx(expected.probability, abs=CLOSE)
        got, same, other = (
            get_tensors(away.store, one.predict_visual_tokens(ask, "video"))["visual_tokens"]
            for one in (away, merged, base)
        )
        assert (got - same).abs().max() <= CLOSE < 0.01 * (got - other).abs().max()
