"""What each stage trains (paper sections 4.2 and 4.3).

stage1              vision head, text head              Eq. 1 and Eq. 2, understanding and generation together
stage1_text         text head                           Eq. 2 alone, and again at the first token, which is the route
stage2a             adapter                             its output against the decoder's text embeddings
stage2b_generation  adapter, visual context, markers    Eq. 4 through the frozen decoder: text to image and to video
stage2b             adapter, visual context, markers    the same for all four generative tasks
stage3              vision head, adapter, decoder       Eq. 4, with Eq. 1 kept for the vision head
"""

from torch import nn

from omnivideo.errors import InvalidInput
from omnivideo.models.omni import OmniVideoModel
from omnivideo.training.config import TrainingConfig

ADAPTER_PARTS = ("bridge.adapter", "bridge.visual_context", "bridge.markers")
# Prefixes of the parameters' names in `TrainableParts`.
TRAINABLE_BY_STAGE: dict[str, tuple[str, ...]] = {
    "stage1": ("mllm.lm_head", "bridge.vision_head"), "stage1_text": ("mllm.lm_head",), "stage2a": ("bridge.adapter",),
    "stage2b_generation": ADAPTER_PARTS, "stage2b": ADAPTER_PARTS, "stage3": ("bridge", "decoder"),
}  # fmt: skip
# Stages after which generated samples differ.
GENERATIVE_STAGES = tuple(name for name, parts in TRAINABLE_BY_STAGE.items() if "mllm.lm_head" not in parts)


class TrainableParts(nn.Module):
    """The parts of a model that some stage trains, under the names that checkpoints use."""

    def __init__(self, omni: OmniVideoModel):
        super().__init__()
        self.mllm = omni.mllm
        self.bridge = omni.bridge
        self.decoder = omni.decoder


def check_sampling(config: TrainingConfig) -> None:
    """Raise InvalidInput if samples are requested from a recipe that does not generate any."""
    if config.sample_every is not None and config.recipe not in GENERATIVE_STAGES:
        raise InvalidInput(
            "sample-every",
            f"{config.recipe} generates no samples; allowed with {', '.join(GENERATIVE_STAGES)} and tiny",
        )
