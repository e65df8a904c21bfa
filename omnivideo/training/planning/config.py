"""What to plan: a stage of training, its data, and the GPUs that it runs on."""

from dataclasses import dataclass
from typing import Literal

from omnivideo.contracts import compute_latent_grid, count_decoder_tokens, count_visual_context_tokens
from omnivideo.errors import InvalidInput
from omnivideo.presets import OMNIVIDEO_1_3B, Preset
from omnivideo.training.planning.gpus import GPU

Kind = Literal["still", "clip"]  # the kinds of samples; a batch holds samples of one kind
KINDS: tuple[Kind, ...] = ("still", "clip")

# Samples of the paper's Table 1. The tasks with "video" in their names have clips.
PAPER_SAMPLE_COUNTS = {
    "image understanding": 17.2e6, "video understanding": 1.98e6, "text-to-image": 15e6, "text-to-video": 1.8e6,
    "image editing": 8.6e6, "video editing": 0.8e6,
}  # fmt: skip
GENERATION_TASKS = ("text-to-image", "text-to-video")
GENERATION_AND_EDITING_TASKS = (*GENERATION_TASKS, "image editing", "video editing")
TASKS_BY_STAGE = {
    "stage1": tuple(PAPER_SAMPLE_COUNTS),
    "stage2a": GENERATION_TASKS,
    "stage2b_generation": GENERATION_TASKS,
    "stage2b": GENERATION_AND_EDITING_TASKS,
    "stage3": GENERATION_AND_EDITING_TASKS,
}
EDITING_STAGES = ("stage2b", "stage3")  # these encode sources
ALIGNED_STAGES = ("stage1", "stage3")  # these align the vision head with the visual encoder (Eq. 1)
FLOW_STAGES = ("stage2b_generation", "stage2b", "stage3")  # these train through the decoder

MLLM_TOKENS: dict[Kind, int] = {"still": 512, "clip": 2048}  # of a request with its media and its answer


@dataclass(frozen=True)
class PlanConfig:
    """A stage, the size of its samples and batches, and its GPUs.

    A step has `grad_accum_steps` micro-batches of `clips_per_gpu` clips, or of as many images as have the same number
    of tokens. `cached` means that latents and text embeddings are read from the cache. `utilisation` is the assumed
    fraction of peak FLOP/s.
    """

    recipe: str
    gpu: GPU
    gpus: int
    preset: Preset = OMNIVIDEO_1_3B
    clips_per_gpu: int = 1
    width: int = 832
    height: int = 480
    frames: int = 17
    sequence_parallel_size: int = 1
    checkpointing: bool = False
    cached: bool = True
    steps: int | None = None
    utilisation: float = 0.45
    grad_accum_steps: int = 1

    @property
    def replicas(self) -> int:
        return self.gpus // self.sequence_parallel_size

    @property
    def encodes_inline(self) -> bool:
        """True if the VAE and the text encoder run in every step."""
        return not self.cached and self.recipe != "stage1"

    @property
    def stills_per_gpu(self) -> int:
        return max(1, self.clips_per_gpu * self.count_model_tokens("clip") // self.count_model_tokens("still"))

    def samples_per_gpu(self, kind: Kind) -> int:
        return self.clips_per_gpu if kind == "clip" else self.stills_per_gpu

    def compute_latent_grid(self, kind: Kind) -> tuple[int, int, int]:
        return compute_latent_grid(self.width, self.height, self.frames if kind == "clip" else 1)

    def count_decoder_tokens(self, kind: Kind) -> int:
        return count_decoder_tokens(self.preset, self.compute_latent_grid(kind))

    def count_model_tokens(self, kind: Kind) -> int:
        """Return the tokens of the largest model that a step runs: the MLLM in stage 1, otherwise the decoder."""
        return MLLM_TOKENS[kind] if self.recipe.startswith("stage1") else self.count_decoder_tokens(kind)

    def count_condition_tokens(self, kind: Kind) -> int:
        """Return the condition tokens of an edit, the longest: source, visual tokens and a text of maximum length.

        The count includes the six markers and stays within the preset's limits.
        """
        adapter = self.preset.adapter
        assert adapter is not None, "a version 1 preset"
        tokens = count_visual_context_tokens(self.preset, self.compute_latent_grid(kind))
        tokens += self.preset.text.max_tokens + 6
        tokens += adapter.num_queries * (count_visual_tokens(self.preset) if kind == "clip" else 1)
        return min(max(self.preset.condition.min_tokens, tokens), self.preset.condition.max_tokens)


def count_visual_tokens(preset: Preset) -> int:
    return preset.vision_head.num_queries if preset.vision_head else 0


def validate_config(config: PlanConfig) -> None:
    """Raise InvalidInput if a value is out of range or unknown."""
    if config.recipe not in TASKS_BY_STAGE:
        raise InvalidInput("recipe", f"{config.recipe!r} has no plan; use one of {', '.join(TASKS_BY_STAGE)}")
    if config.preset.name != OMNIVIDEO_1_3B.name:
        raise InvalidInput("preset", f"{config.preset.name!r} has no plan; use {OMNIVIDEO_1_3B.name}")
    compute_latent_grid(config.width, config.height, config.frames)
    heads, size = config.preset.decoder["num_attention_heads"], config.sequence_parallel_size
    if size < 1 or config.gpus % size or heads % size:
        raise InvalidInput(
            "sequence-parallel", f"{size} does not divide both the {config.gpus} GPUs and the decoder's {heads} heads"
        )
    if not 0 < config.utilisation <= 1:
        raise InvalidInput("utilisation", f"{config.utilisation} must be above 0 and at most 1")
