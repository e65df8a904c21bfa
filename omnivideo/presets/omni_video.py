"""The published models: version 1 of the paper, and the authors' version 2 with one decoder and with two."""

from typing import Any

from omnivideo.presets.fields import (
    ConditionConfig,
    ExpertsConfig,
    MLLMConfig,
    NullConfig,
    Preset,
    QueryTransformerConfig,
    SamplingDefaults,
    SourceConfig,
    Task,
    TextConfig,
    TrainedShapes,
    VisionInputConfig,
    VisualContextConfig,
)

WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
ENGLISH_NEGATIVE_PROMPT = (
    "blurry, overexposed, still picture, flicker, subtitles, watermark, grey and dull colours, low quality, "
    "compression artefacts, distorted faces, malformed hands, extra limbs, crowded background"
)


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
# The authors state no other sizes and lengths than those of their scripts.
VERSION_1_TRAINED: dict[Task, TrainedShapes] = {
    "text-to-video": TrainedShapes(sizes=((832, 480),), frames=(81,)),
    "video-editing": TrainedShapes(sizes=((640, 352),), frames=(17,)),
    "text-to-image": TrainedShapes(sizes=((480, 480),), frames=(1,)),
    "image-editing": TrainedShapes(sizes=((480, 480),), frames=(1,)),
}
VERSION_2_TRAINED: dict[Task, TrainedShapes] = {
    "text-to-video": TrainedShapes(sizes=((832, 480),), frames=(81,)),
    "video-editing": TrainedShapes(sizes=((832, 480),), frames=(41,)),
}

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
    trained=VERSION_1_TRAINED,
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
        optional_markers=True,
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
    trained=VERSION_2_TRAINED,
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
