"""Named, frozen model architectures. This module reads no environment variables and no files.

`tiny` is trained by our own recipes, and its weights are shipped. The others are the full sizes of the paper and of the
authors' version 2, for published weights.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from omnivideo.errors import InvalidInput

Task = Literal["text-to-image", "text-to-video", "image-editing", "video-editing"]

WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
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
    """Visual context adapter: width of the patch embedding and its stride on the latent grid."""

    hidden_dim: int
    kernel_size: int = 4
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


class Preset(PresetModel):
    """The architecture of a model and its defaults.

    `decoder` and `vae` are the configurations of diffusers' `WanTransformer3DModel` and `AutoencoderKLWan`;
    version 1 has a vision head and an adapter, version 2 a normalised projection of the MLLM's hidden states.
    `max_batch_size` is the number of clips of a batch that are rendered in one pass, if that was measured to be faster.
    `prompts` is the folder of the planner's prompts. `mllm_can_plan` is False for an MLLM that is too small to write
    the plan of a turn; English rules then split it. `has_scorer` is True if the preset's world is the synthetic one,
    in which pixels can be checked against a request.
    """

    name: str
    version: Literal[1, 2]
    mllm_width: int
    vision_input: VisionInputConfig
    text_width: int
    max_text_tokens: int
    min_condition_tokens: int
    max_condition_tokens: int
    decoder: dict[str, Any]
    num_decoders: int = 1
    mllm_can_plan: bool = True
    has_scorer: bool = False
    prompts: Literal["instructions", "keywords"] = "instructions"
    max_batch_size: int = 1
    boundary_ratio: float | None = None
    absolute_positions: bool = False
    vae: dict[str, Any] = {}
    vision_head: QueryTransformerConfig | None = None
    adapter: QueryTransformerConfig | None = None
    visual_context: VisualContextConfig
    negative_prompt: str = WAN_NEGATIVE_PROMPT
    sampling: dict[Task, SamplingDefaults]


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

VERSION_1_SAMPLING: dict[Task, SamplingDefaults] = {
    "text-to-video": SamplingDefaults(width=832, height=480, frames=81, fps=16, steps=40, guidance_scale=3.0),
    "video-editing": SamplingDefaults(width=640, height=352, frames=17, fps=8, steps=40, guidance_scale=3.0),
    "text-to-image": SamplingDefaults(width=480, height=480, frames=1, fps=8, steps=50, guidance_scale=5.0),
    "image-editing": SamplingDefaults(width=480, height=480, frames=1, fps=8, steps=40, guidance_scale=3.0),
}
VERSION_2_SAMPLING: dict[Task, SamplingDefaults] = {
    "text-to-video": SamplingDefaults(width=832, height=480, frames=41, fps=8, steps=40, guidance_scale=3.0),
    "video-editing": SamplingDefaults(width=832, height=480, frames=41, fps=8, steps=40, guidance_scale=3.0),
    "text-to-image": SamplingDefaults(width=832, height=480, frames=1, fps=8, steps=40, guidance_scale=3.0),
    "image-editing": SamplingDefaults(width=832, height=480, frames=1, fps=8, steps=40, guidance_scale=3.0),
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
    mllm_can_plan=False,
    prompts="keywords",
    max_batch_size=4,  # 0.34 s per clip of 20 steps on one core, 0.54 s alone
    mllm_width=192,
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
    text_width=192,
    max_text_tokens=64,
    min_condition_tokens=72,  # about the length for an edit of a clip, so that all conditions are padded to one length
    max_condition_tokens=192,
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
    negative_prompt="blurry, distorted, washed out, flickering, low quality",
    sampling=TINY_SAMPLING,
)

OMNIVIDEO_1_3B = Preset(
    name="omnivideo-1.3b",
    version=1,
    mllm_width=4096,
    vision_input=QWEN3_VL_INPUT,
    text_width=4096,
    max_text_tokens=512,
    min_condition_tokens=2560,
    max_condition_tokens=2560,
    decoder=WAN_1_3B_CONFIG,
    vision_head=QueryTransformerConfig(input_dim=4096, width=1152, num_queries=4),
    adapter=QueryTransformerConfig(input_dim=1152, width=4096, num_queries=256),
    visual_context=VisualContextConfig(hidden_dim=1536),
    sampling=VERSION_1_SAMPLING,
)

OMNIVIDEO2_1_3B = Preset(
    name="omnivideo2-1.3b",
    version=2,
    mllm_width=2048,
    vision_input=QWEN3_VL_INPUT,
    text_width=4096,
    max_text_tokens=512,
    min_condition_tokens=512,
    max_condition_tokens=32768,
    decoder=WAN_1_3B_CONFIG,
    visual_context=VisualContextConfig(hidden_dim=1536),
    sampling=VERSION_2_SAMPLING,
)

OMNIVIDEO2_A14B = OMNIVIDEO2_1_3B.model_copy(
    update={
        "name": "omnivideo2-a14b",
        "decoder": WAN_14B_CONFIG,
        "num_decoders": 2,
        "boundary_ratio": 0.875,
        "visual_context": VisualContextConfig(hidden_dim=5120),
    }
)

PRESETS = {preset.name: preset for preset in (TINY, OMNIVIDEO_1_3B, OMNIVIDEO2_1_3B, OMNIVIDEO2_A14B)}


def get_preset(name: str) -> Preset:
    """Return the preset of this name; raises InvalidInput for an unknown one."""
    if name not in PRESETS:
        raise InvalidInput("preset", f"{name!r} is not one of {', '.join(PRESETS)}")
    return PRESETS[name]


def get_vision_input(patch_size: int, merge_size: int, temporal_patch_size: int) -> VisionInputConfig:
    """Return the vision input of the preset whose MLLM uses this patching; raises InvalidInput if no preset does."""
    patching = (patch_size, merge_size, temporal_patch_size)
    for preset in PRESETS.values():
        known = preset.vision_input
        if (known.patch_size, known.merge_size, known.temporal_patch_size) == patching:
            return known
    raise InvalidInput("preset", f"no preset has an MLLM with the patching {patching}")


# ---------------------------------------------------------------- counts of tokens

VAE_SPATIAL_STRIDE, VAE_TEMPORAL_STRIDE = 8, 4


def compute_latent_grid(width: int, height: int, frames: int) -> tuple[int, int, int]:
    """Return the latent frames, height and width of a clip; raises InvalidInput for sizes that cannot be patched."""
    for field, value in (("width", width), ("height", height)):
        if value < 16 or value % 16:
            raise InvalidInput(field, f"{value} is not a positive multiple of 16")
    if frames < 1 or frames % VAE_TEMPORAL_STRIDE != 1:
        raise InvalidInput("frames", f"{frames} is not of the form 4k + 1 (1, 5, 9, 13 ...)")
    return (frames - 1) // VAE_TEMPORAL_STRIDE + 1, height // VAE_SPATIAL_STRIDE, width // VAE_SPATIAL_STRIDE


def count_decoder_tokens(preset: Preset, grid: tuple[int, int, int]) -> int:
    """Return the number of the decoder's tokens for a latent grid."""
    t, y, x = map(int, preset.decoder["patch_size"])
    return (grid[0] // t) * (grid[1] // y) * (grid[2] // x)


def count_visual_context_tokens(preset: Preset, grid: tuple[int, int, int]) -> int:
    """Return the number of the visual context's tokens for a source's latent grid."""
    kernel = preset.visual_context.kernel_size
    return grid[0] * (grid[1] // kernel) * (grid[2] // kernel)


def check_model_limits(preset: Preset, width: int, height: int, frames: int, has_source: bool) -> None:
    """Raise InvalidInput if a clip has more positions, or an edit's source more tokens, than the model allows."""
    grid, max_positions = compute_latent_grid(width, height, frames), preset.decoder["rope_max_seq_len"]
    sizes = (("frames", frames), ("height", height), ("width", width))
    for axis, patch, (field, size) in zip(grid, preset.decoder["patch_size"], sizes, strict=True):
        if axis // patch > max_positions:
            raise InvalidInput(field, f"{size} is more than this model's positions allow")
    tokens = count_visual_context_tokens(preset, grid) if has_source else 0
    if tokens > preset.max_condition_tokens:
        text = f"an edit at this size and length has {tokens} tokens of source; allowed: {preset.max_condition_tokens}"
        raise InvalidInput("size", text)
