"""Named, frozen model architectures. This module reads no environment variables and no files.

`tiny` is trained by our own recipes, and its weights are shipped. The others are the published models: version 1 of the
paper, and the authors' version 2 with one decoder and with two. Everything in which they differ is a field here.
"""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from omnivideo.errors import InvalidInput

Task = Literal["text-to-image", "text-to-video", "image-editing", "video-editing"]
ConditionPart = Literal["source", "visual", "hidden", "text"]
DtypeName = Literal["float32", "bfloat16", "float16"]
Precision = Literal["preset", "float32"]  # the types that the preset states, or float32 for every part

WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
ENGLISH_NEGATIVE_PROMPT = (
    "blurry, overexposed, still picture, flicker, subtitles, watermark, grey and dull colours, low quality, "
    "compression artefacts, distorted faces, malformed hands, extra limbs, crowded background"
)


class PresetModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SamplingDefaults(PresetModel):
    """Defaults of one task (paper section 5.1): size in px, clip length, UniPC steps, guidance scale."""

    width: int
    height: int
    frames: int
    fps: int
    steps: int
    guidance_scale: float
    flow_shift: float = 5.0


class QueryTransformerConfig(PresetModel):
    """Vision head or adapter: input width, hidden width, learned queries, layers (each side), attention heads."""

    input_dim: int
    width: int
    num_queries: int
    num_layers: int = 4
    num_heads: int = 8


class VisualContextConfig(PresetModel):
    """Visual context adapter: width of the patch embedding, stride on the latent grid, eps of its layer norms."""

    hidden_dim: int
    kernel_size: int = 4
    eps: float = 1e-5
    absolute_positions: bool = False


class VisionInputConfig(PresetModel):
    """The MLLM's visual input: how it patches pixels, and how much of an image or a clip it sees."""

    patch_size: int  # px
    merge_size: int  # patches along each side of one token
    temporal_patch_size: int  # frames in one patch
    min_pixels: int  # px of one frame, or of the whole clip if the budget is "clip"
    max_pixels: int
    fps: float  # frames sampled from a second of video
    min_frames: int
    max_frames: int
    budget: Literal["frame", "clip"] = "frame"


class MLLMConfig(PresetModel):
    """The multimodal language model, and what the decoder gets from it.

    `vision_input` is for questions and routing; `caption_input` and `feature_input` are for the calls that describe a
    clip and that compute the decoder's features, and default to it. The features are the hidden states of the last
    layer at the kept positions: all, or those after the opening of the user's turn. `routing` says how a route is
    read: from the first token, or by comparing the likelihoods of a fixed choice. `can_plan` is False for a model that
    is too small to write the plan of a turn; English rules then split it.
    """

    family: Literal["qwen3-vl", "vila"] = "qwen3-vl"
    vision_input: VisionInputConfig
    caption_input: VisionInputConfig | None = None
    feature_input: VisionInputConfig | None = None
    hidden_states: Literal["after-norm", "before-norm"] = "after-norm"
    kept_positions: Literal["all", "after-user-start"] = "all"
    routing: Literal["tokens", "likelihoods"] = "tokens"
    can_plan: bool = True


class ConditionConfig(PresetModel):
    """The decoder's condition: the order of its parts, the markers around them, and its length after padding.

    `markers` has the name of a part's two markers; a part without one stands alone. `overflow` is the part, the last
    one, whose end is lost if the condition is longer than `max_tokens`; "refuse" cuts nothing. `text_parts`
    are the texts that are encoded one after the other; an instruction is used only if there is a source.
    """

    parts: tuple[ConditionPart, ...] = ("source", "visual", "text")
    markers: dict[ConditionPart, str] = {"source": "img", "visual": "ipl", "text": "prp"}
    min_tokens: int
    max_tokens: int
    overflow: Literal["refuse"] | ConditionPart = "refuse"
    text_parts: tuple[Literal["prompt", "caption", "instruction"], ...] = ("prompt",)

    @property
    def marker_names(self) -> tuple[str, ...]:
        return tuple(f"{name}_{end}" for name in self.markers.values() for end in ("st", "ed"))

    @model_validator(mode="after")
    def check_parts(self) -> Self:
        if self.overflow not in ("refuse", self.parts[-1]):
            raise ValueError(f"overflow: only the last part, {self.parts[-1]!r}, can be cut")
        if not self.markers.keys() <= set(self.parts):
            raise ValueError(f"markers: allowed for {', '.join(self.parts)}")
        return self


class NullConfig(PresetModel):
    """What the null branch of guidance has in place of the condition; the source stays in it.

    "negative-prompt": a text alone. "context-file": hidden states and a text embedding that come with the weights, and
    no negative prompt. "negative-prompt-and-small-states": a text and a few rows of a small value as hidden states.
    """

    kind: Literal["negative-prompt", "context-file", "negative-prompt-and-small-states"] = "negative-prompt"
    negative_prompt: str = ""
    small_state_rows: int = 2
    small_state_value: float = 1e-6


class TextConfig(PresetModel):
    """The decoder's text encoder: is a text cleaned first, and what happens to one of more than `max_tokens`."""

    clean: bool = False
    max_tokens: int = 512
    overflow: Literal["refuse", "cut"] = "refuse"


class SourceConfig(PresetModel):
    """How a source becomes pixels.

    `frames`: those nearest to the clip's times, or every `stride`-th after `skip` frames; the stride shrinks until the
    source is long enough, and one that is too short is refused. `crop`: the largest centred box of the clip's aspect,
    with exact sides and a Lanczos filter, or with whole sides and a bilinear one.
    """

    frames: Literal["nearest", "stride"] = "nearest"
    skip: int = 0
    stride: int = 1
    crop: Literal["exact", "whole"] = "exact"


class ExpertsConfig(PresetModel):
    """The decoders: with two, the first denoises at timesteps of at least `boundary` (of 1000), the second below."""

    num_decoders: Literal[1, 2] = 1
    boundary: int = 0


class HubRepository(PresetModel):
    """A repository of the Hugging Face hub that holds some of a preset's parts.

    `holds` are subfolders of a complete folder of ours, `files` patterns of the files that are needed. Without a
    `revision`, the first download pins the commit that it finds. `size_bytes` is what these files take, roughly.
    """

    id: str
    revision: str | None = None
    holds: tuple[str, ...]
    files: tuple[str, ...]
    size_bytes: int
    licence: str


class Preset(PresetModel):
    """The architecture of a model and its defaults.

    `version` names the published layout. `decoder` and `vae` are the configurations of diffusers'
    `WanTransformer3DModel` and `AutoencoderKLWan`. A vision head and an adapter make the condition's "visual" part, a
    normalised projection of the MLLM's hidden states its "hidden" part. The keys of `sampling` are the tasks that the
    weights can do. The authors' version 1 counts guidance from the condition; its scale plus `guidance_offset` is the
    usual scale, which every setting here means. Parts that `dtypes` does not name are float32; `autocast` is the type
    that the decoder and the visual context adapter compute in. `byte_rounding` turns decoded pixels into bytes.
    `max_batch_size` is the number of clips of a batch that are rendered in one pass, if that was measured to be faster.
    `prompts` is the folder of the planner's prompts. `has_scorer` is True if the preset's world is the synthetic one,
    in which pixels can be checked against a request.
    """

    name: str
    version: Literal[1, 2]
    mllm_width: int
    mllm: MLLMConfig
    text_width: int
    text: TextConfig = TextConfig()
    condition: ConditionConfig
    null: NullConfig
    guidance_offset: float = 0.0
    source: SourceConfig = SourceConfig()
    decoder: dict[str, Any]
    experts: ExpertsConfig = ExpertsConfig()
    has_scorer: bool = False
    prompts: Literal["instructions", "keywords"] = "instructions"
    max_batch_size: int = 1
    absolute_positions: bool = False
    vae: dict[str, Any] = {}
    vision_head: QueryTransformerConfig | None = None
    adapter: QueryTransformerConfig | None = None
    visual_context: VisualContextConfig
    sampling: dict[Task, SamplingDefaults]
    dtypes: dict[str, DtypeName] = {}
    autocast: DtypeName | None = None
    byte_rounding: Literal["nearest", "truncate"] = "nearest"
    licence: str = ""

    def in_float32(self) -> "Preset":
        """Return the same model with every part in float32, as the golden tests compare it."""
        return self.model_copy(update={"dtypes": {}, "autocast": None})


def build_wan_config(num_heads: int, num_layers: int, ffn_dim: int) -> dict[str, Any]:
    """Return the configuration of a Wan 2.x text-to-video decoder; they differ only in width and depth."""
    return {
        "patch_size": (1, 2, 2),
        "num_attention_heads": num_heads,
        "attention_head_dim": 128,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": ffn_dim,
        "num_layers": num_layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "rope_max_seq_len": 1024,
    }


WAN_1_3B_CONFIG, WAN_14B_CONFIG = build_wan_config(12, 30, 8960), build_wan_config(40, 40, 13824)

# The defaults of transformers' Qwen3VLVideoProcessor, for images too: 128 to 768 tokens of 32 x 32 px per frame.
QWEN3_VL_INPUT = VisionInputConfig(
    patch_size=16, merge_size=2, temporal_patch_size=2, min_pixels=128 * 32 * 32, max_pixels=768 * 32 * 32,
    fps=2.0, min_frames=4, max_frames=768,
)  # fmt: skip
# What the authors' version 2 shows to Qwen3-VL: six frames, for captions at up to 640 x 240 px each and for features at
# one token for each pair.
QWEN3_VL_CAPTION_INPUT = QWEN3_VL_INPUT.model_copy(
    update={"min_pixels": 230_400, "max_pixels": 921_600, "min_frames": 6, "max_frames": 6, "budget": "clip"}
)
QWEN3_VL_FEATURE_INPUT = QWEN3_VL_CAPTION_INPUT.model_copy(update={"min_pixels": 480, "max_pixels": 1920})
# SigLIP so400m at 384 px: 27 x 27 patches, padded to 28 x 28 and joined to 196 tokens per frame.
VILA_INPUT = VisionInputConfig(
    patch_size=14, merge_size=2, temporal_patch_size=1, min_pixels=384 * 384, max_pixels=384 * 384,
    fps=1.0, min_frames=8, max_frames=8,
)  # fmt: skip

# The defaults of the authors' scripts; the guidance scales of version 1 are theirs plus its offset of 1.
VERSION_1_SAMPLING: dict[Task, SamplingDefaults] = {
    "text-to-video": SamplingDefaults(width=832, height=480, frames=81, fps=16, steps=50, guidance_scale=6.0),
    "video-editing": SamplingDefaults(width=640, height=352, frames=17, fps=8, steps=40, guidance_scale=4.0),
    "text-to-image": SamplingDefaults(width=480, height=480, frames=1, fps=8, steps=50, guidance_scale=6.0),
    "image-editing": SamplingDefaults(width=480, height=480, frames=1, fps=8, steps=40, guidance_scale=4.0),
}
VERSION_2_SAMPLING: dict[Task, SamplingDefaults] = {
    "text-to-video": SamplingDefaults(width=832, height=480, frames=81, fps=16, steps=50, guidance_scale=3.0),
    "video-editing": SamplingDefaults(width=832, height=480, frames=41, fps=8, steps=40, guidance_scale=3.0),
}
TINY_SAMPLING: dict[Task, SamplingDefaults] = {
    "text-to-video": SamplingDefaults(width=64, height=64, frames=9, fps=8, steps=40, guidance_scale=3.0),
    "video-editing": SamplingDefaults(width=64, height=64, frames=9, fps=8, steps=40, guidance_scale=3.0),
    "text-to-image": SamplingDefaults(width=64, height=64, frames=1, fps=8, steps=50, guidance_scale=5.0),
    "image-editing": SamplingDefaults(width=64, height=64, frames=1, fps=8, steps=40, guidance_scale=3.0),
}

TINY = Preset(
    name="tiny",
    version=1,
    has_scorer=True,
    prompts="keywords",
    max_batch_size=4,  # 0.34 s per clip of 20 steps on one core, 0.54 s alone
    mllm_width=192,
    mllm=MLLMConfig(
        can_plan=False,
        vision_input=VisionInputConfig(
            patch_size=8,
            merge_size=2,
            temporal_patch_size=2,
            min_pixels=64 * 64,
            max_pixels=64 * 64,
            fps=4.0,
            min_frames=4,
            max_frames=768,
        ),
    ),
    text_width=192,
    text=TextConfig(max_tokens=64),
    # 72 is about the length for an edit of a clip, so that all conditions are padded to one length.
    condition=ConditionConfig(min_tokens=72, max_tokens=192),
    null=NullConfig(negative_prompt="blurry, distorted, washed out, flickering, low quality"),
    decoder={
        "patch_size": (1, 2, 2),
        "num_attention_heads": 6,
        "attention_head_dim": 32,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 192,
        "freq_dim": 64,
        "ffn_dim": 576,
        "num_layers": 8,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "rope_max_seq_len": 64,
    },
    absolute_positions=True,
    vae={
        "base_dim": 16,
        "dim_mult": [1, 2, 4],
        "num_res_blocks": 1,
        "attn_scales": [],
        "z_dim": 16,
        "temperal_downsample": [True, True],
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "latents_mean": [0.0] * 16,
        "latents_std": [1.0] * 16,
    },
    vision_head=QueryTransformerConfig(input_dim=192, width=128, num_queries=4, num_layers=2, num_heads=4),
    adapter=QueryTransformerConfig(input_dim=128, width=192, num_queries=8, num_layers=1, num_heads=6),
    visual_context=VisualContextConfig(hidden_dim=192, kernel_size=2, absolute_positions=True),
    sampling=TINY_SAMPLING,
)

OMNIVIDEO_1_3B = Preset(
    name="omnivideo-1.3b",
    version=1,
    mllm_width=4096,
    mllm=MLLMConfig(
        family="vila",
        vision_input=VILA_INPUT,
        feature_input=VILA_INPUT.model_copy(update={"min_frames": 1, "max_frames": 1}),
    ),
    text_width=4096,
    text=TextConfig(clean=True, overflow="cut"),
    condition=ConditionConfig(min_tokens=2560, max_tokens=2560, overflow="text"),
    null=NullConfig(kind="context-file"),
    guidance_offset=1.0,
    source=SourceConfig(frames="stride", skip=1, stride=2, crop="whole"),
    decoder=WAN_1_3B_CONFIG,
    vision_head=QueryTransformerConfig(input_dim=4096, width=1152, num_queries=4),
    adapter=QueryTransformerConfig(input_dim=1152, width=4096, num_queries=256),
    visual_context=VisualContextConfig(hidden_dim=1536, eps=1e-6),
    sampling=VERSION_1_SAMPLING,
    dtypes={"mllm": "float16", "vision_head": "bfloat16", "adapter": "bfloat16", "text_encoder": "bfloat16"},
    autocast="bfloat16",
    byte_rounding="truncate",
    licence="Apache-2.0 (Wan 2.1, UMT5); Meta Llama 3 Community License and CC-BY-NC-4.0 (VILA)",
)

OMNIVIDEO2_A14B = Preset(
    name="omnivideo2-a14b",
    version=2,
    mllm_width=2048,
    mllm=MLLMConfig(
        vision_input=QWEN3_VL_INPUT,
        caption_input=QWEN3_VL_CAPTION_INPUT,
        feature_input=QWEN3_VL_FEATURE_INPUT,
        hidden_states="before-norm",
        kept_positions="after-user-start",
        routing="likelihoods",
    ),
    text_width=4096,
    text=TextConfig(clean=True, overflow="cut"),
    condition=ConditionConfig(
        parts=("hidden", "text", "source"),
        markers={"source": "img", "text": "prp"},
        min_tokens=6144,
        max_tokens=6144,
        overflow="source",
        text_parts=("caption", "instruction"),
    ),
    null=NullConfig(kind="negative-prompt-and-small-states", negative_prompt=ENGLISH_NEGATIVE_PROMPT),
    source=SourceConfig(frames="stride", stride=3, crop="whole"),
    decoder=WAN_14B_CONFIG,
    experts=ExpertsConfig(num_decoders=2, boundary=875),
    visual_context=VisualContextConfig(hidden_dim=5120, eps=1e-6),
    sampling=VERSION_2_SAMPLING,
    dtypes={
        "mllm": "bfloat16",
        "hidden_projection": "bfloat16",
        "visual_context": "bfloat16",
        "markers": "bfloat16",
        "decoder": "bfloat16",
        "text_encoder": "bfloat16",
        "latents": "bfloat16",
    },
    byte_rounding="truncate",
    licence="Apache-2.0 (Wan, UMT5, Qwen3-VL)",
)

OMNIVIDEO2_1_3B = OMNIVIDEO2_A14B.model_copy(
    update={
        "name": "omnivideo2-1.3b",
        "condition": OMNIVIDEO2_A14B.condition.model_copy(update={"min_tokens": 6272, "max_tokens": 6272}),
        "decoder": WAN_1_3B_CONFIG,
        "experts": ExpertsConfig(),
        "visual_context": VisualContextConfig(hidden_dim=1536, eps=1e-6),
    }
)

PRESETS = {preset.name: preset for preset in (TINY, OMNIVIDEO_1_3B, OMNIVIDEO2_1_3B, OMNIVIDEO2_A14B)}


def get_preset(name: str) -> Preset:
    """Return the preset of this name; raises InvalidInput for an unknown one."""
    if name not in PRESETS:
        raise InvalidInput("preset", f"{name!r} is not one of {', '.join(PRESETS)}")
    return PRESETS[name]


def get_sampling_defaults(preset: Preset, task: Task) -> SamplingDefaults:
    """Return the defaults of a task; raises InvalidInput if the preset's weights cannot do it."""
    if task not in preset.sampling:
        raise InvalidInput("task", f"{preset.name} cannot do {task}; its tasks are {', '.join(preset.sampling)}")
    return preset.sampling[task]


def get_vision_input(patch_size: int, merge_size: int, temporal_patch_size: int) -> VisionInputConfig:
    """Return the vision input of the preset whose MLLM uses this patching; raises InvalidInput if no preset does."""
    patching = (patch_size, merge_size, temporal_patch_size)
    for preset in PRESETS.values():
        known = preset.mllm.vision_input
        if (known.patch_size, known.merge_size, known.temporal_patch_size) == patching:
            return known
    raise InvalidInput("preset", f"no preset has an MLLM with the patching {patching}")
