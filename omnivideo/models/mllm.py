"""The multimodal language model: Qwen3-VL, whose text head also routes (paper section 3.2).

The first token of an answer sets the route: `<BOI>` requests an image, `<BOV>` a video, and any other token a text.
For generation, the vision head reads the last hidden states of the sequence, including the routing token.
Shapes: B batch, N tokens, V vocabulary, M width of the model, F frames, H W pixels, P patches, I values of a patch.
"""

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.vision_utils import get_vision_position_ids

from omnivideo.contracts import Route
from omnivideo.errors import InvalidInput
from omnivideo.models.frames import crop_to_square, resize_frame
from omnivideo.models.structured import SchemaConstraint
from omnivideo.presets import VisionInputConfig

BOI, EOI, BOV, EOV = "<BOI>", "<EOI>", "<BOV>", "<EOV>"
VISUAL_TOKENS = (BOI, EOI, BOV, EOV)
VISUAL_TOKEN_PAIRS = {"image": (BOI, EOI), "video": (BOV, EOV)}
# The argument is "cache" in transformers 5.24 and "past_key_values" in 5.19, which vLLM 0.32 needs.
CACHE_ARGUMENT = (
    "cache" if "cache" in signature(Qwen3VLForConditionalGeneration.forward).parameters else "past_key_values"
)


class FittedFrames:
    """The frames [H, W, 3] of a medium of `count` frames that a model sees, by their indices, in place of all frames.

    They have the size at which the model sees them, and are kept apart for each of its visual inputs.
    """

    def __init__(self, count: int, frames_by_input: "Mapping[VisualInput, Mapping[int, np.ndarray]]"):
        self.count, self.frames_by_input = count, frames_by_input

    def __len__(self) -> int:
        return self.count

    @property
    def nbytes(self) -> int:
        return sum(frame.nbytes for fitted in self.frames_by_input.values() for frame in fitted.values())


@dataclass(frozen=True)
class MLLMMedia:
    """An image (one frame) or a clip: uint8 [F, H, W, 3], or what was kept of it. `fps` matters only for a clip."""

    frames: np.ndarray | FittedFrames
    fps: float = 1.0
    is_video: bool = True


class VisualInput(Protocol):
    """How a model sees a medium in one of its calls. Inputs are hashable, and equal ones see the same."""

    def list_seen_frames(self, media: MLLMMedia) -> list[int]:
        """Return the indices of the frames that the model sees; of the medium's frames, only their number is used."""
        ...

    def fit_frame(self, frame_HW3: np.ndarray, num_frames: int) -> np.ndarray:
        """Return a frame at the size at which the model sees it as one of `num_frames`."""
        ...


def fit_frames(media: MLLMMedia, visual_input: VisualInput) -> tuple[list[int], list[np.ndarray]]:
    """Return the indices of the frames that a model sees in one of its calls, and these frames at their size."""
    indices = visual_input.list_seen_frames(media)
    if isinstance(media.frames, FittedFrames):
        fitted = media.frames.frames_by_input[visual_input]
        return indices, [fitted[index] for index in indices]
    return indices, [visual_input.fit_frame(media.frames[index], len(indices)) for index in indices]


@dataclass(frozen=True)
class MLLMMessage:
    """One request: the media come first, then the text. `system` is the system prompt of a mode such as think.

    With a `json_schema`, the answer is valid JSON of that schema.
    """

    text: str
    media: tuple[MLLMMedia, ...] = ()
    system: str | None = None
    json_schema: str | None = None


@dataclass(frozen=True)
class TokenizedRequest:
    """The model's input for one request.

    `token_ids` are the N token ids and `token_types` their modalities (0 text, 1 image, 2 video). `patches` [P, I] and
    `grids` (t, h, w, in patches) are lists with one entry for each medium, under "image" and "video".
    """

    token_ids: list[int]
    token_types: list[int]
    patches: dict[str, list[Tensor]]
    grids: dict[str, list[list[int]]]


# ---------------------------------------------------------------- pixels to patches


def fit_size(height: int, width: int, vision_config: VisionInputConfig, num_frames: int = 1) -> tuple[int, int]:
    """Return the nearest height and width that are multiples of a merged patch and have an allowed area.

    If the budget is that of the whole clip, the area counts once for each of its frames.
    """
    factor, temporal = vision_config.patch_size * vision_config.merge_size, vision_config.temporal_patch_size
    area, padded_area = 1, 1  # in frames: as they are, and in whole groups of frames, both as Qwen3-VL's processor does
    if vision_config.budget == "clip" and num_frames > 1:
        area, padded_area = num_frames, max(1, round(num_frames / temporal)) * temporal
    fit_height, fit_width = (max(factor, round(side / factor) * factor) for side in (height, width))
    if padded_area * fit_height * fit_width > vision_config.max_pixels:
        shrink = math.sqrt(area * height * width / vision_config.max_pixels)
        fit_height, fit_width = (
            max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)
        )  # fmt: skip
    elif padded_area * fit_height * fit_width < vision_config.min_pixels:
        grow = math.sqrt(vision_config.min_pixels / (area * height * width))
        fit_height, fit_width = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return fit_height, fit_width


def sample_frame_indices(media: MLLMMedia, vision_config: VisionInputConfig) -> list[int]:
    """Return the indices of the frames that the model sees, evenly spaced from the first to the last.

    Their number is `fps` for each second of the clip, within the configured bounds.
    """
    total = len(media.frames)
    count = int(total / media.fps * vision_config.fps)
    count = min(max(count, vision_config.min_frames), vision_config.max_frames, total)
    return [int(index) for index in np.linspace(0, total - 1, count).round()]


@dataclass(frozen=True)
class QwenVisualInput:
    """The `VisualInput` of a Qwen3-VL with a preset's numbers."""

    config: VisionInputConfig

    def list_seen_frames(self, media: MLLMMedia) -> list[int]:
        return sample_frame_indices(media, self.config) if media.is_video else [0]

    def fit_frame(self, frame_HW3: np.ndarray, num_frames: int) -> np.ndarray:
        frame_HW3 = crop_to_square(frame_HW3) if self.config.fit == "square" else frame_HW3
        height, width = frame_HW3.shape[:2]
        return resize_frame(frame_HW3, fit_size(height, width, self.config, num_frames))


def patchify(frames_FHW3: np.ndarray, vision_config: VisionInputConfig) -> tuple[Tensor, list[int]]:
    """Return the patches [P, I] of frames in Qwen's order, and their grid (t, h, w); I = 3 * frames * patch * patch.

    The frames have a size that `fit_size` returns. Pixels are normalised with mean 0.5 and standard deviation 0.5. The
    last frame is repeated to fill its patch.
    """
    patch, merge, temporal = vision_config.patch_size, vision_config.merge_size, vision_config.temporal_patch_size
    frames = np.concatenate([frames_FHW3, frames_FHW3[-1:].repeat(-len(frames_FHW3) % temporal, axis=0)])
    t, h, w = len(frames) // temporal, frames.shape[1] // patch, frames.shape[2] // patch
    x = torch.from_numpy(frames).float() / 127.5 - 1
    x = x.view(t, temporal, h // merge, merge, patch, w // merge, merge, patch, 3)
    # To (t, h / merge, w / merge, merge, merge), then within a patch (colour, frame, row, column).
    return x.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, -1), [t, h, w]


# ---------------------------------------------------------------- requests to tokens


def encode_media(media: MLLMMedia, vision_config: VisionInputConfig) -> tuple[str, Tensor, list[int]]:
    """Return a medium's placeholder text, its patches [P, I] and their grid (t, h, w).

    In the text of a clip, each group of `temporal_patch_size` frames follows its timestamp.
    """
    indices, frames = fit_frames(media, QwenVisualInput(vision_config))
    patches_PI, grid = patchify(np.stack(frames), vision_config)
    tokens_per_frame = grid[1] * grid[2] // vision_config.merge_size**2
    if not media.is_video:
        return f"<|vision_start|>{'<|image_pad|>' * tokens_per_frame}<|vision_end|>", patches_PI, grid
    indices += [indices[-1]] * (-len(indices) % vision_config.temporal_patch_size)
    text = ""
    for start in range(0, len(indices), vision_config.temporal_patch_size):
        seconds = (indices[start] + indices[start + vision_config.temporal_patch_size - 1]) / 2 / media.fps
        text += f"<{seconds:.1f} seconds><|vision_start|>{'<|video_pad|>' * tokens_per_frame}<|vision_end|>"
    return text, patches_PI, grid


def tokenize_message(
    tokenizer: PreTrainedTokenizerBase, message: MLLMMessage, vision_config: VisionInputConfig, answer: str = ""
) -> TokenizedRequest:
    """Return the chat up to the start of the answer; with `answer`, up to and including the answer's end token."""
    patches: dict[str, list[Tensor]] = {"image": [], "video": []}
    grids: dict[str, list[list[int]]] = {"image": [], "video": []}
    content = ""
    for media in message.media:
        text, patches_PI, grid = encode_media(media, vision_config)
        kind = "video" if media.is_video else "image"
        content += text
        patches[kind].append(patches_PI)
        grids[kind].append(grid)
    system = f"<|im_start|>system\n{message.system}<|im_end|>\n" if message.system else ""
    chat = f"{system}<|im_start|>user\n{content}{message.text}<|im_end|>\n<|im_start|>assistant\n"
    token_ids = tokenizer(
        chat + (f"{answer}<|im_end|>" if answer else ""), add_special_tokens=False, verbose=False
    ).input_ids
    check_request_length(len(token_ids), tokenizer.model_max_length)
    image_id, video_id = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    token_types = [1 if token_id == image_id else 2 if token_id == video_id else 0 for token_id in token_ids]
    return TokenizedRequest(token_ids, token_types, patches, grids)


def check_request_length(count: int, most: int) -> None:
    """Raise InvalidInput for a request of more than `most` tokens."""
    if count > most:
        raise InvalidInput("text", f"with its media it has {count} tokens; the language model takes 1 to {most}")


def collate_requests(
    batch: Sequence[TokenizedRequest], pad_token_id: int, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Return Qwen3-VL's keyword arguments for a batch, padded on the right."""
    longest = max(len(request.token_ids) for request in batch)

    def pad_rows(rows: list[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows], device=device)

    inputs = {
        "input_ids": pad_rows([request.token_ids for request in batch], pad_token_id),
        "attention_mask": pad_rows([[1] * len(request.token_ids) for request in batch], 0),
        "mm_token_type_ids": pad_rows([request.token_types for request in batch], 0),
    }
    for kind, pixel_name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        patches = [patches_PI for request in batch for patches_PI in request.patches[kind]]
        if patches:
            inputs[pixel_name] = torch.cat(patches).to(device)
            grids = [grid for request in batch for grid in request.grids[kind]]
            inputs[f"{kind}_grid_thw"] = torch.tensor(grids, device=device)
    return inputs


# ---------------------------------------------------------------- routing


@torch.no_grad()
def compute_first_logits(
    model: Qwen3VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    message: MLLMMessage,
    vision_config: VisionInputConfig,
) -> Tensor:
    """Return the logits [V] of the answer's first token."""
    inputs = collate_requests(
        [tokenize_message(tokenizer, message, vision_config)], tokenizer.pad_token_id, model.device
    )
    logits_1NV: Tensor = model(**inputs, logits_to_keep=1).logits
    return logits_1NV[0, -1].float()


def compare_yes_and_no(tokenizer: PreTrainedTokenizerBase, logits_V: Tensor) -> float:
    """Return the probability, 0 to 1, that an answer begins with "yes" rather than with "no"."""
    answer_ids = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("yes", "no")]
    return float(logits_V[answer_ids].softmax(-1)[0])


def predict_route(
    model: Qwen3VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    message: MLLMMessage,
    vision_config: VisionInputConfig,
) -> Route:
    """Return the route of the most likely first token; the same request always takes the same route.

    The probability of the text route is that of all tokens but the two routing tokens.
    """
    probabilities_V = compute_first_logits(model, tokenizer, message, vision_config).softmax(-1)
    best_id = int(probabilities_V.argmax())
    boi_id, bov_id = tokenizer.convert_tokens_to_ids([BOI, BOV])
    if best_id == boi_id:
        return Route(kind="image", probability=float(probabilities_V[boi_id]))
    if best_id == bov_id:
        return Route(kind="video", probability=float(probabilities_V[bov_id]))
    return Route(kind="text", probability=float(1 - probabilities_V[boi_id] - probabilities_V[bov_id]))


# ---------------------------------------------------------------- hidden states for the vision head


def compute_hidden_states(
    model: Qwen3VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[tuple[MLLMMessage, Literal["image", "video"]]],
    vision_config: VisionInputConfig,
) -> tuple[Tensor, Tensor]:
    """Return the last hidden states [B, N, M] of each request, and a mask [B, N] that is True for padding.

    Each sequence ends with the request's routing token and its closing token.
    """
    return forward_hidden_states(model, prepare_hidden_state_inputs(tokenizer, batch, vision_config))


def prepare_hidden_state_inputs(
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[tuple[MLLMMessage, Literal["image", "video"]]],
    vision_config: VisionInputConfig,
) -> dict[str, Tensor]:
    """Return the model's keyword arguments for `compute_hidden_states`, on the CPU."""
    encoded = [
        tokenize_message(tokenizer, message, vision_config, "".join(VISUAL_TOKEN_PAIRS[kind]))
        for message, kind in batch
    ]
    return collate_requests(encoded, tokenizer.pad_token_id)


def add_position_ids(model: Qwen3VLForConditionalGeneration, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs with the positions of tokens and patches, which the model computes one sample at a time."""
    input_names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    position_ids, _ = model.model.get_rope_index(**{name: inputs[name] for name in input_names if name in inputs})
    positions = {"position_ids": position_ids}
    for medium in ("image", "video"):
        if (grids := inputs.get(f"{medium}_grid_thw")) is not None:
            positions[f"{medium}_position_ids"] = get_vision_position_ids(
                grids, model.config.vision_config.spatial_merge_size
            )
    return inputs | positions


def forward_hidden_states(model: Qwen3VLForConditionalGeneration, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the last hidden states [B, N, M] for inputs of `prepare_hidden_state_inputs`, and the padding [B, N]."""
    device_inputs = {name: value.to(model.device) for name, value in inputs.items()}
    return model.model(**device_inputs).last_hidden_state, device_inputs["attention_mask"] == 0


# ---------------------------------------------------------------- text


def sample_token(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Return a token id: the most likely one at temperature 0, otherwise one from nucleus sampling with `top_p`."""
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
    stop_ids: Collection[int] = (),
) -> Iterator[str]:
    """Yield the answer in pieces of text; the defaults are the paper's for understanding.

    Only the end token is omitted; `stop_ids` are further ones. The routing tokens, which a stock tokenizer does not
    have, are banned, because the caller has already chosen text.
    """
    inputs = collate_requests(
        [tokenize_message(tokenizer, message, vision_config)], tokenizer.pad_token_id, model.device
    )
    generator = torch.Generator().manual_seed(seed)
    vocabulary = tokenizer.get_added_vocab()
    banned_ids = [vocabulary[token] for token in VISUAL_TOKENS if token in vocabulary]
    token_ids: list[int] = []
    emitted_text = ""
    out = model(**inputs, logits_to_keep=1, use_cache=True)
    schema, num_logits = message.json_schema, out.logits.shape[-1]
    constraint = SchemaConstraint(tokenizer, num_logits, schema) if schema else None
    # transformers keeps the rotary offset of the last request with media; a request without media has no offset.
    offset = model.model.rope_deltas if message.media else torch.zeros(1, dtype=torch.long, device=model.device)
    for _ in range(max_tokens):
        logits_V = out.logits[0, -1].float().cpu()
        logits_V[banned_ids] = -torch.inf
        logits_V = constraint.mask_logits(logits_V) if constraint else logits_V
        token_id = sample_token(logits_V, temperature, top_p, generator)
        if token_id == tokenizer.eos_token_id or token_id in stop_ids:
            return
        if constraint:
            constraint.accept_token(token_id)
        token_ids.append(token_id)
        text = tokenizer.decode(token_ids)
        if not text.endswith("\ufffd"):  # a character may span several tokens
            yield text[len(emitted_text) :]
            emitted_text = text
        position = inputs["input_ids"].shape[1] + len(token_ids) - 1 + offset
        out = model(
            input_ids=torch.tensor([[token_id]], device=model.device),
            **{CACHE_ARGUMENT: getattr(out, CACHE_ARGUMENT)},
            position_ids=position.view(1, 1, 1).expand(3, 1, 1),
            use_cache=True,
        )


# ---------------------------------------------------------------- special tokens in a user's text
#
# A request becomes one string with the chat markup around it, and the tokenizer finds its special tokens anywhere in
# that string. A user who types one (`<BOI>`, `<|im_end|>`, `<think>`) could override the model's own decision. An
# invisible character after the token's first character turns it into ordinary text.

ZERO_WIDTH_SPACE = "\u200b"


@lru_cache(maxsize=8)
def compile_token_pattern(special_tokens: frozenset[str]) -> re.Pattern[str]:
    # Longest first: like the tokenizer, the pattern prefers the longer of two tokens with the same beginning.
    by_length = sorted(special_tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, by_length)))


def sanitize_text(text: str, special_tokens: Iterable[str]) -> str:
    """Return the text with every special token broken after its first character; other text is unchanged.

    Special tokens of one character are ignored, because they cannot be broken.
    """
    breakable_tokens = frozenset(token for token in special_tokens if len(token) > 1)
    if not breakable_tokens or not compile_token_pattern(breakable_tokens).search(text):
        return text
    sanitized = compile_token_pattern(breakable_tokens).sub(
        lambda match: match[0][0] + ZERO_WIDTH_SPACE + match[0][1:], text
    )
    # Tokens may overlap, and a match hides one that begins inside it.
    return sanitize_text(sanitized, breakable_tokens)


def list_special_tokens(tokenizer: object) -> frozenset[str]:
    """Return the strings that a Hugging Face tokenizer maps to one token wherever they occur."""
    return frozenset(tokenizer.get_added_vocab())  # type: ignore[attr-defined]
