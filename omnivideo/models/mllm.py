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

from omnivideo.contracts import Routed

BOI, EOI, BOV, EOV = "<BOI>", "<EOI>", "<BOV>", "<EOV>"
VISUAL_TOKENS = (BOI, EOI, BOV, EOV)
# transformers 5.24 calls it "cache"; before (5.19 goes with vLLM 0.32) it was "past_key_values".
CACHE = "cache" if "cache" in signature(Qwen3VLForConditionalGeneration.forward).parameters else "past_key_values"
ENDING = {"image": (BOI, EOI), "video": (BOV, EOV)}


@dataclass(frozen=True)
class Pixels:
    """How frames become patches; the defaults are the tiny preset's.  Means and deviations are 0.5 throughout."""

    patch: int = 8
    merge: int = 2
    pair: int = 2  # frames in a patch
    least: int = 64 * 64  # px of a frame
    most: int = 64 * 64
    fps: float = 4.0  # frames looked at in a second of video
    least_frames: int = 4
    most_frames: int = 768


@dataclass(frozen=True)
class Media:
    """An image (one frame) or a clip: uint8 [F, H, W, 3]."""

    frames: np.ndarray
    fps: float = 8.0
    video: bool = True


@dataclass(frozen=True)
class Message:
    """One request: media first, then the text; `system` names a mode such as think."""

    text: str
    media: tuple[Media, ...] = ()
    system: str | None = None


@dataclass(frozen=True)
class Encoded:
    """A request ready for the model: token ids [N], modality of each (0 text, 1 image, 2 video), patches and grids."""

    ids: list[int]
    types: list[int]
    patches: dict[str, list[Tensor]]
    grids: dict[str, list[list[int]]]


# ---------------------------------------------------------------- pixels to patches


def fitted(height: int, width: int, pixels: Pixels) -> tuple[int, int]:
    """The nearest size whose sides are multiples of a merged patch and whose area is in the allowed range."""
    factor = pixels.patch * pixels.merge
    tall, wide = (max(factor, round(side / factor) * factor) for side in (height, width))
    if tall * wide > pixels.most:
        shrink = math.sqrt(height * width / pixels.most)
        tall, wide = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif tall * wide < pixels.least:
        grow = math.sqrt(pixels.least / (height * width))
        tall, wide = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return tall, wide


def sampled(media: Media, pixels: Pixels) -> list[int]:
    """Indices of the frames that the model looks at: `fps` a second, evenly from the first to the last."""
    total = len(media.frames)
    count = int(total / media.fps * pixels.fps)
    count = min(max(count, pixels.least_frames), pixels.most_frames, total)
    return np.linspace(0, total - 1, count).round().astype(int).tolist()


def resize(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if frame.shape[:2] == size:
        return frame
    return np.asarray(Image.fromarray(frame).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def patchify(frames: np.ndarray, pixels: Pixels) -> tuple[Tensor, list[int]]:
    """Patches [P, 3 * pair * patch * patch] of frames [F, H, W, 3] in Qwen's order, and their grid (t, h, w)."""
    size = fitted(frames.shape[1], frames.shape[2], pixels)
    frames = np.stack([resize(frame, size) for frame in frames])
    missing = -len(frames) % pixels.pair
    frames = np.concatenate([frames, frames[-1:].repeat(missing, axis=0)])
    x = torch.from_numpy(frames).float() / 127.5 - 1
    t, y, x_ = len(frames) // pixels.pair, size[0] // pixels.patch, size[1] // pixels.patch
    m, p = pixels.merge, pixels.patch
    x = x.view(t, pixels.pair, y // m, m, p, x_ // m, m, p, 3)
    return x.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * y * x_, -1), [t, y, x_]


# ---------------------------------------------------------------- requests to tokens


def place_media(media: Media, pixels: Pixels) -> tuple[str, Tensor, list[int]]:
    """The placeholder text of one medium (a video has a timestamp before each pair of frames), patches and grid."""
    chosen = sampled(media, pixels) if media.video else [0]
    patches, grid = patchify(media.frames[chosen], pixels)
    each = grid[1] * grid[2] // pixels.merge**2
    if not media.video:
        return f"<|vision_start|>{'<|image_pad|>' * each}<|vision_end|>", patches, grid
    chosen += [chosen[-1]] * (-len(chosen) % pixels.pair)
    text = ""
    for at in range(0, len(chosen), pixels.pair):
        seconds = (chosen[at] + chosen[at + pixels.pair - 1]) / 2 / media.fps
        text += f"<{seconds:.1f} seconds><|vision_start|>{'<|video_pad|>' * each}<|vision_end|>"
    return text, patches, grid


def encode(tokenizer: PreTrainedTokenizerBase, message: Message, pixels: Pixels, answer: str = "") -> Encoded:
    """The chat up to the answer, or through it (with its end token) where one is given."""
    patches: dict[str, list[Tensor]] = {"image": [], "video": []}
    grids: dict[str, list[list[int]]] = {"image": [], "video": []}
    content = ""
    for media in message.media:
        text, patch, grid = place_media(media, pixels)
        kind = "video" if media.video else "image"
        content += text
        patches[kind].append(patch)
        grids[kind].append(grid)
    system = f"<|im_start|>system\n{message.system}<|im_end|>\n" if message.system else ""
    chat = f"{system}<|im_start|>user\n{content}{message.text}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(chat + (f"{answer}<|im_end|>" if answer else ""), add_special_tokens=False).input_ids
    image, video = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    types = [1 if one == image else 2 if one == video else 0 for one in ids]
    return Encoded(ids, types, patches, grids)


def collate(batch: Sequence[Encoded], pad: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Keyword arguments of Qwen3-VL for a batch, padded on the right."""
    longest = max(len(one.ids) for one in batch)

    def padded(rows: list[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows], device=device)

    inputs = {
        "input_ids": padded([one.ids for one in batch], pad),
        "attention_mask": padded([[1] * len(one.ids) for one in batch], 0),
        "mm_token_type_ids": padded([one.types for one in batch], 0),
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
def first_logits(
    model: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, message: Message, pixels: Pixels
) -> Tensor:
    """Logits [V] of the first token of the answer."""
    inputs = collate([encode(tokenizer, message, pixels)], tokenizer.pad_token_id, model.device)
    return model(**inputs, logits_to_keep=1).logits[0, -1].float()


def route(
    model: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, message: Message, pixels: Pixels
) -> Routed:
    """Greedy, hence the same for the same request; the probability of text is that of neither special token."""
    chances = first_logits(model, tokenizer, message, pixels).softmax(-1)
    best = int(chances.argmax())
    boi, bov = tokenizer.convert_tokens_to_ids([BOI, BOV])
    if best == boi:
        return Routed(kind="image", probability=float(chances[boi]))
    if best == bov:
        return Routed(kind="video", probability=float(chances[bov]))
    return Routed(kind="text", probability=float(1 - chances[boi] - chances[bov]))


def hidden_states(
    model: Qwen3VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[tuple[Message, Literal["image", "video"]]],
    pixels: Pixels,
) -> tuple[Tensor, Tensor]:
    """Last hidden states [B, N, M] of each request with its routing and closing token, and the padding mask [B, N]."""
    return states_of(model, asking(tokenizer, batch, pixels))


def asking(
    tokenizer: PreTrainedTokenizerBase, batch: Sequence[tuple[Message, Literal["image", "video"]]], pixels: Pixels
) -> dict[str, Tensor]:
    """What the model is given for `hidden_states`."""
    encoded = [encode(tokenizer, message, pixels, "".join(ENDING[kind])) for message, kind in batch]
    return collate(encoded, tokenizer.pad_token_id)


def states_of(model: Qwen3VLForConditionalGeneration, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Last hidden states [B, N, M] of what `asking` made, and the padding mask [B, N]."""
    moved = {name: part.to(model.device) for name, part in inputs.items()}
    return model.model(**moved).last_hidden_state, moved["attention_mask"] == 0


def pick(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token: the likeliest at temperature 0, else drawn from the smallest set that holds `top_p`."""
    if temperature == 0:
        return int(logits_V.argmax())
    chances, order = (logits_V / temperature).softmax(-1).sort(descending=True)
    chances[1:][chances.cumsum(0)[:-1] > top_p] = 0
    return int(order[torch.multinomial(chances, 1, generator=generator)])


@torch.no_grad()
def answer(
    model: Qwen3VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    message: Message,
    pixels: Pixels,
    *,
    temperature: float = 0.2,
    top_p: float = 0.6,
    most: int = 1024,
    seed: int = 0,
) -> Iterator[str]:
    """The answer as pieces of text (paper defaults for understanding); special tokens but the think marks are left out.

    The routing tokens cannot come first here: the caller has already decided for text.
    """
    inputs = collate([encode(tokenizer, message, pixels)], tokenizer.pad_token_id, model.device)
    generator = torch.Generator().manual_seed(seed)
    banned = tokenizer.convert_tokens_to_ids(list(VISUAL_TOKENS))
    end = tokenizer.eos_token_id
    ids: list[int] = []
    shown = ""
    out = model(**inputs, logits_to_keep=1, use_cache=True)
    # A request without media leaves the offset of whatever was asked before.
    offset = model.model.rope_deltas if message.media else torch.zeros(1, dtype=torch.long, device=model.device)
    for _ in range(most):
        logits = out.logits[0, -1].float().cpu()
        logits[banned] = -torch.inf
        chosen = pick(logits, temperature, top_p, generator)
        if chosen == end:
            return
        ids.append(chosen)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # a character may span several tokens
            yield text[len(shown) :]
            shown = text
        position = inputs["input_ids"].shape[1] + len(ids) - 1 + offset
        out = model(
            input_ids=torch.tensor([[chosen]], device=model.device),
            **{CACHE: getattr(out, CACHE)},
            position_ids=position.view(1, 1, 1).expand(3, 1, 1),
            use_cache=True,
        )
