"""The `tiny` preset: trained by our own recipes on the synthetic world; its weights are shipped."""

from omnivideo.presets.fields import (
    ConditionConfig,
    MLLMConfig,
    NullConfig,
    Preset,
    QueryTransformerConfig,
    SamplingDefaults,
    Task,
    TextConfig,
    TrainedShapes,
    VisionInputConfig,
    VisualContextConfig,
)

# UniPC needs no more steps here: with 40 and 50, every category has the same score (docs/tiny.md).
TINY_SAMPLING: dict[Task, SamplingDefaults] = {
    "text-to-video": SamplingDefaults(width=64, height=64, frames=9, fps=8, steps=20, guidance_scale=3.0),
    "video-editing": SamplingDefaults(width=64, height=64, frames=9, fps=8, steps=20, guidance_scale=3.0),
    "text-to-image": SamplingDefaults(width=64, height=64, frames=1, fps=8, steps=20, guidance_scale=5.0),
    "image-editing": SamplingDefaults(width=64, height=64, frames=1, fps=8, steps=20, guidance_scale=3.0),
}

TINY_TRAINED: dict[Task, TrainedShapes] = {
    task: TrainedShapes(sizes=((64, 64),), frames=(defaults.frames,), flow_shift=(0.2, 100.0))
    for task, defaults in TINY_SAMPLING.items()
}

TINY = Preset(
    name="tiny",
    version=1,
    has_scorer=True,
    edits=("recolour", "reshape", "add", "remove", "background", "motion"),
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
            fit="square",
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
    trained=TINY_TRAINED,
)
