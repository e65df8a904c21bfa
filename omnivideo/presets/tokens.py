"""The latent grid of a clip and the tokens that a preset's models make of it, and the limits that follow."""

from omnivideo.errors import InvalidInput
from omnivideo.presets.fields import Preset

VAE_SPATIAL_STRIDE, VAE_TEMPORAL_STRIDE = 8, 4
MIN_TEXT_TOKENS = 64  # of the prompt and the markers that an edit keeps, if its condition cuts the text


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


def count_visual_tokens(preset: Preset, frames: int) -> int:
    """Return the number of the adapter's tokens for a clip, or for an image, which has one visual token."""
    if preset.adapter is None or preset.vision_head is None:
        return 0
    return preset.adapter.num_queries * (preset.vision_head.num_queries if frames > 1 else 1)


def check_model_limits(preset: Preset, width: int, height: int, frames: int, has_source: bool) -> None:
    """Raise InvalidInput if a clip has more positions, or an edit's source more tokens, than the model allows."""
    grid, max_positions = compute_latent_grid(width, height, frames), preset.decoder["rope_max_seq_len"]
    sizes = (("frames", frames), ("height", height), ("width", width))
    for axis, patch, (field, size) in zip(grid, preset.decoder["patch_size"], sizes, strict=True):
        if axis // patch > max_positions:
            raise InvalidInput(field, f"{size} is more than this model's positions allow")
    tokens = count_visual_context_tokens(preset, grid) if has_source else 0
    max_tokens = preset.condition.max_tokens
    if preset.condition.overflow == "text":  # the prompt is what would be lost
        max_tokens -= count_visual_tokens(preset, frames) + MIN_TEXT_TOKENS
    if tokens > max_tokens:
        text = f"an edit at this size and length has {tokens} tokens of source; allowed: {max_tokens}"
        raise InvalidInput("size", text)
