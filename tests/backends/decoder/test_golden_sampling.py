"""Whole generations of both versions against the authors' outputs: from the MLLM's features to pixels."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from omnivideo.backends.decoder.pipeline import DenoisingProgress, GeneratedClip, generate_clip
from omnivideo.contracts import SamplingParams
from omnivideo.models.omni import MLLMFeatures, OmniVideoModel
from omnivideo.models.sampling import DenoisingState
from omnivideo.models.vae import decode_latents, pixels_to_bytes
from tests.support.golden import load_golden
from tests.support.golden_models import load_golden_model, measure_error

pytestmark = pytest.mark.golden
LATENTS_ERROR, PIXELS_ERROR = 2e-5, 5e-5
TASKS = {"t2v": "text-to-video", "v2v": "video-editing", "t2i": "text-to-image", "i2i": "image-editing"}


@dataclass
class Generation:
    """A case: its model and request, and the authors' outputs under the case's name."""

    omni: OmniVideoModel
    prompt: str
    params: SamplingParams
    source: Tensor | None
    features: MLLMFeatures
    theirs: dict[str, Tensor]
    timesteps: list[int]
    velocities: list[Tensor] = field(default_factory=list)

    def run(self, state: DenoisingState | None = None) -> tuple[list[DenoisingProgress], GeneratedClip]:
        """Generate from the authors' noise, or from a state; keep the decoders' outputs."""
        noise = self.theirs["noise"][None]
        hooks = [
            decoder.register_forward_hook(lambda module, args, output: self.velocities.extend(output[0]))
            for decoder in self.omni.decoders
        ]
        start = state or DenoisingState(0, noise, noise, ())
        *steps, clip = generate_clip(self.omni, self.prompt, self.params, self.source, self.features, start)
        for hook in hooks:
            hook.remove()
        return steps, clip


def read_case(name: str) -> Generation:
    """Return a case of v1_sampling, or of v2_sampling, whose names begin with the kind of model."""
    kind, _, task = name.rpartition("_")
    version = "v2" if kind else "v1"
    tensors, about = load_golden(f"{version}_sampling")
    parts, _ = load_golden(f"{version}_parts")
    omni = load_golden_model(kind or "v1")
    (case,) = [case for case in about["cases"] if case["name"] == name]
    if version == "v1":
        source = parts[case["source"]] if case["source"] else None
        prompt, negative_prompt, scale = about["prompt"], "", case["guide_scale_as_in_their_script"]
    else:
        source = parts["in.latents"][0] if task == "v2v" else None
        prompt, negative_prompt, scale = about["instruction"], about["negative_prompt"], about["guide_scale"]
    params = SamplingParams(
        task=TASKS[task],
        width=case["width"],
        height=case["height"],
        frames=case["frames"],
        fps=8,
        steps=about["steps"],
        guidance_scale=scale + omni.preset.guidance_offset,
        flow_shift=about["shift"],
        negative_prompt=negative_prompt,
        seed=0,
    )
    features = MLLMFeatures(parts["in.hidden_states"], "hidden-states", about.get("caption", ""))
    theirs = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    return Generation(omni, prompt, params, source, features, theirs, case["timesteps"])


CASES = [case["name"] for version in ("v1", "v2") for case in load_golden(f"{version}_sampling")[1]["cases"]]


@pytest.mark.parametrize("name", CASES)
def test_a_generation_equals_the_authors(name):
    case = read_case(name)
    steps, clip = case.run()
    assert measure_error(torch.stack([step.state.latents[0] for step in steps]), case.theirs["latents"]) < LATENTS_ERROR
    for branch, first in (("cond", 0), ("uncond", 1)):
        if branch in case.theirs:
            assert measure_error(torch.stack(case.velocities[first::2]), case.theirs[branch]) < LATENTS_ERROR
    if "pixels" in case.theirs:
        pixels = decode_latents(case.omni.vae, clip.latents[None])[0]
        assert measure_error(pixels, case.theirs["pixels"]) < PIXELS_ERROR
        theirs = pixels_to_bytes(case.theirs["pixels"][None], case.omni.preset.byte_rounding)[0]
        assert abs(clip.frames.astype(int) - theirs).max() <= 1 and (clip.frames != theirs).mean() < 0.01


@pytest.mark.parametrize("name", ["v2v", "experts_v2v"])
def test_a_resumed_generation_has_the_same_bits_on_both_sides_of_the_switch(name):
    whole, clip = read_case(name).run()
    for step in whole:  # after the last step, there is only the decoding left
        rest, resumed = read_case(name).run(step.state)
        assert len(rest) == len(whole) - step.state.step
        assert torch.equal(resumed.latents, clip.latents) and (resumed.frames == clip.frames).all()


def test_each_expert_denoises_its_timesteps():
    case, about = read_case("experts_t2v"), load_golden("v2_sampling")[1]
    expected = next(case["expert_of_each_step"] for case in about["cases"] if case["name"] == "experts_t2v")
    used: list[str] = []
    hooks = [
        decoder.register_forward_hook(lambda module, args, output, name=name: used.append(f"{name} {int(args[1][0])}"))
        for name, decoder in zip(("high", "low"), case.omni.decoders, strict=True)
    ]
    case.run()
    for hook in hooks:
        hook.remove()
    assert list(dict.fromkeys(used)) == [
        f"{name} {timestep}" for name, timestep in zip(expected, case.timesteps, strict=True)
    ]


@pytest.mark.parametrize("task", ["v2v", "t2v"])
def test_texts_are_the_caption_and_in_editing_the_instruction(task):
    case = read_case(f"single_{task}")
    with torch.no_grad():
        (text,) = case.omni.encode_request_texts([case.prompt], [case.features.caption], case.source is not None)
    assert measure_error(text, load_golden("v2_sampling")[0][f"in.text_{task}"]) < 5e-6


@pytest.mark.parametrize("name", ["v2v", "single_v2v", "experts_v2v"])
def test_the_authors_types_stay_near_float32(name):
    """Version 1: bf16 autocast over fp32 weights. Version 2: bf16 weights and latents."""
    case = read_case(name)
    _, exact = case.run()
    case.omni = load_golden_model(name.rpartition("_")[0] or "v1", in_float32=False)
    noise = case.theirs["noise"][None].to(case.omni.latents_dtype)
    steps, clip = case.run(DenoisingState(0, noise, noise, ()))
    assert steps[-1].state.latents.dtype == case.omni.latents_dtype
    error = float((clip.latents.float() - exact.latents).norm() / exact.latents.norm())
    assert 0 < error < 0.1
