"""What a stage costs at full size, before any GPU hour is spent: weights, memory, step time and days.

Nothing is measured and nothing is allocated: the models stand on the meta device, and every figure follows from
formulas that docs/plan.md states and the tests compare with torch's own counters at tiny size.  GB are 10^9 bytes.
Letters: N decoder tokens, L condition tokens, d width, f feed-forward.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
    UMT5Config,
    UMT5EncoderModel,
)

from omnivideo.errors import InvalidInput
from omnivideo.models.omni import Bridge, build_decoder
from omnivideo.presets import (
    OMNIVIDEO_1_3B,
    Preset,
    QueryTransformerConfig,
    compute_latent_grid,
    count_decoder_tokens,
    count_visual_context_tokens,
    get_preset,
)
from omnivideo.training.engine.placement import choose_placement
from omnivideo.training.engine.trainer import freeze_except
from omnivideo.training.planning.flops import (
    GPU,
    GPUS,
    Flops,
    compute_mfu,
    count_decoder_flops,
    count_query_transformer_flops,
    count_visual_context_flops,
    decoder_width,
)
from omnivideo.training.recipes.parts import TRAINABLE_BY_STAGE

# Qwen3-VL 8B, whose width is the preset's; the encoder of Wan's text condition; SigLIP2 so400m.
MLLM_CONFIG: dict[str, Any] = {
    "text_config": {
        "vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262_144,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20],
                            "mrope_interleaved": True},
    },
    "vision_config": {
        "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 4096, "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    },
    "tie_word_embeddings": False,
}  # fmt: skip
UMT5_XXL_CONFIG: dict[str, Any] = {
    "vocab_size": 256_384, "d_model": 4096, "d_kv": 64, "d_ff": 10_240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
SIGLIP_CONFIG: dict[str, Any] = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "image_size": 384, "patch_size": 14,
}  # fmt: skip

# Samples of the paper's Table 1, by task; a task of video is one whose name has it.
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
EDITING_STAGES = ("stage2b", "stage3")  # with a source to encode
ALIGNED_STAGES = ("stage1", "stage3")  # by Eq. 1, to the visual encoder
FLOW_STAGES = ("stage2b_generation", "stage2b", "stage3")  # and these go through the decoder

MLLM_TOKENS = {"still": 512, "clip": 2048}  # of a request with its media and answer
FIXED_OVERHEAD_GB = 2.5  # GB of CUDA context, NCCL buffers and library work spaces
VAE_ENCODE_BATCH_SIZE, VAE_CHANNELS = 8, 96  # stills that the VAE encodes at once, its channels at full size
GRADIENT_BUCKET_SIZE = 5e8  # gradients that DeepSpeed sends at once
GPUS_PER_NODE, NETWORK_GB_PER_SECOND = (
    8,
    50.0,
)  # GPUs that share the fast link; GB/s one way of each GPU to other nodes (400 Gb/s)
SECONDS_PER_DAY = 86_400.0


@dataclass(frozen=True)
class PlanConfig:
    """What is to be planned.  `batch` is clips on one GPU in one of a step's `passes`; stills are as many as make the
    same number of tokens."""

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
    def stills_per_gpu(self) -> int:
        """Images on one GPU."""
        return max(1, self.clips_per_gpu * self.count_model_tokens("clip") // self.count_model_tokens("still"))

    def samples_per_gpu(self, kind: str) -> int:
        return self.clips_per_gpu if kind == "clip" else self.stills_per_gpu

    def compute_latent_grid(self, kind: str) -> tuple[int, int, int]:
        return compute_latent_grid(self.width, self.height, self.frames if kind == "clip" else 1)

    def count_decoder_tokens(self, kind: str) -> int:
        return count_decoder_tokens(self.preset, self.compute_latent_grid(kind))

    def count_model_tokens(self, kind: str) -> int:
        """Tokens of the model that a step spends its time in: the MLLM in stage 1, else the decoder."""
        return MLLM_TOKENS[kind] if self.recipe.startswith("stage1") else self.count_decoder_tokens(kind)

    def count_condition_tokens(self, kind: str) -> int:
        """L of an edit, which is the longest: source, visual tokens and a text of full length, within the limits."""
        adapter = self.preset.adapter
        assert adapter is not None, "a version 1 preset"
        needed = (
            count_visual_context_tokens(self.preset, self.compute_latent_grid(kind)) + self.preset.max_text_tokens + 6
        )
        needed += adapter.num_queries * (count_visual_tokens(self.preset) if kind == "clip" else 1)
        return min(max(self.preset.min_condition_tokens, needed), self.preset.max_condition_tokens)


@dataclass(frozen=True)
class TrainingPlan:
    """Counts of parameters, memory of one GPU in GB by part, and times of one step of each kind in seconds.

    `memory` is what is always there, `peaks` what comes and goes, one after the other.
    """

    config: PlanConfig
    trained_parameters: int
    frozen_parameters: int
    offloaded_parameters: int
    resident_gb: dict[str, float]
    transient_gb: dict[str, float]
    step_seconds: dict[str, dict[str, float]]
    step_flops: dict[str, float]
    steps: dict[str, float]

    @property
    def required_gb(self) -> float:
        return sum(self.resident_gb.values()) + max(self.transient_gb.values())

    @property
    def total_seconds(self) -> float:
        return sum(count * sum(self.step_seconds[kind].values()) for kind, count in self.steps.items())

    @property
    def days(self) -> float:
        return self.total_seconds / SECONDS_PER_DAY

    @property
    def mfu(self) -> float:
        operations = sum(self.step_flops[kind] * count for kind, count in self.steps.items())
        return compute_mfu(operations, self.total_seconds, self.config.gpu.peak_tflops)


def count_visual_tokens(model_preset: Preset) -> int:
    return model_preset.vision_head.num_queries if model_preset.vision_head else 0


# ---------------------------------------------------------------- the models


def build_meta_models(model_preset: Preset) -> nn.ModuleDict:
    """All parts under the names that the stages speak of, without memory."""
    with torch.device("meta"):
        parts = {
            "mllm": Qwen3VLForConditionalGeneration(Qwen3VLConfig(**MLLM_CONFIG)),
            "bridge": Bridge(model_preset),
            "decoder": build_decoder(model_preset),
            "text_encoder": UMT5EncoderModel(UMT5Config(**UMT5_XXL_CONFIG)),
            "vae": AutoencoderKLWan(**model_preset.vae),
            "visual_encoder": SiglipVisionModel(SiglipVisionConfig(**SIGLIP_CONFIG)),
        }
    return nn.ModuleDict(parts)


@dataclass(frozen=True)
class StageWeights:
    """A stage's parameters: trained, of every part, frozen on the GPU, and the bytes of these."""

    trained_parameters: int
    parameters_by_part: dict[str, int]
    frozen_parameters: int
    frozen_bytes: int


@cache
def count_stage_weights(preset_name: str, recipe: str, cached: bool) -> StageWeights:
    """Of the parts that the stage reads, placed as `loading` does it."""
    models = build_meta_models(get_preset(preset_name))
    if recipe not in ALIGNED_STAGES:
        del models["visual_encoder"]
    counts = {part: sum(parameter.numel() for parameter in model.parameters()) for part, model in models.items()}
    trained = sum(parameter.numel() for _, parameter in freeze_except(models, TRAINABLE_BY_STAGE[recipe]))
    placements = [
        (
            parameter.numel(),
            choose_placement(recipe, key, torch.device("cuda"), torch.bfloat16, cached or recipe == "stage1"),
        )
        for key, parameter in models.named_parameters()
        if not parameter.requires_grad
    ]
    on_gpu = [(count, count * place.dtype.itemsize) for count, place in placements if place.device.type == "cuda"]
    return StageWeights(trained, counts, sum(count for count, _ in on_gpu), sum(size for _, size in on_gpu))


def has_inline_encoding(config: PlanConfig) -> bool:
    """Whether latents and text are made on the way."""
    return not config.cached and config.recipe != "stage1"


# ---------------------------------------------------------------- memory


def estimate_decoder_activations(
    config: Mapping[str, Any], tokens: int, condition: int, trained: bool, checkpointing: bool, size: int = 2
) -> float:
    """Bytes kept for the backward pass of one sample; `size` is that of an activation, norms and gates are fp32."""
    n, c, d, f = tokens, condition, decoder_width(config), config["ffn_dim"]
    heads = config["num_attention_heads"]
    if trained:
        block = n * (size * (13 * d + 2 * f) + 4 * 6 * d) + 3 * size * c * d
    else:  # the inputs of frozen products and gates are not kept
        block = n * (size * (9 * d + f) + 4 * 3 * d) + 3 * size * c * d
    block += n * 4 * 2 * heads  # the scores' normalisers
    ends = n * (4 * 2 + size) * d + size * c * (config["text_dim"] + 3 * d) if trained else n * 4 * d + size * c * d
    layers = config["num_layers"]
    return ends + (layers * size * n * d + block if checkpointing else layers * block)


def estimate_query_transformer_activations(size: QueryTransformerConfig, inputs: int, bytes_each: int = 2) -> float:
    """Bytes kept for the backward pass of one run of the vision head or the adapter."""
    s, q, d = inputs, size.num_queries, size.width
    return bytes_each * (size.num_layers * (12 * s + 16 * q + 2 * s) * d + s * (size.input_dim + 3 * d))


def estimate_activations(config: PlanConfig, kind: str) -> float:
    """Bytes of a batch of one kind on one GPU."""
    model_preset, recipe, count = config.preset, config.recipe, config.samples_per_gpu(kind)
    head, adapter = model_preset.vision_head, model_preset.adapter
    assert head is not None and adapter is not None, "a version 1 preset"
    total = 0.0
    if recipe in ALIGNED_STAGES:
        total += estimate_query_transformer_activations(head, MLLM_TOKENS[kind])
    if recipe.startswith("stage1"):
        total += (
            MLLM_TOKENS[kind] * MLLM_CONFIG["text_config"]["vocab_size"] * 10
        )  # logits in bf16, in fp32, and their gradient
    else:
        total += estimate_query_transformer_activations(adapter, 1) * (
            count_visual_tokens(model_preset) if kind == "clip" else 1
        )
    if recipe.startswith(("stage2b", "stage3")):
        shares = (
            config.count_decoder_tokens(kind) // config.sequence_parallel_size,
            config.count_condition_tokens(kind) // config.sequence_parallel_size,
        )
        total += estimate_decoder_activations(model_preset.decoder, *shares, recipe == "stage3", config.checkpointing)
        total += shares[1] * 2 * (model_preset.visual_context.hidden_dim + 2 * model_preset.text_width)
    return total * count


def estimate_resident_gb(trained: int, frozen_bytes: int, has_ema: bool, gpus: int) -> dict[str, float]:
    """GB of one GPU that are always there: of one process as the plain trainer has them, of several as ZeRO-1 does,
    which divides the optimizer's states and the average over all, nothing else."""
    trained_per_gpu = trained / gpus
    if gpus == 1:
        parts: dict[str, float] = {"weights trained (fp32)": 4 * trained, "optimizer: two moments (fp32)": 8 * trained}
    else:
        parts = {
            "weights trained (bf16)": 2 * trained,
            "optimizer: master weights, two moments (fp32)": 12 * trained_per_gpu,
        }
    parts["average of the weights (fp32)"] = 4 * trained_per_gpu if has_ema else 0
    parts["weights frozen (bf16)"] = frozen_bytes
    return {name: count / 1e9 for name, count in parts.items()} | {"CUDA, NCCL, work spaces": FIXED_OVERHEAD_GB}


def estimate_transient_gb(config: PlanConfig, trained: int) -> dict[str, float]:
    """GB of one GPU that are there one after the other: the largest counts.

    Gradients come as activations go; what earlier passes have added up to, in fp32, stays.  Autocast keeps its bf16
    copies of fp32 weights for the backward pass.  DeepSpeed reduces whole bf16 gradients by buckets, then has those of
    its share thrice: as they were, flattened, and in fp32.
    """
    activation_bytes, gpus = max(estimate_activations(config, kind) for kind in ("still", "clip")), config.gpus
    is_accumulating = config.grad_accum_steps > 1
    sums = 4.0 * trained if is_accumulating else 0.0
    if gpus == 1:
        bytes_by_part = {
            "activations, copies of weights (bf16)": activation_bytes + 2 * trained + sums,
            "gradients (fp32)": 4.0 * trained,
        }
    else:
        reduced = 2 * (trained + min(trained, GRADIENT_BUCKET_SIZE))
        gradients = max(reduced, 8 * trained / gpus, 6.0 * trained if is_accumulating else 0.0)
        bytes_by_part = {"activations": activation_bytes + sums, "gradients (bf16), of the share fp32": gradients}
    if has_inline_encoding(config):
        bytes_by_part["encoding (fp32)"] = max(estimate_encoding_bytes(config, kind) for kind in ("still", "clip"))
    return {name: count / 1e9 for name, count in bytes_by_part.items()}


def estimate_encoding_bytes(config: PlanConfig, kind: str) -> float:
    """Bytes that the VAE works in: about ten of its widest activations, four frames of one clip or some stills."""
    frame_count = 4 if kind == "clip" else min(VAE_ENCODE_BATCH_SIZE, 2 * config.stills_per_gpu)
    return 10 * 4 * VAE_CHANNELS * config.width * config.height * frame_count


# ---------------------------------------------------------------- time


def estimate_mllm_flops(tokens: int, parameters: int) -> Flops:
    text = MLLM_CONFIG["text_config"]
    width = text["num_attention_heads"] * text["head_dim"]
    return Flops(2.0 * parameters * tokens, 2.0 * tokens**2 * width * text["num_hidden_layers"])  # half: causal


def estimate_visual_encoder_flops(frames: int, parameters: int) -> Flops:
    tokens, width, layers = ((SIGLIP_CONFIG["image_size"] // SIGLIP_CONFIG["patch_size"]) ** 2,
                             SIGLIP_CONFIG["hidden_size"], SIGLIP_CONFIG["num_hidden_layers"])  # fmt: skip
    return Flops(2.0 * parameters * tokens, 4.0 * tokens**2 * width * layers) * frames


def estimate_text_encoder_flops(tokens: int, parameters: int) -> Flops:
    width = UMT5_XXL_CONFIG["num_heads"] * UMT5_XXL_CONFIG["d_kv"]
    return Flops(2.0 * parameters * tokens, 4.0 * tokens**2 * width * UMT5_XXL_CONFIG["num_layers"])


@cache
def count_vae_flops(preset_name: str, width: int, height: int, frames: int) -> Flops:
    """Encoding one clip, counted by torch over the meta device."""
    with torch.device("meta"):
        vae, pixels = AutoencoderKLWan(**get_preset(preset_name).vae), torch.empty(1, 3, frames, height, width)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.encode(pixels)
    return Flops(float(counter.get_total_flops()))


def count_table_parameters() -> dict[str, int]:
    """Parameters of the language models that not every token is multiplied with."""
    text = MLLM_CONFIG["text_config"]
    table = text["vocab_size"] * text["hidden_size"]
    return {"lm_head": table, "embeddings": table, "words": UMT5_XXL_CONFIG["vocab_size"] * UMT5_XXL_CONFIG["d_model"]}


def estimate_sample_flops(config: PlanConfig, kind: str, sizes: Mapping[str, int]) -> tuple[Flops, Flops]:
    """Of one sample: the model's own, and those that take time beside them (checkpointing, what makes the targets)."""
    model_preset, recipe = config.preset, config.recipe
    head, adapter = model_preset.vision_head, model_preset.adapter
    assert head is not None and adapter is not None, "a version 1 preset"
    mllm_tokens, queries = MLLM_TOKENS[kind], count_visual_tokens(model_preset)
    head_flops, extra_flops = count_query_transformer_flops(head, mllm_tokens), Flops()
    model_flops = estimate_mllm_flops(mllm_tokens, sizes["mllm"] - sizes["lm_head"] - sizes["embeddings"])
    model_flops += head_flops.with_backward if recipe in ALIGNED_STAGES else head_flops
    if recipe in ALIGNED_STAGES:
        extra_flops += estimate_visual_encoder_flops(queries if kind == "clip" else 1, sizes["visual_encoder"])
    if recipe == "stage1":  # the text head's inputs have no gradients
        model_flops += Flops(2.0 * mllm_tokens * sizes["lm_head"]) * 2
    else:
        model_flops += (count_query_transformer_flops(adapter, 1) * (queries if kind == "clip" else 1)).with_backward
    if has_inline_encoding(config):
        frames = config.frames if kind == "clip" else 1
        clips = 2 if recipe in EDITING_STAGES else 1
        extra_flops += estimate_text_encoder_flops(model_preset.max_text_tokens, sizes["text_encoder"] - sizes["words"])
        # TF32 has half the rate of bf16.
        extra_flops += count_vae_flops(model_preset.name, config.width, config.height, frames) * clips * 2
    if recipe in FLOW_STAGES:
        model_flops += count_visual_context_flops(
            model_preset, count_visual_context_tokens(model_preset, config.compute_latent_grid(kind))
        ).with_backward
    # Processes that share a sample's tokens share the decoder's work: all the rest each does for itself.
    extra_flops += (model_flops + extra_flops) * (config.sequence_parallel_size - 1)
    if recipe in FLOW_STAGES:
        forward = count_decoder_flops(
            model_preset.decoder, config.count_decoder_tokens(kind), config.count_condition_tokens(kind)
        )
        model_flops += forward.with_backward if recipe == "stage3" else forward.with_frozen_backward
        extra_flops += forward if config.checkpointing else Flops()
    return model_flops, extra_flops


def find_slowest_link(config: PlanConfig) -> float:
    """GB/s one way between the GPUs: the slowest on the way."""
    return (
        config.gpu.link_gb_per_second
        if config.gpus <= GPUS_PER_NODE
        else min(config.gpu.link_gb_per_second, NETWORK_GB_PER_SECOND)
    )


def estimate_step_seconds(
    config: PlanConfig, kind: str, trained: int, model_flops: Flops, extra_flops: Flops
) -> dict[str, float]:
    """Seconds of one step, its parts one after the other: what overlaps in practice makes it shorter."""
    count, gpus = config.samples_per_gpu(kind) * config.grad_accum_steps, config.gpus
    operations = (model_flops + extra_flops).total * count / config.sequence_parallel_size
    exchanged_gb = 2 * 2 * trained * (gpus - 1) / gpus / 1e9  # gradients to their owners, weights back, in bf16
    touched_gb = (16 + 12 + 8 + 4) * trained / gpus / 1e9  # states read and written, the average, the gradients
    times = {
        "compute": operations / (config.gpu.peak_tflops * 1e12 * config.utilisation),
        "gradients and weights": exchanged_gb / find_slowest_link(config),
        "optimizer": touched_gb / config.gpu.memory_gb_per_second,
    }
    if config.sequence_parallel_size > 1:
        times["all-to-all"] = estimate_all_to_all_gb(config, kind) * count / config.gpu.link_gb_per_second
    return times


def estimate_all_to_all_gb(config: PlanConfig, kind: str) -> float:
    """GB that one GPU sends for one sample: queries, keys, values and outputs of every block, there and back."""
    decoder_config, group_size = config.preset.decoder, config.sequence_parallel_size
    passes = 3 if config.checkpointing else 2
    values_bytes = (
        4
        * config.count_decoder_tokens(kind)
        / group_size
        * decoder_width(decoder_config)
        * 2
        * (group_size - 1)
        / group_size
    )
    return values_bytes * decoder_config["num_layers"] * passes / 1e9


def count_steps(config: PlanConfig) -> dict[str, float]:
    """Steps of each kind: one pass over the stage's tasks of Table 1, or `steps` of them in the same ratio."""
    tasks = {task: count for task, count in PAPER_SAMPLE_COUNTS.items() if task in TASKS_BY_STAGE[config.recipe]}
    clips = sum(count for task, count in tasks.items() if "video" in task)
    samples = {"still": sum(tasks.values()) - clips, "clip": clips}
    batch = {kind: config.samples_per_gpu(kind) * config.grad_accum_steps * config.replicas for kind in samples}
    epoch = {kind: count / batch[kind] for kind, count in samples.items()}
    total_steps = sum(epoch.values())
    return (
        epoch
        if config.steps is None
        else {kind: config.steps * kind_steps / total_steps for kind, kind_steps in epoch.items()}
    )


# ---------------------------------------------------------------- the plan


def build_plan(config: PlanConfig) -> TrainingPlan:
    """Raises InvalidInput for a setting that cannot be, not for one that does not fit: see `check`."""
    validate_config(config)
    weights = count_stage_weights(config.preset.name, config.recipe, config.cached)
    trained, sizes = weights.trained_parameters, weights.parameters_by_part | count_table_parameters()
    work = {kind: estimate_sample_flops(config, kind, sizes) for kind in ("still", "clip")}
    return TrainingPlan(
        config,
        trained,
        weights.frozen_parameters,
        sum(weights.parameters_by_part.values()) - trained - weights.frozen_parameters,
        estimate_resident_gb(trained, weights.frozen_bytes, config.recipe in FLOW_STAGES, config.gpus),
        estimate_transient_gb(config, trained),
        {kind: estimate_step_seconds(config, kind, trained, *flops_pair) for kind, flops_pair in work.items()},
        {
            kind: model_flops.total
            * config.samples_per_gpu(kind)
            * config.grad_accum_steps
            / config.sequence_parallel_size
            for kind, (model_flops, _) in work.items()
        },
        count_steps(config),
    )


def validate_config(config: PlanConfig) -> None:
    if config.recipe not in TASKS_BY_STAGE:
        raise InvalidInput("recipe", f"{config.recipe!r} has no plan; {', '.join(TASKS_BY_STAGE)} have")
    if config.preset.name != OMNIVIDEO_1_3B.name:
        raise InvalidInput("preset", f"{config.preset.name!r} has no plan; use {OMNIVIDEO_1_3B.name}")
    compute_latent_grid(config.width, config.height, config.frames)
    heads = config.preset.decoder["num_attention_heads"]
    if (
        config.sequence_parallel_size < 1
        or config.gpus % config.sequence_parallel_size
        or heads % config.sequence_parallel_size
    ):
        divisors = f"the {config.gpus} GPUs and the decoder's {heads} heads"
        raise InvalidInput("sequence-parallel", f"{config.sequence_parallel_size} does not divide {divisors}")
    if not 0 < config.utilisation <= 1:
        raise InvalidInput("utilisation", f"{config.utilisation} is not in 0 to 1")


def check_fits(plan: TrainingPlan) -> None:
    """Raises InvalidInput where the plan does not fit its GPU, with what would make it fit."""
    gpu = plan.config.gpu
    if plan.required_gb <= gpu.memory_gb:
        return
    fitting_changes = [
        change
        for change, changed in iter_remedies(plan.config)
        if build_plan(changed).required_gb <= changed.gpu.memory_gb
    ]
    hint = (
        f"it fits with {' or with '.join(fitting_changes[:3])}"
        if fitting_changes
        else "no single change of the plan's makes it fit"
    )
    raise InvalidInput(
        "gpus", f"{plan.required_gb:.1f} GB do not fit the {gpu.memory_gb:g} GB of one {gpu.name}; {hint}"
    )


def iter_remedies(config: PlanConfig) -> Iterator[tuple[str, PlanConfig]]:
    """Single changes that save memory, the cheapest first."""
    if not config.cached:
        yield "--cached", replace(config, cached=True)
    if not config.checkpointing:
        yield "--checkpointing", replace(config, checkpointing=True)
    for batch in (config.clips_per_gpu // 2, 1):
        if 1 <= batch < config.clips_per_gpu:
            yield f"--batch {batch}", replace(config, clips_per_gpu=batch)
    for sequence in (2, 4):
        if sequence > config.sequence_parallel_size and config.gpus % sequence == 0:
            yield f"--sequence-parallel {sequence}", replace(config, sequence_parallel_size=sequence)
    for factor in (2, 4, 8):
        yield f"--gpus {config.gpus * factor}x{config.gpu.name}", replace(config, gpus=config.gpus * factor)
    for gpu in sorted(GPUS.values(), key=lambda candidate: candidate.memory_gb):
        if gpu.memory_gb > config.gpu.memory_gb:
            yield f"--gpus {config.gpus}x{gpu.name}", replace(config, gpu=gpu)


# ---------------------------------------------------------------- in words


def plan_to_table(plan: TrainingPlan) -> Table:
    """All figures, with the assumptions that they hang on."""
    config = plan.config
    table = Table(title=f"{config.recipe} of {config.preset.name} on {config.gpus} x {config.gpu.name}")
    table.add_column("what")
    table.add_column("figure", justify="right")
    for rows in (format_weight_rows(plan), format_memory_rows(plan), format_time_rows(plan)):
        for row in rows:
            table.add_row(*row)
        table.add_section()
    table.caption = (
        f"assumed: {config.utilisation:.0%} of {config.gpu.peak_tflops:g} TFLOP/s (dense bf16) in products and "
        "attention; "
        f"{config.gpu.memory_gb_per_second:g} GB/s of memory, {find_slowest_link(config):g} GB/s between GPUs; "
        "nothing overlaps. "
        f"Peaks: {config.gpu.datasheet}"
    )
    return table


def format_weight_rows(plan: TrainingPlan) -> list[tuple[str, str]]:
    return [
        ("parameters trained", f"{plan.trained_parameters:,}"),
        ("parameters frozen, on the GPU", f"{plan.frozen_parameters:,}"),
        ("parameters on the CPU (text encoder, VAE)", f"{plan.offloaded_parameters:,}"),
    ]


def format_memory_rows(plan: TrainingPlan) -> list[tuple[str, str]]:
    rows = [(f"GB, {name}", f"{value:.2f}") for name, value in plan.resident_gb.items()]
    rows += [(f"GB in turn, {name}", f"{value:.2f}") for name, value in plan.transient_gb.items()]
    return [*rows, (f"GB, all, of the {plan.config.gpu.memory_gb:g} of one GPU", f"{plan.required_gb:.2f}")]


def format_time_rows(plan: TrainingPlan) -> list[tuple[str, str]]:
    config, rows = plan.config, []
    for kind, times in plan.step_seconds.items():
        condition = "" if config.recipe.startswith("stage1") else f", condition {config.count_condition_tokens(kind):,}"
        passes = f"{config.grad_accum_steps} x " if config.grad_accum_steps > 1 else ""
        batch = f"{passes}{config.samples_per_gpu(kind)} x {config.count_model_tokens(kind):,} tokens{condition}"
        rows.append((f"a step of {kind}s on each GPU", batch))
        rows += [(f"  seconds, {name}", f"{seconds:.3f}") for name, seconds in times.items()]
    rows.append(("TFLOP a GPU and clip step, attention counted", f"{plan.step_flops['clip'] / 1e12:.1f}"))
    rows.append(("MFU that follows", f"{plan.mfu:.2f}"))
    counts = ", ".join(f"{count:,.0f} of {kind}s" for kind, count in plan.steps.items())
    rows.append(("steps" if config.steps else "steps of one pass over Table 1", counts))
    return [*rows, ("days", f"{plan.days:.2f}")]
