"""The multimodal language model: Qwen3-VL with a text head that also routes (paper section 3.2).

The first token of an answer decides: `<BOI>` asks for an image, `<BOV>` for a video, anything else begins a text.
For generation the last hidden states of the whole sequence, the routing token included, go to the vision head.
Shapes: B batch, N tokens, M width of the model, F H W frames and pixels, P patches.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen3VLForConditionalGeneration

from omnivideo.contracts import Route

BOI, EOI, BOV, EOV = "<BOI>", "<EOI>", "<BOV>", "<EOV>"
VISUAL_TOKENS = (BOI, EOI, BOV, EOV)
# transformers 5.24 calls it "cache"; before (5.19 goes with vLLM 0.32) it was "past_key_values".
CACHE_ARGUMENT = (
    "cache" if "cache" in signature(Qwen3VLForConditionalGeneration.forward).parameters else "past_key_values"
)
VISUAL_TOKEN_PAIRS = {"image": (BOI, EOI), "video": (BOV, EOV)}


@dataclass(frozen=True)
class VisionInputConfig:
    """How frames become patches; the defaults are the tiny preset's.  Means and deviations are 0.5 throughout."""

    patch_size: int = 8
    merge_size: int = 2
    temporal_patch_size: int = 2  # frames in a patch
    min_pixels: int = 64 * 64  # px of a frame
    max_pixels: int = 64 * 64
    fps: float = 4.0  # frames looked at in a second of video
    min_frames: int = 4
    max_frames: int = 768


@dataclass(frozen=True)
class MLLMMedia:
    """An image (one frame) or a clip: uint8 [F, H, W, 3]."""

    frames: np.ndarray
    fps: float = 8.0
    is_video: bool = True


@dataclass(frozen=True)
class MLLMMessage:
    """One request: media first, then the text; `system` names a mode such as think."""

    text: str
    media: tuple[MLLMMedia, ...] = ()
    system: str | None = None


@dataclass(frozen=True)
class TokenizedRequest:
    """A request ready for the model: token ids [N], modality of each (0 text, 1 image, 2 video), patches and grids."""

    token_ids: list[int]
    token_types: list[int]
    patches: dict[str, list[Tensor]]
    grids: dict[str, list[list[int]]]


# ---------------------------------------------------------------- pixels to patches


def fit_size(height: int, width: int, vision_config: VisionInputConfig) -> tuple[int, int]:
    """The nearest size whose sides are multiples of a merged patch and whose area is in the allowed range."""
    factor = vision_config.patch_size * vision_config.merge_size
    tall, wide = (max(factor, round(side / factor) * factor) for side in (height, width))
    if tall * wide > vision_config.max_pixels:
        shrink = math.sqrt(height * width / vision_config.max_pixels)
        tall, wide = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif tall * wide < vision_config.min_pixels:
        grow = math.sqrt(vision_config.min_pixels / (height * width))
        tall, wide = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return tall, wide


def sample_frame_indices(media: MLLMMedia, vision_config: VisionInputConfig) -> list[int]:
    """Indices of the frames that the model looks at: `fps` a second, evenly from the first to the last."""
    total = len(media.frames)
    count = int(total / media.fps * vision_config.fps)
    count = min(max(count, vision_config.min_frames), vision_config.max_frames, total)
    return np.linspace(0, total - 1, count).round().astype(int).tolist()


def resize_frame(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if frame.shape[:2] == size:
        return frame
    return np.asarray(Image.fromarray(frame).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def patchify(frames: np.ndarray, vision_config: VisionInputConfig) -> tuple[Tensor, list[int]]:
    """Patches [P, 3 * pair * patch * patch] of frames [F, H, W, 3] in Qwen's order, and their grid (t, h, w)."""
    size = fit_size(frames.shape[1], frames.shape[2], vision_config)
    frames = np.stack([resize_frame(frame, size) for frame in frames])
    missing = -len(frames) % vision_config.temporal_patch_size
    frames = np.concatenate([frames, frames[-1:].repeat(missing, axis=0)])
    x = torch.from_numpy(frames).float() / 127.5 - 1
    t, y, x_ = (
        len(frames) // vision_config.temporal_patch_size,
        size[0] // vision_config.patch_size,
        size[1] // vision_config.patch_size,
    )
    m, p = vision_config.merge_size, vision_config.patch_size
    x = x.view(t, vision_config.temporal_patch_size, y // m, m, p, x_ // m, m, p, 3)
    return x.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * y * x_, -1), [t, y, x_]


# ---------------------------------------------------------------- requests to tokens


def encode_media(media: MLLMMedia, vision_config: VisionInputConfig) -> tuple[str, Tensor, list[int]]:
    """The placeholder text of one medium (a video has a timestamp before each pair of frames), patches and grid."""
    indices = sample_frame_indices(media, vision_config) if media.is_video else [0]
    patches, grid = patchify(media.frames[indices], vision_config)
    tokens_per_frame = grid[1] * grid[2] // vision_config.merge_size**2
    if not media.is_video:
        return f"<|vision_start|>{'<|image_pad|>' * tokens_per_frame}<|vision_end|>", patches, grid
    indices += [indices[-1]] * (-len(indices) % vision_config.temporal_patch_size)
    text = ""
    for start in range(0, len(indices), vision_config.temporal_patch_size):
        seconds = (indices[start] + indices[start + vision_config.temporal_patch_size - 1]) / 2 / media.fps
        text += f"<{seconds:.1f} seconds><|vision_start|>{'<|video_pad|>' * tokens_per_frame}<|vision_end|>"
    return text, patches, grid


def tokenize_message(
    tokenizer: PreTrainedTokenizerBase, message: MLLMMessage, vision_config: VisionInputConfig, answer: str = ""
) -> TokenizedRequest:
    """The chat up to the answer, or through it (with its end token) where one is given."""
    patches: dict[str, list[Tensor]] = {"image": [], "video": []}
    grids: dict[str, list[list[int]]] = {"image": [], "video": []}
    content = ""
    for media in message.media:
        text, patch, grid = encode_media(media, vision_config)
        kind = "video" if media.is_video else "image"
        content += text
        patches[kind].append(patch)
        grids[kind].append(grid)
    system = f"<|im_start|>system\n{message.system}<|im_end|>\n" if message.system else ""
    chat = f"{system}<|im_start|>user\n{content}{message.text}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(chat + (f"{answer}<|im_end|>" if answer else ""), add_special_tokens=False).input_ids
    image, video = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    types = [1 if one == image else 2 if one == video else 0 for one in ids]
    return TokenizedRequest(ids, types, patches, grids)


def collate_requests(
    batch: Sequence[TokenizedRequest], pad_token_id: int, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Keyword arguments of Qwen3-VL for a batch, padded on the right."""
    longest = max(len(one.token_ids) for one in batch)

    def pad_rows(rows: list[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows], device=device)

    inputs = {
        "input_ids": pad_rows([one.token_ids for one in batch], pad_token_id),
        "attention_mask": pad_rows([[1] * len(one.token_ids) for one in batch], 0),
        "mm_token_type_ids": pad_rows([one.token_types for one in batch], 0),
    }
    for kind, pixel_name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        patches = [patch for one in batch for patch in one.patches[kind]]
        if patches:
            inputs[pixel_name] = torch.cat(patches).to(device)
            grids = [grid for one in batch for grid in one.grids[kind]]
            inputs[f"{kind}_grid_thw"] = torch.tensor(grids, device=device)
    return inputs


# ---------------------------------------------------------------- what is asked of the model


@torch.no_grad()
def compute_first_logits(
    model: Qwen3VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    message: MLLMMessage,
    vision_config: VisionInputConfig,
) -> Tensor:
    """Logits [V] of the first token of the answer."""
    inputs = collate_requests(
        [tokenize_message(tokenizer, message, vision_config)], tokenizer.pad_token_id, model.device
    )
    return model(**inputs, logits_to_keep=1).logits[0, -1].float()


def predict_route(
    model: Qwen3VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    message: MLLMMessage,
    vision_config: VisionInputConfig,
) -> Route:
    """Greedy, hence the same for the same request; the probability of text is that of neither special token."""
    probabilities = compute_first_logits(model, tokenizer, message, vision_config).softmax(-1)
    best = int(probabilities.argmax())
    boi, bov = tokenizer.convert_tokens_to_ids([BOI, BOV])
    if best == boi:
        return Route(kind="image", probability=float(probabilities[boi]))
    if best == bov:
        return Route(kind="video", probability=float(probabilities[bov]))
    return Route(kind="text", probability=float(1 - probabilities[boi] - probabilities[bov]))


def compute_hidden_states(
    model: Qwen3VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[tuple[MLLMMessage, Literal["image", "video"]]],
    vision_config: VisionInputConfig,
) -> tuple[Tensor, Tensor]:
    """Last hidden states [B, N, M] of each request with its routing and closing token, and the padding mask [B, N]."""
    return forward_hidden_states(model, prepare_hidden_state_inputs(tokenizer, batch, vision_config))


def prepare_hidden_state_inputs(
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[tuple[MLLMMessage, Literal["image", "video"]]],
    vision_config: VisionInputConfig,
) -> dict[str, Tensor]:
    """What the model is given for `compute_hidden_states`."""
    encoded = [
        tokenize_message(tokenizer, message, vision_config, "".join(VISUAL_TOKEN_PAIRS[kind]))
        for message, kind in batch
    ]
    return collate_requests(encoded, tokenizer.pad_token_id)


def forward_hidden_states(model: Qwen3VLForConditionalGeneration, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Last hidden states [B, N, M] of what `prepare_hidden_state_inputs` made, and the padding mask [B, N]."""
    device_inputs = {name: part.to(model.device) for name, part in inputs.items()}
    return model.model(**device_inputs).last_hidden_state, device_inputs["attention_mask"] == 0


def sample_token(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token: the likeliest at temperature 0, else drawn from the smallest set that holds `top_p`."""
    if temperature == 0:
        return int(logits_V.argmax())
    probabilities, order = (logits_V / temperature).softmax(-1).sort(descending=True)
    probabilities[1:][probabilities.cumsum(0)[:-1] > top_p] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


@torch.no_grad()
def generate_answer(
    model: Qwen3VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    message: MLLMMessage,
    vision_config: VisionInputConfig,
    *,
    temperature: float = 0.2,
    top_p: float = 0.6,
    max_tokens: int = 1024,
    seed: int = 0,
) -> Iterator[str]:
    """The answer as pieces of text (paper defaults for understanding); special tokens but the think marks are left out.

    The routing tokens cannot come first here: the caller has already decided for text.
    """
    inputs = collate_requests(
        [tokenize_message(tokenizer, message, vision_config)], tokenizer.pad_token_id, model.device
    )
    generator = torch.Generator().manual_seed(seed)
    banned = tokenizer.convert_tokens_to_ids(list(VISUAL_TOKENS))
    end = tokenizer.eos_token_id
    ids: list[int] = []
    emitted_text = ""
    out = model(**inputs, logits_to_keep=1, use_cache=True)
    # A request without media leaves the offset of whatever was asked before.
    offset = model.model.rope_deltas if message.media else torch.zeros(1, dtype=torch.long, device=model.device)
    for _ in range(max_tokens):
        logits = out.logits[0, -1].float().cpu()
        logits[banned] = -torch.inf
        token_id = sample_token(logits, temperature, top_p, generator)
        if token_id == end:
            return
        ids.append(token_id)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # a character may span several tokens
            yield text[len(emitted_text) :]
            emitted_text = text
        position = inputs["input_ids"].shape[1] + len(ids) - 1 + offset
        out = model(
            input_ids=torch.tensor([[token_id]], device=model.device),
            **{CACHE_ARGUMENT: getattr(out, CACHE_ARGUMENT)},
            position_ids=position.view(1, 1, 1).expand(3, 1, 1),
            use_cache=True,
        )
