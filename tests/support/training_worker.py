"""One of several processes that train tiny recipes, as test_distributed.py asks:

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
    """Every recipe with small batches, over a folder of untrained weights."""

    def __init__(self, weights: Path, scratch: Path, steps: int):
        self.weights, self.scratch, self.steps = weights, scratch, steps

    def make(self, name: str, **changes: Any) -> Recipe:
        return replace(getattr(self, name)(), **changes)

    @cache  # noqa: B019
    def encoder(self) -> SiglipVisionModel:
        torch.manual_seed(2)
        encoder = SiglipVisionModel(SiglipVisionConfig(**visual_encoder.CONFIG)).eval().requires_grad_(False)
        return encoder.to(torch.get_default_dtype())

    @cache  # noqa: B019
    def loaded(self) -> OmniVideoModel:
        omni = checkpoint.load(self.weights)
        for part in vars(omni).values():
            if isinstance(part, nn.Module):
                part.to(torch.get_default_dtype())
        return omni

    def omni(self) -> OmniVideoModel:
        """A copy: recipes train in place."""
        return copy.deepcopy(self.loaded())

    def vae(self) -> Recipe:
        half = self.steps // 2
        return vae.build_vae_recipe((vae.CropPhase(half, 2, 1, 32), vae.CropPhase(self.steps - half, 2, 5, 32)))

    def text(self) -> Recipe:
        return text_encoder.build_text_recipe(
            self.omni().tokenizer, steps=self.steps, caption_count=4, instruction_count=2
        )

    def decoder(self) -> Recipe:
        omni = self.omni()
        stills, clips = (
            decoder.CaptionedLatents(self.scratch, omni.vae, video, 8, lambda done, count: None)
            for video in (False, True)
        )
        torch.manual_seed(1)
        encoder = UMT5EncoderModel(UMT5Config(**text_encoder.CONFIG))
        return decoder.build_decoder_recipe(
            stills, clips, omni.tokenizer, encoder, steps=self.steps, batch_sizes=(2, 2)
        )

    def mllm(self) -> Recipe:
        return mllm.build_mllm_recipe(self.omni().mllm_tokenizer, steps=self.steps, batch_size=4)

    def visual_encoder(self) -> Recipe:
        return visual_encoder.build_visual_encoder_recipe(steps=self.steps, batch_size=2)

    def stage1(self) -> Recipe:
        return alignment_stages.build_stage1_recipe(self.omni(), self.encoder(), steps=self.steps, batch_size=4)

    def stage1_text(self) -> Recipe:
        return alignment_stages.build_stage1_text_recipe(self.omni(), steps=self.steps, batch_size=4)

    def stage2a(self) -> Recipe:
        return alignment_stages.build_stage2a_recipe(self.omni(), steps=self.steps, batch_size=2)

    def flow(self, make: Callable[..., Recipe]) -> Recipe:
        omni = self.omni()
        data = {
            task: load_cached_task(
                self.scratch,
                omni,
                self.encoder(),
                sample_requests(1, task, 4),
                PreparationConfig(lambda done, count: None),
            )
            for task in TASKS
        }
        return make(omni, data, steps=self.steps, batch_sizes=(4, 2))

    def stage2b_generation(self) -> Recipe:
        return self.flow(flow_stages.build_stage2b_generation_recipe)

    def stage2b(self) -> Recipe:
        return self.flow(flow_stages.build_stage2b_recipe)

    def stage3(self) -> Recipe:
        return self.flow(flow_stages.build_stage3_recipe)


# ---------------------------------------------------------------- the decoder's tokens, whole and in parts


def inputs(task: str) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and a condition for the tiny decoder.  Both lengths are odd, so no part is like another: 63
    tokens of 3 x 7 x 3 patches, and a condition of 57, which in editing has 128 source tokens more."""
    torch.manual_seed(5)
    length = 57 + (128 if task == "editing" else 0)
    return torch.randn(2, 16, 3, 14, 6), torch.tensor([300.0, 800.0]), torch.randn(2, length, 192, requires_grad=True)


def gradients(decoder: WanTransformer3DModel, task: str) -> tuple[float, dict[str, Tensor], int]:
    """Loss, gradients of all weights and of the condition, and the peak of memory beside weights, inputs and
    gradients, in bytes: measured in a second pass, in which gradients are there from the start."""
    latents, timesteps, condition = inputs(task)
    decoder.zero_grad()
    loss = decoder(latents, timesteps, condition, return_dict=False)[0].square().mean()
    loss.backward()
    named = {name: one.grad.clone() for name, one in decoder.named_parameters() if one.grad is not None}
    assert condition.grad is not None
    named["condition"] = condition.grad.clone()
    tracker = MemTracker()
    tracker.track_external(decoder, latents, timesteps, condition)
    with tracker:
        decoder(latents, timesteps, condition, return_dict=False)[0].square().mean().backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return loss.item(), named, sum(peak[kind] for kind in peak if getattr(kind, "value", "") in ("Activation", "Temp"))


def sequence(world: ProcessContext, job: dict[str, Any]) -> dict[str, Any]:
    """How far a group of all processes is from one alone, in loss and gradients, and both peaks of memory."""
    assert isinstance(world, DistributedContext) and world.sequence_group is not None
    torch.manual_seed(6)
    decoder = build_decoder(TINY)
    if job["checkpointing"]:
        decoder.enable_gradient_checkpointing()
    alone_loss, alone, alone_peak = gradients(decoder, job["task"])
    enable_sequence_parallel(decoder, world.sequence_group)
    loss, parts, peak = gradients(decoder, job["task"])
    for grad in parts.values():
        dist.all_reduce(grad)
        grad /= world.world_size
    assert alone.keys() == parts.keys()
    largest = max(float(grad.abs().max()) for grad in alone.values())
    far = max(float((grad - parts[name]).abs().max()) for name, grad in alone.items())
    return {"loss": abs(loss - alone_loss), "gradients": far, "of": largest, "alone": alone_peak, "peak": peak}


# ---------------------------------------------------------------- jobs


recipes = cache(Recipes)


def train(world: ProcessContext, job: dict[str, Any]) -> None:
    made = recipes(Path(job["weights"]), Path(job["scratch"]), job["steps"])
    changes = {key: job[key] for key in ("optimizer", "checkpointing", "adam_lr", "warmup") if key in job}
    changes["precision"] = PRECISIONS[job.get("precision", "fp32")]
    recipe = made.make(job["recipe"], **changes)
    recipe.model.to(torch.get_default_dtype())
    loss = replace(recipe).compute_losses  # a copy's, which keeps its passes
    if "spoiled" in job:  # a finite loss whose gradient is not: the root of nothing is steep
        weight = freeze_except(recipe.model, recipe.trainable)[0][1]
        recipe.micro_batch_losses = single_micro_batch(
            lambda step: {"loss": loss(step)["loss"] + (weight - weight.detach()).square().sum().sqrt()}
        )
    if "passes" in job:
        recipe.micro_batch_losses = lambda step: [partial(loss, step)] * job["passes"]
    look = build_sample_hook(job["look"], draw) if "look" in job else skip_samples
    world.create_trainer(recipe, Path(job["run"])).run(
        job.get("until"), save_every_seconds=job.get("every", 120.0), sample_hook=look
    )


def draw(omni: OmniVideoModel, sheet: Path | None) -> dict[str, float]:
    """A still in one step; the first process keeps it, with the weights that it was drawn with."""
    short = {task: one.model_copy(update={"steps": 1}) for task, one in TINY.sampling.items()}
    omni = replace(omni, preset=TINY.model_copy(update={"sampling": short}))
    still = sample_clips(omni, ["a red circle"], [MLLMMessage("a red circle")], "text-to-image", 0)
    if sheet is None:
        return {}
    sheet.parent.mkdir(exist_ok=True)
    weights = {name: one.float() for name, one in parts.TrainableParts(omni).state_dict().items()}
    torch.save({"still": torch.from_numpy(still), "weights": weights}, sheet)
    return {"stills correct": float(still.mean())}


def in_double() -> None:
    """From here on everything in this process is in double precision, what asks for single as well."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]


def main() -> None:
    torch.set_num_threads(1)
    given = json.loads(Path(sys.argv[1]).read_text())
    if given["double"]:
        in_double()
    Path(f"{given['results']}.pid{os.environ.get('RANK', 0)}").write_text(str(os.getpid()))
    found = []
    with open_process_context(1, given["sequence"]) as world:
        for job in given["jobs"]:
            found.append(sequence(world, job) if "task" in job else train(world, job))
        if world.is_main_process:
            Path(given["results"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
