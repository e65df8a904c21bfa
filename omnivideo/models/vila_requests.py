"""The inputs of VILA: the text of a request in Llama 3's chat format, token ids with places for images, and pixels.

    tokenize_request   a question, or a request that is to be routed: all images, and 8 frames of each clip
    tokenize_features  the request and the answer `[GEN_VID]` or `[GEN_IMG]`, whose states condition the decoder

In the second form the model sees only the first frame of a source, as it did in training.
Shapes: F images, H W pixels.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from omnivideo.contracts import Medium, Route
from omnivideo.models.mllm import MLLMMedia, MLLMMessage, check_request_length, fit_frames

IMAGE_TOKEN_ID = -200  # the place of an image among the token ids
MAX_ROUTING_TOKENS = 512  # of an answer in which a routing token is looked for, as in the authors' code
CLIP_FRAMES = 8  # frames of a clip, from the first to the last
END_OF_TURN = "<|eot_id|>"
GENERATION_TOKENS: dict[Medium, str] = {"image": "[GEN_IMG]", "video": "[GEN_VID]"}
# The tokens of Llama 3 that version 1 uses for them, if the tokenizer has no token of that name.
RESERVED_TOKEN_IDS: dict[Medium, int] = {"image": 128002, "video": 128003}
FEATURE_PREFIXES: dict[Medium, str] = {
    "image": "Generate an image about:\n",
    "video": "Generate a video about:\n",
}
VIDEO_MARK = "<video>\n"  # plain text to the tokenizer; it stands before the instruction of a clip's edit
SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


@dataclass(frozen=True)
class VilaImageConfig:
    """How an image becomes pixels: a size in px, PIL's resampling filter, and the normalisation of each colour.

    `resize_mode` is "resize" for an image that is stretched to the size, and "pad" for one that is made square first.
    """

    height: int
    width: int
    resample: int
    rescale_factor: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize_mode: Literal["resize", "pad"]


@dataclass(frozen=True)
class VilaRequest:
    """Token ids, with -200 for each image in turn, and the pixels [F, 3, H, W] of the images."""

    token_ids: list[int]
    pixels: Tensor | None


# ---------------------------------------------------------------- pixels


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Return the image in the middle of a square of one colour."""
    width, height = image.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def fit_frame(frame_HW3: np.ndarray, config: VilaImageConfig) -> np.ndarray:
    """Return a frame at the size of the model's images."""
    image = Image.fromarray(frame_HW3)
    if config.resize_mode == "pad":
        image = pad_to_square(image, tuple(int(value * 255) for value in config.mean))
    if image.size != (config.width, config.height):
        image = image.resize((config.width, config.height), Image.Resampling(config.resample))
    return np.asarray(image)


def normalize_frame(fitted_HW3: np.ndarray, config: VilaImageConfig) -> Tensor:
    """Return the normalised pixels [3, H, W] of a frame that `fit_frame` returned."""
    # Rescaled in float64 and then rounded, as transformers' processor does.
    x_HW3 = torch.from_numpy(fitted_HW3 * config.rescale_factor).float()
    return ((x_HW3 - torch.tensor(config.mean)) / torch.tensor(config.std)).permute(2, 0, 1)


def normalize_frames(fitted: Sequence[np.ndarray], config: VilaImageConfig) -> Tensor | None:
    """Return the normalised pixels [F, 3, H, W] of frames that `fit_frame` returned, or None if there are none."""
    return torch.stack([normalize_frame(frame_HW3, config) for frame_HW3 in fitted]) if fitted else None


def convert_frame(frame_HW3: np.ndarray, config: VilaImageConfig) -> Tensor:
    """Return the normalised pixels [3, H, W] of a frame of any size."""
    return normalize_frame(fit_frame(frame_HW3, config), config)


def sample_frame_indices(total: int) -> list[int]:
    """Return the indices of the 8 frames that the model sees of a clip, from the first to the last."""
    return [int(index) for index in np.linspace(0, total - 1, CLIP_FRAMES)]


def list_seen_frames(media: MLLMMedia) -> list[int]:
    """Return the indices of the frames that the model sees of a medium: that of an image, or 8 of a clip."""
    return sample_frame_indices(len(media.frames)) if media.is_video else [0]


@dataclass(frozen=True)
class VilaVisualInput:
    """The `VisualInput` of VILA. A source of the decoder's features is shown by the first of the same frames."""

    config: VilaImageConfig

    def list_seen_frames(self, media: MLLMMedia) -> list[int]:
        return list_seen_frames(media)

    def fit_frame(self, frame_HW3: np.ndarray, num_frames: int) -> np.ndarray:
        return fit_frame(frame_HW3, self.config)


# ---------------------------------------------------------------- tokens


def tokenize_chat(
    tokenizer: PreTrainedTokenizerBase, image_count: int, text: str, system: str | None = None, answer: str = ""
) -> list[int]:
    """Return the token ids of a chat up to the answer's beginning; with `answer`, up to and including its end token.

    `image_count` places for images stand before the text. The tokenizer may put a begin token before the one of the
    chat format; the published model was trained with both.
    """
    head = f"<|begin_of_text|>{format_turn('system', system or SYSTEM_PROMPT)}{format_header('user')}"
    tail = f"{text}{END_OF_TURN}{format_header('assistant')}{answer}{'<|end_of_text|>' if answer else ''}"
    if not image_count:
        return list(tokenizer(head + tail).input_ids)
    token_ids = list(tokenizer(head).input_ids)
    for text_piece in ["\n"] * (image_count - 1) + ["\n" + tail]:
        token_ids += [IMAGE_TOKEN_ID, *tokenizer(text_piece, add_special_tokens=False).input_ids]
    return token_ids


def format_header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def format_turn(role: str, text: str) -> str:
    return f"{format_header(role)}{text}{END_OF_TURN}"


def tokenize_request(tokenizer: PreTrainedTokenizerBase, message: MLLMMessage, config: VilaImageConfig) -> VilaRequest:
    """Return the model's input for a question, or for a request that is to be routed."""
    frames = [frame for media in message.media for frame in fit_frames(media, VilaVisualInput(config))[1]]
    token_ids = tokenize_chat(tokenizer, len(frames), message.text, message.system)
    check_request_length(len(token_ids), tokenizer.model_max_length)
    return VilaRequest(token_ids, normalize_frames(frames, config))


def tokenize_features(
    tokenizer: PreTrainedTokenizerBase, message: MLLMMessage, medium: Medium, config: VilaImageConfig
) -> VilaRequest:
    """Return the model's input for the hidden states of a request for an image or a video.

    Of a source, the model sees the first frame of the first medium.
    """
    frames = [fit_frames(media, VilaVisualInput(config))[1][0] for media in message.media[:1]]
    prefix = FEATURE_PREFIXES[medium] if not frames else VIDEO_MARK if medium == "video" else ""
    answer = GENERATION_TOKENS[medium]
    token_ids = tokenize_chat(tokenizer, len(frames), prefix + message.text, message.system, answer)
    check_request_length(len(token_ids), tokenizer.model_max_length)
    return VilaRequest(token_ids, normalize_frames(frames, config))


def find_routing_ids(tokenizer: PreTrainedTokenizerBase) -> dict[Medium, int]:
    """Return the token ids by which an answer requests an image or a video.

    They are the tokens of these names, or else the two reserved tokens of Llama 3. Raises LookupError if the tokenizer
    has neither.
    """
    vocabulary, routing_ids = tokenizer.get_vocab(), {}
    for medium, name in GENERATION_TOKENS.items():
        token_id = vocabulary.get(name, RESERVED_TOKEN_IDS[medium])
        if tokenizer.convert_ids_to_tokens(token_id) is None:
            raise LookupError(f"the tokenizer has neither {name} nor a token {RESERVED_TOKEN_IDS[medium]}")
        routing_ids[medium] = token_id
    return routing_ids


def get_padding_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token id that is masked: that of padding, or of the end if there is no padding."""
    token_id: int | None = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return token_id


def list_stop_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the token ids that end an answer: those of the turn's end and of the text's end."""
    token_ids = (tokenizer.convert_tokens_to_ids(END_OF_TURN), tokenizer.eos_token_id)
    return {token_id for token_id in token_ids if token_id is not None}


def read_route(
    token_ids: Iterable[int],
    probabilities: Iterable[Mapping[Medium, float]],
    routing_ids: Mapping[Medium, int],
    media: Sequence[Medium],
) -> Route:
    """Return the route of an answer, given the probabilities of the two routing tokens at each of its positions.

    A routing token anywhere in the answer requests an image or a video; with a source, one like the source. The
    probability of a text is that of no routing token at any position. That of an image or a video is the probability
    of its token, times that of no routing token before it. Nothing is read after a routing token.
    """
    text_probability = 1.0
    for token_id, position_probabilities in zip(token_ids, probabilities, strict=False):
        for medium, routing_id in routing_ids.items():
            if token_id == routing_id:
                kind = medium if not media else "video" if "video" in media else "image"
                return Route(kind=kind, probability=text_probability * position_probabilities[medium])
        text_probability *= 1 - sum(position_probabilities.values())
    return Route(kind="text", probability=text_probability)
