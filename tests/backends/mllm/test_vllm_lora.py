"""vLLM with a LoRA gives the answers and visual tokens of a LocalMLLM with the LoRA merged into its weights.

vLLM runs in float32. The LoRA is random, in the layout in which PEFT saves it.
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

TOLERANCE = 1e-4
RANK, ALPHA = 24, 48.0  # above vLLM's own limit of 16
TEXTS = ("a red ball moves left", "what is this?", "make it snow", "draw " * 100 + "a small star")


def create_lora(omni: OmniVideoModel, folder: Path) -> Path:
    """Write a LoRA for every linear layer of the language model and merge it into `omni`."""
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
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": sorted(targets), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def mllms(vllm_python, weights, tmp_path_factory):
    """The MLLM on vLLM with a LoRA, a LocalMLLM without it, and a LocalMLLM with it merged."""
    folder = tmp_path_factory.mktemp("lora")
    omni = checkpoint.load(weights)
    torch.manual_seed(5)
    for parameter in omni.mllm.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0, 0.08)
    checkpoint.save(omni, folder / "tiny")
    store = LocalObjectStore(folder / "store")
    base, merged = (LocalMLLM(checkpoint.load(folder / "tiny"), store) for _ in range(2))
    lora = create_lora(merged.omni, folder / "adapter")
    server = Server(vllm_python, folder / "tiny", folder, free_port(), lora=lora).start()
    try:
        remote_mllm = RemoteMLLM(server.wait(900).address, store)
        yield remote_mllm, base, merged
        remote_mllm.close()
    finally:
        server.stop()


def build_requests(store: LocalObjectStore) -> list[MLLMRequest]:
    frames = np.random.default_rng(1).integers(0, 255, (9, 64, 64, 3), dtype=np.uint8)
    data, suffix = encode_clip(frames, 8.0)
    clip = Artifact(key=store.put(data, suffix), medium="video", width=64, height=64, frames=9, fps=8.0, caption="",
                    created_by="test")  # fmt: skip
    return [*(MLLMRequest(text=text) for text in TEXTS), MLLMRequest(text="how does it move?", artifacts=(clip,))]


def test_every_answer_is_that_of_the_merged_model(mllms, monkeypatch):
    remote_mllm, base, merged = mllms
    for mllm_class in (LocalMLLM, RemoteMLLM):
        monkeypatch.setattr(mllm_class, "max_tokens", 40)
    for request in build_requests(remote_mllm.store):
        answer = "".join(remote_mllm.stream_text(request))
        assert answer == "".join(merged.stream_text(request)) and answer != "".join(base.stream_text(request))
        route, expected = remote_mllm.route(request), merged.route(request)
        assert route.kind == expected.kind and route.probability == pytest.approx(expected.probability, abs=TOLERANCE)
        tokens, merged_tokens, base_tokens = (
            get_tensors(remote_mllm.store, mllm.predict_visual_tokens(request, "video"))["visual_tokens"]
            for mllm in (remote_mllm, merged, base)
        )
        assert (tokens - merged_tokens).abs().max() <= TOLERANCE < 0.01 * (tokens - base_tokens).abs().max()
