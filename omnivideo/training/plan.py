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
    QueryTransformerSize,
    decoder_tokens,
    latent_grid,
    preset,
    visual_context_tokens,
)
from omnivideo.training.flops import (
    GPU,
    GPUS,
    Flops,
    decoder_flops,
    decoder_width,
    mfu,
    query_transformer_flops,
    visual_context_flops,
)
from omnivideo.training.loading import place_of
from omnivideo.training.recipes.stages import TRAINED
from omnivideo.training.trainer import freeze

# Qwen3-VL 8B, whose width is the preset's; the encoder of Wan's text condition; SigLIP2 so400m.
MLLM: dict[str, Any] = {
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
UMT5_XXL: dict[str, Any] = {
    "vocab_size": 256_384, "d_model": 4096, "d_kv": 64, "d_ff": 10_240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
SIGLIP: dict[str, Any] = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "image_size": 384, "patch_size": 14,
}  # fmt: skip

# Samples of the paper's Table 1, by task; a task of video is one whose name has it.
TABLE_1 = {
    "image understanding": 17.2e6, "video understanding": 1.98e6, "text-to-image": 15e6, "text-to-video": 1.8e6,
    "image editing": 8.6e6, "video editing": 0.8e6,
}  # fmt: skip
GENERATION = ("text-to-image", "text-to-video")
DRAWN = (*GENERATION, "image editing", "video editing")
TASKS_OF = {"stage1": tuple(TABLE_1), "stage2a": GENERATION, "stage2b_generation": GENERATION, "stage2b": DRAWN,
            "stage3": DRAWN}  # fmt: skip
EDITING = ("stage2b", "stage3")  # with a source to encode
ALIGNED = ("stage1", "stage3")  # by Eq. 1, to the visual encoder
AVERAGED = ("stage2b_generation", "stage2b", "stage3")  # and these go through the decoder

MLLM_TOKENS = {"still": 512, "clip": 2048}  # of a request with its media and answer
FIXED = 2.5  # GB of CUDA context, NCCL buffers and library work spaces
TOGETHER, VAE_WIDTH = 8, 96  # stills that the VAE encodes at once, its channels at full size
BUCKET = 5e8  # gradients that DeepSpeed sends at once
NODE, NETWORK = 8, 50.0  # GPUs that share the fast link; GB/s one way of each GPU to other nodes (400 Gb/s)
DAY = 86_400.0


@dataclass(frozen=True)
class Setting:
    """What is to be planned.  `batch` is clips on one GPU in one of a step's `passes`; stills are as many as make the
    same number of tokens."""

    recipe: str
    gpu: GPU
    gpus: int
    preset: Preset = OMNIVIDEO_1_3B
    batch: int = 1
    width: int = 832
    height: int = 480
    frames: int = 17
    sequence: int = 1
    checkpointing: bool = False
    cached: bool = True
    steps: int | None = None
    utilisation: float = 0.45
    passes: int = 1

    @property
    def replicas(self) -> int:
        return self.gpus // self.sequence

    @property
    def stills(self) -> int:
        """Images on one GPU."""
        return max(1, self.batch * self.seen("clip") // self.seen("still"))

    def count(self, kind: str) -> int:
        return self.batch if kind == "clip" else self.stills

    def grid(self, kind: str) -> tuple[int, int, int]:
        return latent_grid(self.width, self.height, self.frames if kind == "clip" else 1)

    def tokens(self, kind: str) -> int:
        return decoder_tokens(self.preset, self.grid(kind))

    def seen(self, kind: str) -> int:
        """Tokens of the model that a step spends its time in: the MLLM in stage 1, else the decoder."""
        return MLLM_TOKENS[kind] if self.recipe.startswith("stage1") else self.tokens(kind)

    def condition(self, kind: str) -> int:
        """L of an edit, which is the longest: source, visual tokens and a text of full length, within the limits."""
        adapter = self.preset.adapter
        assert adapter is not None, "a version 1 preset"
        needed = visual_context_tokens(self.preset, self.grid(kind)) + self.preset.text_tokens + 6
        needed += adapter.queries * (visual_tokens(self.preset) if kind == "clip" else 1)
        return min(max(self.preset.condition_least, needed), self.preset.condition_most)


@dataclass(frozen=True)
class Plan:
    """Counts of parameters, memory of one GPU in GB by part, and times of one step of each kind in seconds.

    `memory` is what is always there, `peaks` what comes and goes, one after the other.
    """

    setting: Setting
    trained: int
    frozen: int
    away: int
    memory: dict[str, float]
    peaks: dict[str, float]
    step: dict[str, dict[str, float]]
    flops: dict[str, float]
    steps: dict[str, float]

    @property
    def needed(self) -> float:
        return sum(self.memory.values()) + max(self.peaks.values())

    @property
    def seconds(self) -> float:
        return sum(count * sum(self.step[kind].values()) for kind, count in self.steps.items())

    @property
    def days(self) -> float:
        return self.seconds / DAY

    @property
    def mfu(self) -> float:
        done = sum(self.flops[kind] * count for kind, count in self.steps.items())
        return mfu(done, self.seconds, self.setting.gpu.tflops)


def visual_tokens(chosen: Preset) -> int:
    return chosen.vision_head.queries if chosen.vision_head else 0


# ---------------------------------------------------------------- the models


def models_of(chosen: Preset) -> nn.ModuleDict:
    """All parts under the names that the stages speak of, without memory."""
    with torch.device("meta"):
        parts = {
            "mllm": Qwen3VLForConditionalGeneration(Qwen3VLConfig(**MLLM)),
            "bridge": Bridge(chosen),
            "decoder": build_decoder(chosen),
            "text_encoder": UMT5EncoderModel(UMT5Config(**UMT5_XXL)),
            "vae": AutoencoderKLWan(**chosen.vae),
            "visual_encoder": SiglipVisionModel(SiglipVisionConfig(**SIGLIP)),
        }
    return nn.ModuleDict(parts)


@dataclass(frozen=True)
class Weights:
    """A stage's parameters: trained, of every part, frozen on the GPU, and the bytes of these."""

    trained: int
    parts: dict[str, int]
    frozen: int
    frozen_bytes: int


@cache
def weights_of(name: str, recipe: str, cached: bool) -> Weights:
    """Of the parts that the stage reads, placed as `loading` does it."""
    models = models_of(preset(name))
    if recipe not in ALIGNED:
        del models["visual_encoder"]
    counts = {part: sum(one.numel() for one in model.parameters()) for part, model in models.items()}
    trained = sum(one.numel() for _, one in freeze(models, TRAINED[recipe]))
    places = [
        (one.numel(), place_of(recipe, key, torch.device("cuda"), torch.bfloat16, cached or recipe == "stage1"))
        for key, one in models.named_parameters() if not one.requires_grad
    ]  # fmt: skip
    there = [(count, count * place.dtype.itemsize) for count, place in places if place.device.type == "cuda"]
    return Weights(trained, counts, sum(count for count, _ in there), sum(size for _, size in there))


def encodes(setting: Setting) -> bool:
    """Whether latents and text are made on the way."""
    return not setting.cached and setting.recipe != "stage1"


# ---------------------------------------------------------------- memory


def decoder_activations(
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


def query_transformer_activations(size: QueryTransformerSize, inputs: int, bytes_each: int = 2) -> float:
    """Bytes kept for the backward pass of one run of the vision head or the adapter."""
    s, q, d = inputs, size.queries, size.width
    return bytes_each * (size.layers * (12 * s + 16 * q + 2 * s) * d + s * (size.dim_in + 3 * d))


def activations(setting: Setting, kind: str) -> float:
    """Bytes of a batch of one kind on one GPU."""
    chosen, recipe, count = setting.preset, setting.recipe, setting.count(kind)
    head, adapter = chosen.vision_head, chosen.adapter
    assert head is not None and adapter is not None, "a version 1 preset"
    total = 0.0
    if recipe in ALIGNED:
        total += query_transformer_activations(head, MLLM_TOKENS[kind])
    if recipe.startswith("stage1"):
        total += (
            MLLM_TOKENS[kind] * MLLM["text_config"]["vocab_size"] * 10
        )  # logits in bf16, in fp32, and their gradient
    else:
        total += query_transformer_activations(adapter, 1) * (visual_tokens(chosen) if kind == "clip" else 1)
    if recipe.startswith(("stage2b", "stage3")):
        shares = setting.tokens(kind) // setting.sequence, setting.condition(kind) // setting.sequence
        total += decoder_activations(chosen.decoder, *shares, recipe == "stage3", setting.checkpointing)
        total += shares[1] * 2 * (chosen.visual_context.hidden + 2 * chosen.text_width)
    return total * count


def memory(trained: int, frozen_bytes: int, averaged: bool, gpus: int) -> dict[str, float]:
    """GB of one GPU that are always there: of one process as the plain trainer has them, of several as ZeRO-1 does,
    which divides the optimizer's states and the average over all, nothing else."""
    share = trained / gpus
    if gpus == 1:
        parts: dict[str, float] = {"weights trained (fp32)": 4 * trained, "optimizer: two moments (fp32)": 8 * trained}
    else:
        parts = {"weights trained (bf16)": 2 * trained, "optimizer: master weights, two moments (fp32)": 12 * share}
    parts["average of the weights (fp32)"] = 4 * share if averaged else 0
    parts["weights frozen (bf16)"] = frozen_bytes
    return {name: count / 1e9 for name, count in parts.items()} | {"CUDA, NCCL, work spaces": FIXED}


def peaks(setting: Setting, trained: int) -> dict[str, float]:
    """GB of one GPU that are there one after the other: the largest counts.

    Gradients come as activations go; what earlier passes have added up to, in fp32, stays.  Autocast keeps its bf16
    copies of fp32 weights for the backward pass.  DeepSpeed reduces whole bf16 gradients by buckets, then has those of
    its share thrice: as they were, flattened, and in fp32.
    """
    kept, gpus = max(activations(setting, kind) for kind in ("still", "clip")), setting.gpus
    several = setting.passes > 1
    sums = 4.0 * trained if several else 0.0
    if gpus == 1:
        found = {"activations, copies of weights (bf16)": kept + 2 * trained + sums, "gradients (fp32)": 4.0 * trained}
    else:
        reduced = 2 * (trained + min(trained, BUCKET))
        gradients = max(reduced, 8 * trained / gpus, 6.0 * trained if several else 0.0)
        found = {"activations": kept + sums, "gradients (bf16), of the share fp32": gradients}
    if encodes(setting):
        found["encoding (fp32)"] = max(encoding(setting, kind) for kind in ("still", "clip"))
    return {name: count / 1e9 for name, count in found.items()}


def encoding(setting: Setting, kind: str) -> float:
    """Bytes that the VAE works in: about ten of its widest activations, four frames of one clip or some stills."""
    together = 4 if kind == "clip" else min(TOGETHER, 2 * setting.stills)
    return 10 * 4 * VAE_WIDTH * setting.width * setting.height * together


# ---------------------------------------------------------------- time


def mllm_flops(tokens: int, parameters: int) -> Flops:
    text = MLLM["text_config"]
    width = text["num_attention_heads"] * text["head_dim"]
    return Flops(2.0 * parameters * tokens, 2.0 * tokens**2 * width * text["num_hidden_layers"])  # half: causal


def visual_encoder_flops(frames: int, parameters: int) -> Flops:
    tokens, width, layers = ((SIGLIP["image_size"] // SIGLIP["patch_size"]) ** 2,
                             SIGLIP["hidden_size"], SIGLIP["num_hidden_layers"])  # fmt: skip
    return Flops(2.0 * parameters * tokens, 4.0 * tokens**2 * width * layers) * frames


def text_encoder_flops(tokens: int, parameters: int) -> Flops:
    width = UMT5_XXL["num_heads"] * UMT5_XXL["d_kv"]
    return Flops(2.0 * parameters * tokens, 4.0 * tokens**2 * width * UMT5_XXL["num_layers"])


@cache
def vae_flops(name: str, width: int, height: int, frames: int) -> Flops:
    """Encoding one clip, counted by torch over the meta device."""
    with torch.device("meta"):
        vae, pixels = AutoencoderKLWan(**preset(name).vae), torch.empty(1, 3, frames, height, width)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.encode(pixels)
    return Flops(float(counter.get_total_flops()))


def tables() -> dict[str, int]:
    """Parameters of the language models that not every token is multiplied with."""
    text = MLLM["text_config"]
    table = text["vocab_size"] * text["hidden_size"]
    return {"lm_head": table, "embeddings": table, "words": UMT5_XXL["vocab_size"] * UMT5_XXL["d_model"]}


def operations(setting: Setting, kind: str, sizes: Mapping[str, int]) -> tuple[Flops, Flops]:
    """Of one sample: the model's own, and those that take time beside them (checkpointing, what makes the targets)."""
    chosen, recipe = setting.preset, setting.recipe
    head, adapter = chosen.vision_head, chosen.adapter
    assert head is not None and adapter is not None, "a version 1 preset"
    seen, queries = MLLM_TOKENS[kind], visual_tokens(chosen)
    heads, beside = query_transformer_flops(head, seen), Flops()
    own = mllm_flops(seen, sizes["mllm"] - sizes["lm_head"] - sizes["embeddings"])
    own += heads.trained if recipe in ALIGNED else heads
    if recipe in ALIGNED:
        beside += visual_encoder_flops(queries if kind == "clip" else 1, sizes["visual_encoder"])
    if recipe == "stage1":  # the text head's inputs have no gradients
        own += Flops(2.0 * seen * sizes["lm_head"]) * 2
    else:
        own += (query_transformer_flops(adapter, 1) * (queries if kind == "clip" else 1)).trained
    if encodes(setting):
        frames = setting.frames if kind == "clip" else 1
        clips = 2 if recipe in EDITING else 1
        beside += text_encoder_flops(chosen.text_tokens, sizes["text_encoder"] - sizes["words"])
        # TF32 has half the rate of bf16.
        beside += vae_flops(chosen.name, setting.width, setting.height, frames) * clips * 2
    if recipe in AVERAGED:
        own += visual_context_flops(chosen, visual_context_tokens(chosen, setting.grid(kind))).trained
    # Processes that share a sample's tokens share the decoder's work: all the rest each does for itself.
    beside += (own + beside) * (setting.sequence - 1)
    if recipe in AVERAGED:
        forward = decoder_flops(chosen.decoder, setting.tokens(kind), setting.condition(kind))
        own += forward.trained if recipe == "stage3" else forward.passed
        beside += forward if setting.checkpointing else Flops()
    return own, beside


def link(setting: Setting) -> float:
    """GB/s one way between the GPUs: the slowest on the way."""
    return setting.gpu.link if setting.gpus <= NODE else min(setting.gpu.link, NETWORK)


def step_times(setting: Setting, kind: str, trained: int, own: Flops, beside: Flops) -> dict[str, float]:
    """Seconds of one step, its parts one after the other: what overlaps in practice makes it shorter."""
    count, gpus = setting.count(kind) * setting.passes, setting.gpus
    done = (own + beside).total * count / setting.sequence
    exchanged = 2 * 2 * trained * (gpus - 1) / gpus / 1e9  # gradients to their owners, weights back, in bf16
    touched = (16 + 12 + 8 + 4) * trained / gpus / 1e9  # states read and written, the average, the gradients
    times = {
        "compute": done / (setting.gpu.tflops * 1e12 * setting.utilisation),
        "gradients and weights": exchanged / link(setting),
        "optimizer": touched / setting.gpu.bandwidth,
    }
    if setting.sequence > 1:
        times["all-to-all"] = all_to_all(setting, kind) * count / setting.gpu.link
    return times


def all_to_all(setting: Setting, kind: str) -> float:
    """GB that one GPU sends for one sample: queries, keys, values and outputs of every block, there and back."""
    config, parts = setting.preset.decoder, setting.sequence
    passes = 3 if setting.checkpointing else 2
    sent = 4 * setting.tokens(kind) / parts * decoder_width(config) * 2 * (parts - 1) / parts
    return sent * config["num_layers"] * passes / 1e9


def steps_of(setting: Setting) -> dict[str, float]:
    """Steps of each kind: one pass over the stage's tasks of Table 1, or `steps` of them in the same ratio."""
    tasks = {task: count for task, count in TABLE_1.items() if task in TASKS_OF[setting.recipe]}
    clips = sum(count for task, count in tasks.items() if "video" in task)
    samples = {"still": sum(tasks.values()) - clips, "clip": clips}
    batch = {kind: setting.count(kind) * setting.passes * setting.replicas for kind in samples}
    epoch = {kind: count / batch[kind] for kind, count in samples.items()}
    whole = sum(epoch.values())
    return epoch if setting.steps is None else {kind: setting.steps * part / whole for kind, part in epoch.items()}


# ---------------------------------------------------------------- the plan


def plan(setting: Setting) -> Plan:
    """Raises InvalidInput for a setting that cannot be, not for one that does not fit: see `check`."""
    validate(setting)
    found = weights_of(setting.preset.name, setting.recipe, setting.cached)
    trained, sizes = found.trained, found.parts | tables()
    work = {kind: operations(setting, kind, sizes) for kind in ("still", "clip")}
    return Plan(
        setting,
        trained,
        found.frozen,
        sum(found.parts.values()) - trained - found.frozen,
        memory(trained, found.frozen_bytes, setting.recipe in AVERAGED, setting.gpus),
        peaks(setting, trained),
        {kind: step_times(setting, kind, trained, *both) for kind, both in work.items()},
        {kind: own.total * setting.count(kind) * setting.passes / setting.sequence for kind, (own, _) in work.items()},
        steps_of(setting),
    )


def validate(setting: Setting) -> None:
    if setting.recipe not in TASKS_OF:
        raise InvalidInput("recipe", f"{setting.recipe!r} has no plan; {', '.join(TASKS_OF)} have")
    if setting.preset.name != OMNIVIDEO_1_3B.name:
        raise InvalidInput("preset", f"{setting.preset.name!r} has no plan; use {OMNIVIDEO_1_3B.name}")
    latent_grid(setting.width, setting.height, setting.frames)
    heads = setting.preset.decoder["num_attention_heads"]
    if setting.sequence < 1 or setting.gpus % setting.sequence or heads % setting.sequence:
        both = f"the {setting.gpus} GPUs and the decoder's {heads} heads"
        raise InvalidInput("sequence-parallel", f"{setting.sequence} does not divide {both}")
    if not 0 < setting.utilisation <= 1:
        raise InvalidInput("utilisation", f"{setting.utilisation} is not in 0 to 1")


def check(made: Plan) -> None:
    """Raises InvalidInput where the plan does not fit its GPU, with what would make it fit."""
    gpu = made.setting.gpu
    if made.needed <= gpu.memory:
        return
    ways = [words for words, other in remedies(made.setting) if plan(other).needed <= other.gpu.memory]
    said = f"it fits with {' or with '.join(ways[:3])}" if ways else "no single change of the plan's makes it fit"
    raise InvalidInput("gpus", f"{made.needed:.1f} GB do not fit the {gpu.memory:g} GB of one {gpu.name}; {said}")


def remedies(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """Single changes that save memory, the cheapest first."""
    if not setting.cached:
        yield "--cached", replace(setting, cached=True)
    if not setting.checkpointing:
        yield "--checkpointing", replace(setting, checkpointing=True)
    for batch in (setting.batch // 2, 1):
        if 1 <= batch < setting.batch:
            yield f"--batch {batch}", replace(setting, batch=batch)
    for sequence in (2, 4):
        if sequence > setting.sequence and setting.gpus % sequence == 0:
            yield f"--sequence-parallel {sequence}", replace(setting, sequence=sequence)
    for times in (2, 4, 8):
        yield f"--gpus {setting.gpus * times}x{setting.gpu.name}", replace(setting, gpus=setting.gpus * times)
    for gpu in sorted(GPUS.values(), key=lambda one: one.memory):
        if gpu.memory > setting.gpu.memory:
            yield f"--gpus {setting.gpus}x{gpu.name}", replace(setting, gpu=gpu)


# ---------------------------------------------------------------- in words


def as_table(made: Plan) -> Table:
    """All figures, with the assumptions that they hang on."""
    setting = made.setting
    table = Table(title=f"{setting.recipe} of {setting.preset.name} on {setting.gpus} x {setting.gpu.name}")
    table.add_column("what")
    table.add_column("figure", justify="right")
    for rows in (weight_rows(made), memory_rows(made), time_rows(made)):
        for row in rows:
            table.add_row(*row)
        table.add_section()
    table.caption = (
        f"assumed: {setting.utilisation:.0%} of {setting.gpu.tflops:g} TFLOP/s (dense bf16) in products and attention; "
        f"{setting.gpu.bandwidth:g} GB/s of memory, {link(setting):g} GB/s between GPUs; nothing overlaps. "
        f"Peaks: {setting.gpu.source}"
    )
    return table


def weight_rows(made: Plan) -> list[tuple[str, str]]:
    return [
        ("parameters trained", f"{made.trained:,}"),
        ("parameters frozen, on the GPU", f"{made.frozen:,}"),
        ("parameters on the CPU (text encoder, VAE)", f"{made.away:,}"),
    ]


def memory_rows(made: Plan) -> list[tuple[str, str]]:
    rows = [(f"GB, {name}", f"{value:.2f}") for name, value in made.memory.items()]
    rows += [(f"GB in turn, {name}", f"{value:.2f}") for name, value in made.peaks.items()]
    return [*rows, (f"GB, all, of the {made.setting.gpu.memory:g} of one GPU", f"{made.needed:.2f}")]


def time_rows(made: Plan) -> list[tuple[str, str]]:
    setting, rows = made.setting, []
    for kind, times in made.step.items():
        drawn = "" if setting.recipe.startswith("stage1") else f", condition {setting.condition(kind):,}"
        passes = f"{setting.passes} x " if setting.passes > 1 else ""
        batch = f"{passes}{setting.count(kind)} x {setting.seen(kind):,} tokens{drawn}"
        rows.append((f"a step of {kind}s on each GPU", batch))
        rows += [(f"  seconds, {name}", f"{seconds:.3f}") for name, seconds in times.items()]
    rows.append(("TFLOP a GPU and clip step, attention counted", f"{made.flops['clip'] / 1e12:.1f}"))
    rows.append(("MFU that follows", f"{made.mfu:.2f}"))
    counts = ", ".join(f"{count:,.0f} of {kind}s" for kind, count in made.steps.items())
    rows.append(("steps" if setting.steps else "steps of one pass over Table 1", counts))
    return [*rows, ("days", f"{made.days:.2f}")]
