"""The MLLM on a GPU agrees with the MLLM on the CPU."""

import pytest
import torch

from omnivideo.models.mllm import MLLMMessage, compute_hidden_states, predict_route

REQUESTS = {
    "a small red circle moving right": "video",
    "a picture of a large yellow star on a black background": "image",
}


@pytest.mark.parametrize(("prompt", "kind"), REQUESTS.items())
def test_routes_agree_with_the_cpu(gpu_omni, cpu_omni, prompt, kind):
    on_gpu, on_cpu = (
        predict_route(omni.mllm, omni.mllm_tokenizer, MLLMMessage(prompt), omni.vision_config)
        for omni in (gpu_omni, cpu_omni)
    )
    assert on_gpu.kind == on_cpu.kind == kind
    assert on_gpu.probability == pytest.approx(on_cpu.probability, abs=1e-2)


@torch.no_grad()
def test_hidden_states_are_close_to_those_of_the_cpu(gpu_omni, cpu_omni):
    requests = [(MLLMMessage(prompt), kind) for prompt, kind in REQUESTS.items()]
    on_gpu, on_cpu = (
        compute_hidden_states(omni.mllm, omni.mllm_tokenizer, requests, omni.vision_config)
        for omni in (gpu_omni, cpu_omni)
    )
    assert torch.equal(on_gpu[1].cpu(), on_cpu[1])
    real = ~on_cpu[1]
    assert torch.allclose(on_gpu[0].cpu()[real], on_cpu[0][real], rtol=1e-2, atol=1e-2)
