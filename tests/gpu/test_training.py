"""Training steps in bf16 on a GPU: the losses are finite, and the weights stay fp32."""

import json
import math
from dataclasses import replace

import torch

from omnivideo.training.engine.trainer import Trainer
from omnivideo.training.tiny.alignment_stages import build_stage2a_recipe


def test_steps_in_bf16(gpu_omni, device, tmp_path):
    recipe = build_stage2a_recipe(gpu_omni, steps=8, batch_size=4)
    recipe = replace(recipe, precision=torch.bfloat16, device=device)
    Trainer(recipe, tmp_path).run()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 8 and all(math.isfinite(loss) for loss in losses)
    assert {parameter.dtype for parameter in recipe.model.parameters()} == {torch.float32}
