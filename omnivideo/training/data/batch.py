"""Batches of the stages: the samples that a process runs through the models in one pass."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from omnivideo.contracts import Medium
from omnivideo.training.planning.flops import Flops


@dataclass
class Stage1Batch:
    """A process's part of a stage 1 batch for one pass.

    Requests for generation come first in `inputs` and `labels`; `target_pixels` [B, 3, F, S, S] are their targets.
    `loss_weight` is the weight of this pass's mean among those of all passes.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    target_pixels: Tensor
    loss_weight: float = 1.0


@dataclass
class MicroBatch:
    """A process's part of a flow batch for one pass.

    `local_indices` are its samples' positions in the global batch of `global_size`, and `loss_weight` is the weight of
    this pass's mean among those of all passes. `frozen_flops` counts the work of the frozen models so far.
    """

    batch: "FlowBatch"
    dropout_draws: list[float]
    global_size: int
    local_indices: slice | list[int]
    loss_weight: float = 1.0
    frozen_flops: Flops = field(default_factory=Flops)


class FlowSource(Protocol):
    """The source of the samples of stages 2b and 3.

    `load_batch` may run in a worker process; `to_micro_batches` takes its result in the process that has the models.
    """

    def load_batch(self, step: int) -> Any: ...
    def to_micro_batches(self, batch: Any) -> list[MicroBatch]: ...
    def batch_size(self, step: int) -> int: ...


class RaggedTensor:
    """Rows [n_i, D] of different lengths."""

    def __init__(self, flat: Tensor, offsets: Tensor):
        self.flat, self.offsets = flat, offsets

    @classmethod
    def from_rows(cls, rows: Sequence[Tensor]) -> "RaggedTensor":
        """Store the rows in half precision."""
        lengths = torch.tensor([0, *map(len, rows)])
        return cls(torch.cat(list(rows)).half(), lengths.cumsum(0))

    def __getitem__(self, index: int) -> Tensor:
        return self.flat[self.offsets[index] : self.offsets[index + 1]].float()

    def __add__(self, other: "RaggedTensor") -> "RaggedTensor":
        offsets = torch.cat([self.offsets, self.offsets[-1] + other.offsets[1:]])
        return RaggedTensor(torch.cat([self.flat, other.flat]), offsets)


@dataclass
class CachedTask:
    """A task's requests with the outputs of the frozen models; `source_latents` is None in generation mode.

    The first `given_frames` latent frames of a target are given: its clip begins with them.
    """

    target_latents: Tensor
    source_latents: Tensor | None
    hidden_states: RaggedTensor
    text_embeddings: RaggedTensor
    visual_embeddings: Tensor
    given_frames: int = 0

    def __len__(self) -> int:
        return len(self.target_latents)

    def __add__(self, other: "CachedTask") -> "CachedTask":
        """Concatenate requests of the same task."""
        assert (self.source_latents is None) == (other.source_latents is None)
        source_latents = (
            None
            if self.source_latents is None or other.source_latents is None
            else torch.cat([self.source_latents, other.source_latents])
        )
        return CachedTask(
            torch.cat([self.target_latents, other.target_latents]),
            source_latents,
            self.hidden_states + other.hidden_states,
            self.text_embeddings + other.text_embeddings,
            torch.cat([self.visual_embeddings, other.visual_embeddings]),
            self.given_frames,
        )


TaskSample = tuple[CachedTask, int]  # a task, and the index of one of its requests


@dataclass
class FlowBatch:
    """A batch of the flow stages. All of its targets begin with the same number of given latent frames.

    Target latents are [B, z, T, h, w], source latents [E, z, T, h, w] for the rows that have a source. Hidden states
    [B, N, M] and text embeddings [B, L, D] are zero past their lengths. Visual embeddings are [B, Q, E].
    """

    target_latents: Tensor
    has_source: Tensor
    source_latents: Tensor | None
    hidden_states: Tensor
    hidden_lengths: list[int]
    text_embeddings: Tensor
    text_lengths: list[int]
    visual_embeddings: Tensor
    given_frames: int = 0

    def __len__(self) -> int:
        return len(self.target_latents)

    def to(self, device: torch.device) -> "FlowBatch":
        """Return the batch on a device; `has_source` stays on the CPU, where it is read."""
        tensors = {
            name: tensor for name, tensor in vars(self).items() if isinstance(tensor, Tensor) and name != "has_source"
        }
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in tensors.items()}
        return replace(self, **moved)

    @property
    def medium(self) -> Medium:
        """Return "video" if the latents have more than one frame."""
        return "video" if self.target_latents.shape[2] > 1 else "image"

    @property
    def unpadded_texts(self) -> list[Tensor]:
        """Return the text embeddings [L_i, D] of each row without padding."""
        return [row[:length] for row, length in zip(self.text_embeddings, self.text_lengths, strict=True)]


def sample_mixed_batch(
    rng: random.Random, tasks: Sequence[CachedTask], count: int, edit_share: float = 0.5
) -> list[TaskSample]:
    """Sample `count` requests of tasks that share resolution, length and given frames (hybrid mixed batching).

    `edit_share` is the share of the tasks that have a source, if there are both kinds.
    """
    shares = [1 - edit_share if task.source_latents is None else edit_share for task in tasks]
    return [(task, rng.randrange(len(task))) for task in rng.choices(tasks, shares, k=count)]


def collate_flow_batch(samples: Sequence[TaskSample]) -> FlowBatch:
    """Collate the samples into one batch in single precision."""
    hidden_states, text_embeddings = (
        [task.hidden_states[index] for task, index in samples],
        [task.text_embeddings[index] for task, index in samples],
    )
    sources = [task.source_latents[index].float() for task, index in samples if task.source_latents is not None]
    return FlowBatch(
        torch.stack([task.target_latents[index].float() for task, index in samples]),
        torch.tensor([task.source_latents is not None for task, _ in samples]),
        torch.stack(sources) if sources else None,
        pad_sequence(hidden_states, batch_first=True), [len(row) for row in hidden_states],
        pad_sequence(text_embeddings, batch_first=True), [len(row) for row in text_embeddings],
        torch.stack([task.visual_embeddings[index].float() for task, index in samples]),
        samples[0][0].given_frames,
    )  # fmt: skip
