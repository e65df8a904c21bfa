"""Build the authors' tiny checkpoints as models of ours: the published presets with the sizes of the golden files."""

import copy
import re
from functools import cache
from typing import Any

from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from torch import Tensor
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from omnivideo.models.conditions import MarkerEmbeddings
from omnivideo.models.omni import Bridge, OmniVideoModel, build_decoder, get_expert_part
from omnivideo.models.weights.published import locate_tensors
from omnivideo.presets import OMNIVIDEO2_1_3B, OMNIVIDEO2_A14B, OMNIVIDEO_1_3B, Preset
from tests.support.golden import golden_folder, load_golden

CHECKPOINTS = {
    "v1": ("v1_checkpoint",),
    "single": ("v2_checkpoint_single",),
    "experts": ("v2_checkpoint_high", "v2_checkpoint_low"),
}
PRESETS = {"v1": OMNIVIDEO_1_3B, "single": OMNIVIDEO2_1_3B, "experts": OMNIVIDEO2_A14B}
TEXT_ENCODER_KEYS = (
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.", "encoder.block."),
    (r"\.pos_embedding\.embedding\.", ".layer.0.SelfAttention.relative_attention_bias."),
    (r"\.attn\.", ".layer.0.SelfAttention."),
    (r"\.norm1\.", ".layer.0.layer_norm."),
    (r"\.norm2\.", ".layer.1.layer_norm."),
    (r"\.ffn\.gate\.0\.", ".layer.1.DenseReluDense.wi_0."),
    (r"\.ffn\.fc1\.", ".layer.1.DenseReluDense.wi_1."),
    (r"\.ffn\.fc2\.", ".layer.1.DenseReluDense.wo."),
)


def select_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with the prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def read_vae_config(about: dict[str, Any]) -> dict[str, Any]:
    """Return diffusers' configuration of the golden VAE."""
    config = {key: value for key, value in about["config"].items() if key != "dim"}
    return config | {"base_dim": about["config"]["dim"]}


def build_golden_preset(kind: str) -> Preset:
    """Return the published preset of a kind in float32, with the sizes of its golden checkpoint."""
    published, dims = PRESETS[kind], load_golden(CHECKPOINTS[kind][0])[1]["dims"]
    width, length = dims["text_width"], dims["max_context_len"]
    decoder = {
        "num_attention_heads": dims["heads"],
        "attention_head_dim": dims["head_dim"],
        "text_dim": width,
        "freq_dim": dims["freq_dim"],
        "ffn_dim": dims["ffn_dim"],
        "num_layers": dims["num_layers"],
    }
    update: dict[str, Any] = {
        "mllm_width": dims["mllm_width"],
        "text_width": width,
        "decoder": published.decoder | decoder,
        "vae": read_vae_config(load_golden("wan21_vae")[1]),
        "text": published.text.model_copy(update={"max_tokens": load_golden("umt5")[1]["text_len"]}),
        "condition": published.condition.model_copy(update={"min_tokens": length, "max_tokens": length}),
        "visual_context": published.visual_context.model_copy(
            update={"hidden_dim": dims["heads"] * dims["head_dim"], "kernel_size": dims["visual_context_patch"][1]}
        ),
    }
    if published.vision_head and published.adapter:
        heads, layers = dims["attention_heads_of_head_and_adapter"], dims["layers_of_head_and_adapter"][0]
        common = {"num_heads": heads, "num_layers": layers}
        head = {"input_dim": dims["mllm_width"], "width": dims["vision_width"], "num_queries": dims["head_queries"]}
        adapter = {"input_dim": dims["vision_width"], "width": width, "num_queries": dims["adapter_queries"]}
        update["vision_head"] = published.vision_head.model_copy(update=common | head)
        update["adapter"] = published.adapter.model_copy(update=common | adapter)
    return published.in_float32().model_copy(update=update)


def load_text_encoder() -> UMT5EncoderModel:
    """Return the golden UMT5."""
    tensors, about = load_golden("umt5")
    config = about["config"]
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=config["vocab"],
            d_model=config["dim"],
            d_kv=config["dim_attn"] // config["num_heads"],
            d_ff=config["dim_ffn"],
            num_layers=config["layers"],
            num_heads=config["num_heads"],
            relative_attention_num_buckets=config["num_buckets"],
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
        )
    )
    state = {}
    for key, value in select_prefix(tensors, "state.").items():
        for pattern, name in TEXT_ENCODER_KEYS:
            key = re.sub(pattern, name, key)
        state[key] = value
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    encoder.load_state_dict(state)
    return encoder


def load_vae() -> AutoencoderKLWan:
    """Return the golden VAE."""
    tensors, about = load_golden("wan21_vae")
    vae = AutoencoderKLWan(**read_vae_config(about))
    vae.load_state_dict(convert_wan_vae_to_diffusers(select_prefix(tensors, "state.")))
    return vae


@cache
def load_golden_model(kind: str) -> OmniVideoModel:
    """Return the model of a kind, "v1", "single" or "experts", without an MLLM. Tests must not change it."""
    preset = build_golden_preset(kind)
    bridge, decoders = Bridge(preset), [build_decoder(preset) for _ in CHECKPOINTS[kind]]
    for index, checkpoint in enumerate(CHECKPOINTS[kind]):
        tensors, _ = load_golden(checkpoint)
        locations = locate_tensors(preset)
        assert tensors.keys() == locations.keys()
        for part in {location.part for location in locations.values()}:
            state = {where.key: tensors[key] for key, where in locations.items() if where.part == part}
            name = get_expert_part(part, index) if part in ("hidden_projection", "visual_context") else part
            module = decoders[index] if part == "transformer" else bridge.get_submodule(name)
            module.load_state_dict(state)
    side, _ = load_golden("v1_side_files" if kind == "v1" else "v2_side_files")
    markers = {key.strip("<>"): value for key, value in select_prefix(side, "special_tokens/").items()}
    lengths = {name: len(value) for name, value in markers.items()}
    bridge.markers = MarkerEmbeddings(preset.text_width, preset.condition.marker_names, lengths)
    bridge.markers.load_state_dict(markers)
    if preset.null.kind == "context-file":
        bridge.null_context.hidden_states = side["context/vlm_last_hidden_states"]
        bridge.null_context.text = side["context/text_emb.0"]
    return OmniVideoModel(
        preset=preset,
        mllm=None,
        mllm_tokenizer=None,
        bridge=bridge,
        decoder=decoders[0],
        second_decoder=decoders[1] if len(decoders) == 2 else None,
        text_encoder=load_text_encoder(),
        tokenizer=AutoTokenizer.from_pretrained(golden_folder() / "t5_tokenizer", local_files_only=True),
        vae=load_vae(),
    ).eval()


def build_typed_model(kind: str) -> OmniVideoModel:
    """Return a copy of a golden model whose parts have the types of the published preset."""
    omni = copy.deepcopy(load_golden_model(kind))
    types = {"dtypes": PRESETS[kind].dtypes, "autocast": PRESETS[kind].autocast}
    omni.preset = omni.preset.model_copy(update=types)
    return omni.cast_parts()


def measure_error(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest absolute difference; the shapes must be equal."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float((ours.double() - theirs.double()).abs().max())
