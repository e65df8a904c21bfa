"""TODO docstring of omnivideo/training/recipes/parts.py."""

from torch import nn

from omnivideo.errors import InvalidInput
from omnivideo.models.omni import OmniVideoModel
from omnivideo.training.config import TrainingConfig
from omnivideo.training.tiny.requests import Task

# What each stage trains, by the beginnings of its parameters' names.
ADAPTER_PARTS = ("bridge.adapter", "bridge.visual_context", "bridge.markers")


TRAINABLE_BY_STAGE = {
    "stage1": ("mllm.lm_head", "bridge.vision_head"), "stage1_text": ("mllm.lm_head",), "stage2a": ("bridge.adapter",),
    "stage2b_generation": ADAPTER_PARTS, "stage2b": ADAPTER_PARTS, "stage3": ("bridge", "decoder"),
}  # fmt: skip


GENERATIVE_STAGES = tuple(
    name for name, parts in TRAINABLE_BY_STAGE.items() if "mllm.lm_head" not in parts
)  # seen in samples


# Resolution and frame count are shared inside a group, so its tasks share a batch.
TASK_GROUPS: tuple[tuple[Task, ...], ...] = (("text-to-image", "image-editing"), ("text-to-video", "video-editing"))


class TrainableParts(nn.Module):
    """All trainable parts under the names that the stages speak of."""

    def __init__(self, omni: OmniVideoModel):
        super().__init__()
        self.mllm = omni.mllm
        self.bridge = omni.bridge
        self.decoder = omni.decoder


def check_sampling(config: TrainingConfig) -> None:
    """Raise InvalidInput if samples are asked for from a recipe that does not generate any."""
    if config.sample_every is not None and config.recipe not in GENERATIVE_STAGES:
        raise InvalidInput(
            "sample-every",
            f"{config.recipe} generates no samples; allowed with {', '.join(GENERATIVE_STAGES)} and tiny",
        )
