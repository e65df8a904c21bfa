"""Where the published weights are: repositories of the Hugging Face hub, as data.

Nothing here could be looked up on the hub itself. The names come from the authors' READMEs and model cards as quoted in
public repositories, the two pinned commits from several independent public repositories. The authors' commits are not
known, so the first download pins them. Sizes are computed from the numbers of parameters at the precision of the
released code, or are those that public listings give for Wan's files. docs/weights.md says so, too.
"""

from omnivideo.presets import HubRepository, Preset

WAN_REPOSITORY = HubRepository(
    id="Wan-AI/Wan2.1-T2V-1.3B",
    revision="37ec512624d61f7aa208f7ea8140a131f93afc9a",
    holds=("text_encoder", "tokenizer", "vae"),
    files=("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/*"),
    size_bytes=11_900_000_000,
    licence="Apache-2.0",
)
QWEN3_VL_REPOSITORY = HubRepository(
    id="Qwen/Qwen3-VL-30B-A3B-Instruct",
    revision="9c4b90e1e4ba969fd3b5378b57d966d725f1b86c",
    holds=("mllm",),
    files=("*.safetensors", "*.json"),
    optional_files=("*.jinja", "*.txt"),  # a chat template and merges, which JSON files may contain too
    size_bytes=62_200_000_000,
    licence="Apache-2.0",
)
VERSION_1_REPOSITORY = HubRepository(
    id="howellyoung1/OmniVideo11B",
    holds=("mllm", "vision_head", "adapter", "visual_context", "null_context", "markers", "transformer"),
    files=(
        "*transformer/model.pt", "*special_tokens/tokens.pkl", "*unconditioned_context/context.pkl",
        "*ar_model/checkpoint/*",
    ),
    size_bytes=31_000_000_000,
    licence="not stated; VILA's weights are for non-commercial use, its language model is under the Llama 3 licence",
)  # fmt: skip
VERSION_2_REPOSITORY = HubRepository(
    id="Fudan-FUXI/OmniVideo2-1.3B",
    holds=("hidden_projection", "visual_context", "markers", "transformer"),
    files=("*transformer/pytorch_model.pt", "*special_tokens.pkl"),
    size_bytes=2_900_000_000,
    licence="Apache-2.0 by the model card, as others quote it; the code's README names a LICENSE that is not there",
)
VERSION_2_A14B_REPOSITORY = HubRepository(
    id="Fudan-FUXI/OmniVideo2-A14B",
    holds=(*VERSION_2_REPOSITORY.holds, "hidden_projection_2", "visual_context_2", "transformer_2"),
    files=("*high_noise_model/model.pt", "*low_noise_model/model.pt", "*special_tokens.pkl"),
    size_bytes=57_300_000_000,
    licence="not stated",
)
REPOSITORIES: dict[str, tuple[HubRepository, ...]] = {
    "omnivideo-1.3b": (VERSION_1_REPOSITORY, WAN_REPOSITORY),
    "omnivideo2-1.3b": (VERSION_2_REPOSITORY, QWEN3_VL_REPOSITORY, WAN_REPOSITORY),
    "omnivideo2-a14b": (VERSION_2_A14B_REPOSITORY, QWEN3_VL_REPOSITORY, WAN_REPOSITORY),
}


def find_repository(preset: Preset, part: str) -> HubRepository | None:
    """Return the repository that holds a part of a preset, or None."""
    repositories = REPOSITORIES.get(preset.name, ())
    return next((repository for repository in repositories if part in repository.holds), None)
