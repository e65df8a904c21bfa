"""Run jobs on tiny recipes in one of several processes; test_distributed.py starts them.

python -m tests.support.training_worker jobs.json
"""

import copy
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import SiglipVisionConfig, SiglipVisionModel, UMT5Config, UMT5EncoderModel

from omnivideo.contracts import TASKS
from omnivideo.evaluation.suite import sample_clips
from omnivideo.models.mllm import MLLMMessage
from omnivideo.models.omni import OmniVideoModel, build_decoder
from omnivideo.models.parallel.ulysses import enable_sequence_parallel
from omnivideo.models.weights import checkpoint
from omnivideo.presets import TINY
from omnivideo.synthetic.requests import sample_requests
from omnivideo.training.engine.distributed.processes import DistributedContext, ProcessContext, open_process_context
from omnivideo.training.engine.monitor import build_sample_hook, skip_samples
from omnivideo.training.engine.recipe import Recipe, single_micro_batch
from omnivideo.training.engine.trainer import PRECISIONS, freeze_except
from omnivideo.training.recipes import parts
from omnivideo.training.tiny import (
    alignment_stages,
    decoder,
    flow_stages,
    mllm,
    text_encoder,
    vae,
    visual_encoder,
)
from omnivideo.training.tiny.feature_cache import PreparationConfig, load_cached_task

FOUNDATIONS = ("vae", "text", "decoder", "mllm", "visual_encoder")
STAGES = ("stage1", "stage1_text", "stage2a", "stage2b_generation", "stage2b", "stage3")


class Recipes:
    """All recipes with small batches, over a folder of untrained weights."""

    def __init__(self, weights: Path, cache_folder: Path, steps: int):
        self.weights, self.cache_folder, self.steps = weights, cache_folder, steps

    def build(self, name: str, **changes: Any) -> Recipe:
        return replace(getattr(self, name)(), **changes)

    @cache  # noqa: B019
    def load_visual_encoder(self) -> SiglipVisionModel:
        torch.manual_seed(2)
        encoder = SiglipVisionModel(SiglipVisionConfig(**visual_encoder.CONFIG)).eval().requires_grad_(False)
        return encoder.to(torch.get_default_dtype())

    @cache  # noqa: B019
    def load_model(self) -> OmniVideoModel:
        omni = checkpoint.load(self.weights)
        for part in vars(omni).values():
            if isinstance(part, nn.Module):
                part.to(torch.get_default_dtype())
        return omni

    def copy_model(self) -> OmniVideoModel:
        """Return a copy of the model, because recipes train in place."""
        return copy.deepcopy(self.load_model())

    def vae(self) -> Recipe:
        half = self.steps // 2
        return vae.build_vae_recipe((vae.CropPhase(half, 2, 1, 32), vae.CropPhase(self.steps - half, 2, 5, 32)))

    def text(self) -> Recipe:
        return text_encoder.build_text_recipe(
            self.copy_model().tokenizer, steps=self.steps, caption_count=4, instruction_count=2
        )

    def decoder(self) -> Recipe:
        omni = self.copy_model()
        sources = [
            decoder.CaptionedLatents(self.cache_folder, omni.vae, frame_count, 8, lambda done, count: None)
            for frame_count in (1, 9)
        ]
        torch.manual_seed(1)
        encoder = UMT5EncoderModel(UMT5Config(**text_encoder.CONFIG))
        return decoder.build_decoder_recipe(
            sources, omni.tokenizer, encoder, steps=self.steps, batch_sizes={1: 2, 9: 2}
        )

    def mllm(self) -> Recipe:
        return mllm.build_mllm_recipe(self.copy_model().mllm_tokenizer, steps=self.steps, batch_size=4)

    def visual_encoder(self) -> Recipe:
        return visual_encoder.build_visual_encoder_recipe(steps=self.steps, batch_size=2)

    def stage1(self) -> Recipe:
        return alignment_stages.build_stage1_recipe(
            self.copy_model(), self.load_visual_encoder(), steps=self.steps, batch_size=4
        )

    def stage1_text(self) -> Recipe:
        return alignment_stages.build_stage1_text_recipe(self.copy_model(), steps=self.steps, batch_size=4)

    def stage2a(self) -> Recipe:
        return alignment_stages.build_stage2a_recipe(self.copy_model(), steps=self.steps, batch_size=2)

    def build_flow_recipe(self, build: Callable[..., Recipe]) -> Recipe:
        omni = self.copy_model()
        data = {
            task: load_cached_task(
                self.cache_folder,
                omni,
                self.load_visual_encoder(),
                sample_requests(1, task, 4),
                PreparationConfig(),
            )
            for task in TASKS
        }
        return build(omni, data, steps=self.steps, batch_sizes=(4, 2))

    def stage2b_generation(self) -> Recipe:
        return self.build_flow_recipe(flow_stages.build_stage2b_generation_recipe)

    def stage2b(self) -> Recipe:
        return self.build_flow_recipe(flow_stages.build_stage2b_recipe)

    def stage3(self) -> Recipe:
        return self.build_flow_recipe(flow_stages.build_stage3_recipe)


# ---------------------------------------------------------------- sequence parallelism in the decoder


def make_decoder_inputs(task: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return latents, timesteps and a condition for the tiny decoder.

    Both lengths are odd, so that the parts of a sequence differ: 63 tokens of 3 x 7 x 3 patches, and a condition of 57
    tokens, to which editing adds 128 source tokens.
    """
    torch.manual_seed(5)
    length = 57 + (128 if task == "editing" else 0)
    return torch.randn(2, 16, 3, 14, 6), torch.tensor([300.0, 800.0]), torch.randn(2, length, 192, requires_grad=True)


def compute_gradients(decoder: WanTransformer3DModel, task: str) -> tuple[float, dict[str, Tensor], int]:
    """Return the loss, the gradients of all weights and of the condition, and the peak memory in bytes.

    The peak does not include weights, inputs and gradients. It is measured in a second pass, in which the gradients are
    already allocated.
    """
    latents, timesteps, condition = make_decoder_inputs(task)
    decoder.zero_grad()
    loss = decoder(latents, timesteps, condition, return_dict=False)[0].square().mean()
    loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in decoder.named_parameters() if weight.grad is not None}
    assert condition.grad is not None
    gradients["condition"] = condition.grad.clone()
    tracker = MemTracker()
    tracker.track_external(decoder, latents, timesteps, condition)
    with tracker:
        decoder(latents, timesteps, condition, return_dict=False)[0].square().mean().backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    peak_bytes = sum(peak[kind] for kind in peak if getattr(kind, "value", "") in ("Activation", "Temp"))
    return loss.item(), gradients, peak_bytes


def compare_sequence_parallelism(world: ProcessContext, job: dict[str, Any]) -> dict[str, Any]:
    """Return the errors of the loss and gradients of all processes against one process, and both peaks of memory."""
    assert isinstance(world, DistributedContext) and world.sequence_group is not None
    torch.manual_seed(6)
    decoder = build_decoder(TINY)
    if job["checkpointing"]:
        decoder.enable_gradient_checkpointing()
    expected_loss, expected, peak_of_one = compute_gradients(decoder, job["task"])
    enable_sequence_parallel(decoder, world.sequence_group)
    loss, gradients, peak = compute_gradients(decoder, job["task"])
    for grad in gradients.values():
        dist.all_reduce(grad)
        grad /= world.world_size
    assert expected.keys() == gradients.keys()
    largest = max(float(grad.abs().max()) for grad in expected.values())
    return {
        "loss_error": abs(loss - expected_loss),
        "gradient_error": max(float((grad - gradients[name]).abs().max()) for name, grad in expected.items()),
        "largest_gradient": largest,
        "peak_bytes": peak,
        "peak_bytes_of_one": peak_of_one,
    }


# ---------------------------------------------------------------- jobs


get_recipes = cache(Recipes)


def train(world: ProcessContext, job: dict[str, Any]) -> None:
    """Train the job's recipe with its changes."""
    recipes = get_recipes(Path(job["weights"]), Path(job["cache"]), job["steps"])
    changes = {key: job[key] for key in ("optimizer", "checkpointing", "adam_lr", "warmup") if key in job}
    changes["precision"] = PRECISIONS[job.get("precision", "fp32")]
    recipe = recipes.build(job["recipe"], **changes)
    recipe.model.to(torch.get_default_dtype())
    loss = replace(recipe).compute_losses  # of a copy, whose micro-batches do not change below
    if "infinite_gradient" in job:  # the loss is finite, but the derivative of a square root at zero is not
        weight = freeze_except(recipe.model, recipe.trainable)[0][1]
        recipe.micro_batch_losses = single_micro_batch(
            lambda step: {"loss": loss(step)["loss"] + (weight - weight.detach()).square().sum().sqrt()}
        )
    if "micro_batches" in job:
        recipe.micro_batch_losses = lambda step: [partial(loss, step)] * job["micro_batches"]
    sample_hook = build_sample_hook(job["sample_every"], save_sample) if "sample_every" in job else skip_samples
    world.create_trainer(recipe, Path(job["run"])).run(
        job.get("stop_at_step"), save_every_seconds=job.get("save_every_seconds", 120.0), sample_hook=sample_hook
    )


def save_sample(omni: OmniVideoModel, sheet: Path | None) -> dict[str, float]:
    """Generate an image in one step; the main process saves it with the weights that generated it."""
    sampling = {task: params.model_copy(update={"steps": 1}) for task, params in TINY.sampling.items()}
    omni = replace(omni, preset=TINY.model_copy(update={"sampling": sampling}))
    still = sample_clips(omni, ["a red circle"], [MLLMMessage("a red circle")], "text-to-image", 0)
    if sheet is None:
        return {}
    sheet.parent.mkdir(exist_ok=True)
    weights = {name: weight.float() for name, weight in parts.TrainableParts(omni).state_dict().items()}
    torch.save({"still": torch.from_numpy(still), "weights": weights}, sheet)
    return {"stills correct": float(still.mean())}


def use_float64() -> None:
    """Compute everything in this process in fp64 from now on, even where the code requests fp32."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]


def main() -> None:
    torch.set_num_threads(1)
    config = json.loads(Path(sys.argv[1]).read_text())
    if config["float64"]:
        use_float64()
    Path(f"{config['results']}.pid{os.environ.get('RANK', 0)}").write_text(str(os.getpid()))
    results = []
    with open_process_context(1, config["sequence"]) as world:
        for job in config["jobs"]:
            results.append(compare_sequence_parallelism(world, job) if "task" in job else train(world, job))
        if world.is_main_process:
            Path(config["results"]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
