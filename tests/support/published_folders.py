"""Published folders, written from the golden tensors in exactly their layouts, and presets of the golden sizes."""

import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnivideo.models.weights.published import locate_tensors
from omnivideo.presets import PRESETS, Preset, QueryTransformerConfig, VisualContextConfig
from tests.support.golden import golden_folder, load_golden

CHECKPOINTS = {
    "omnivideo-1.3b": {"transformer/model.pt": "v1_checkpoint"},
    "omnivideo2-1.3b": {"transformer/pytorch_model.pt": "v2_checkpoint_single"},
    "omnivideo2-a14b": {
        "high_noise_model/model.pt": "v2_checkpoint_high",
        "low_noise_model/model.pt": "v2_checkpoint_low",
    },
}


def narrow_to_golden(preset: Preset, **update: Any) -> Preset:
    """Return the preset with the sizes of the golden checkpoint of its layout."""
    tensors, about = load_golden(next(iter(CHECKPOINTS[preset.name].values())))
    dims = about["dims"]
    sizes = {"num_attention_heads": dims["heads"], "attention_head_dim": dims["head_dim"]}
    sizes |= {"text_dim": dims["text_width"], "freq_dim": dims["freq_dim"], "ffn_dim": dims["ffn_dim"]}
    update = {"mllm_width": dims["mllm_width"], "text_width": dims["text_width"]} | update
    update["decoder"] = preset.decoder | sizes | {"num_layers": dims["num_layers"]}
    hidden_dim = len(tensors["visual_context_adapter.patch_embedding.bias"])
    update["visual_context"] = preset.visual_context.model_copy(update={"hidden_dim": hidden_dim})
    assert isinstance(preset.visual_context, VisualContextConfig)
    update["vae"] = read_vae_config()
    if preset.version == 1:
        shape = {"num_layers": dims["layers_of_head_and_adapter"][0]}
        shape |= {"num_heads": dims["attention_heads_of_head_and_adapter"]}
        update["vision_head"] = QueryTransformerConfig(
            input_dim=dims["mllm_width"], width=dims["vision_width"], num_queries=dims["head_queries"], **shape
        )
        update["adapter"] = QueryTransformerConfig(
            input_dim=dims["vision_width"], width=dims["text_width"], num_queries=dims["adapter_queries"], **shape
        )
    return preset.model_copy(update=update)


def read_vae_config() -> dict[str, Any]:
    """Return the golden VAE's configuration in diffusers' words."""
    tensors, about = load_golden("wan21_vae")
    config = dict(about["config"])
    config["base_dim"] = config.pop("dim")
    return config | {"latents_mean": tensors["mean"].tolist(), "latents_std": tensors["std"].tolist()}


def read_states(name: str, prefix: str) -> dict[str, Tensor]:
    tensors, _ = load_golden(name)
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def publish_golden(folder: Path, name: str, level: str | None = None) -> Path:
    """Write a preset's published folder from the golden data, without an MLLM for version 2."""
    for file, golden in CHECKPOINTS[name].items():
        write_checkpoint(folder / file, load_golden(golden)[0], level)
    side = "v1_side_files" if name == "omnivideo-1.3b" else "v2_side_files"
    markers = read_states(side, "special_tokens/")
    if name == "omnivideo-1.3b":
        write_pickle(folder / "special_tokens" / "tokens.pkl", markers)
        context = read_states(side, "context/")
        lists = {key: [context[f"{key}.0"]] for key in ("text_emb", "text_emb_siglip2")}
        lists["vlm_last_hidden_states"] = context["vlm_last_hidden_states"]
        write_pickle(folder / "unconditioned_context" / "context.pkl", lists)
        shutil.copytree(golden_folder() / "vila_ar_model", folder / "ar_model" / "checkpoint")
        publish_wan(folder / "wan" / "wanxiang1_3b")
    else:
        write_pickle(folder / "special_tokens.pkl", markers)
        publish_wan(folder)
    return folder


def publish_random(folder: Path, preset: Preset) -> Path:
    """Write a version 2 folder with random weights of the preset's sizes."""
    generator = torch.Generator().manual_seed(0)
    for file in CHECKPOINTS[preset.name]:
        state = {key: torch.randn(location.shape, generator=generator)
                 for key, location in locate_tensors(preset).items()}  # fmt: skip
        write_checkpoint(folder / file, state)
    write_pickle(folder / "special_tokens.pkl", read_states("v2_side_files", "special_tokens/"))
    publish_wan(folder)
    return folder


def publish_wan(folder: Path) -> None:
    """Write Wan's VAE, text encoder and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(read_states("wan21_vae", "state."), folder / "Wan2.1_VAE.pth")
    torch.save(read_states("umt5", "state."), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    shutil.copytree(golden_folder() / "t5_tokenizer", folder / "google" / "umt5-xxl")


def write_checkpoint(path: Path, state: Mapping[str, Tensor], level: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({level: dict(state), "global_steps": 7} if level else dict(state), path)


def write_pickle(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(dict(content)))


def use_golden_sizes(monkeypatch: Any, name: str, **update: Any) -> Preset:
    """Register a preset with the golden sizes under its own name."""
    preset = narrow_to_golden(PRESETS[name], **update)
    monkeypatch.setitem(PRESETS, name, preset)
    return preset
