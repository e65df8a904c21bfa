"""Resume points: the denoising state of a job or a batch, with everything that decides the bytes of the clips.

A safetensors file. Its metadata has the model's identity and each job's request in the order of the pass, so that a
state is never continued with other weights, another precision, other settings or another number of clips.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from omnivideo.contracts import Job, ModelIdentity
from omnivideo.models.sampling import DenoisingState


@dataclass(frozen=True)
class ResumePoint:
    """A denoising state, and the object keys of the visual tokens that the jobs of the pass were begun with."""

    state: DenoisingState
    visual_tokens: tuple[str, ...]


def pack_resume_point(state: DenoisingState, model: ModelIdentity, jobs: Sequence[Job]) -> bytes:
    """Return the file of a state of prepared jobs, for `unpack_resume_point`."""
    tensors = {"latents": state.latents, "before": state.previous_sample, "step": torch.tensor(state.step)}
    tensors |= {f"output{index}": output for index, output in enumerate(state.model_outputs)}
    tensors |= {f"finished{index}": latents for index, latents in enumerate(state.finished)}
    metadata = describe_pass(model, jobs) | {"visual_tokens": json.dumps([job.visual_tokens for job in jobs])}
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)


def unpack_resume_point(
    data: bytes, model: ModelIdentity, jobs: Sequence[Job], device: torch.device
) -> ResumePoint | None:
    """Return the resume point of these jobs, which may lack visual tokens, or None if it is not one of this pass."""
    try:
        metadata = read_metadata(data)
        visual_tokens = tuple(json.loads(metadata.pop("visual_tokens")))
    except (ValueError, LookupError, AttributeError, SafetensorError):
        return None  # version 0.2 wrote states without metadata
    chosen = tuple(job.visual_tokens or reference for job, reference in zip(jobs, visual_tokens, strict=False))
    if metadata != describe_pass(model, jobs) or chosen != visual_tokens:
        return None
    # Cloned for alignment, as in get_tensors.
    tensors = {name: tensor.clone().to(device) for name, tensor in load(data).items()}
    outputs, finished = (
        tuple(tensors[name] for index in range(len(tensors)) if (name := f"{prefix}{index}") in tensors)
        for prefix in ("output", "finished")
    )
    state = DenoisingState(int(tensors["step"]), tensors["latents"], tensors["before"], outputs, finished)
    return ResumePoint(state, visual_tokens)


def describe_pass(model: ModelIdentity, jobs: Sequence[Job]) -> dict[str, str]:
    """Return what decides the bytes of a pass: the model, and each job's prompt, sources and settings, in order."""
    requests = [job.model_dump(include={"prompt", "source", "last_frame", "params"}) for job in jobs]
    return model.model_dump() | {"requests": json.dumps(requests, sort_keys=True)}


def read_metadata(data: bytes) -> dict[str, str]:
    """Return the metadata of a safetensors file."""
    header_bytes = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + header_bytes])["__metadata__"]
    return metadata
