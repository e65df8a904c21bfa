"""Count the tokens of a request's texts as its models will, in milliseconds and before any model is loaded.

A prompt goes to the decoder's text encoder and to the MLLM, everything else to the MLLM alone. This module needs only
the tokenizers of a folder of weights. Without a folder, as in an API process whose models are on other machines, texts
are counted where the models are.
"""

import json
from functools import cached_property
from html import unescape
from pathlib import Path
from typing import TYPE_CHECKING

from omnivideo.contracts import (
    SamplingParams,
    check_prompt,
    count_source_tokens,
    count_visual_tokens,
)
from omnivideo.errors import TextTooLong
from omnivideo.presets import Preset

if TYPE_CHECKING:  # an API process whose models are on other machines has neither this nor ftfy
    from tokenizers import Tokenizer


def clean_text(text: str) -> str:
    """Return the text as Wan's encoder was trained on it: broken Unicode and HTML entities repaired, blanks joined."""
    from ftfy import fix_text

    return " ".join(unescape(unescape(fix_text(text))).split())


class TokenLimits:
    """The bounds of a preset's models for texts, in tokens (the port TextLimits)."""

    def __init__(self, preset: Preset, folder: Path | None):
        self.preset, self.folder = preset, folder

    def check_prompt(self, field: str, text: str, params: SamplingParams | None) -> str:
        """Return a prompt or an instruction without surrounding whitespace; raise InvalidInput if it is too long.

        Without `params`, the bounds are those that hold whatever the clip's size and source are.
        """
        text, parts = check_prompt(field, text), self.preset.condition.text_parts
        has_source = params is not None and count_source_tokens(self.preset, params) > 0
        if "prompt" in parts or ("instruction" in parts and has_source):
            room = self.preset.text.max_tokens if params is None else self.count_text_room(params)
            self.check_encoder_text(field, text, room)
        return self.check_message(field, text)

    def check_negative_prompt(self, field: str, text: str) -> None:
        """Raise InvalidInput if a negative prompt is longer than the text encoder takes."""
        if text and text != self.preset.null.negative_prompt:
            self.check_encoder_text(field, text, self.preset.text.max_tokens)

    def check_message(self, field: str, text: str) -> str:
        """Return a text for the MLLM without surrounding whitespace; raise InvalidInput if it is too long."""
        text = check_prompt(field, text)
        if self.folder is None:
            return text
        count, most = len(self.mllm_tokenizer.encode(text, add_special_tokens=False).ids), self.max_mllm_tokens
        if count > most:
            raise TextTooLong(field, f"it has {count} tokens; the language model takes 1 to {most}")
        return text

    def check_encoder_text(self, field: str, text: str, most: int) -> None:
        if self.folder is None:
            return
        count = len(self.encoder_tokenizer.encode(clean_text(text) if self.preset.text.clean else text).ids)
        if count > most:
            raise TextTooLong(field, f"it has {count} tokens; the text encoder takes 1 to {most}")

    def count_text_room(self, params: SamplingParams) -> int:
        """Return how many tokens of a prompt the decoder's condition holds."""
        condition = self.preset.condition
        if condition.overflow not in ("refuse", "text"):
            return self.preset.text.max_tokens
        used = self.count_marker_tokens() + count_visual_tokens(self.preset, params.frames)
        used += count_source_tokens(self.preset, params)
        return min(self.preset.text.max_tokens, condition.max_tokens - used)

    def count_marker_tokens(self) -> int:
        path = None if self.folder is None else self.folder / "markers" / "model.safetensors"
        if path is None or not path.is_file():
            return len(self.preset.condition.marker_names)
        from safetensors import safe_open  # API processes need not load it

        with safe_open(path, "numpy") as markers:
            return sum(markers.get_slice(name).get_shape()[0] for name in markers.keys())  # noqa: SIM118

    # ------------------------------------------------------------ the folder's tokenizers

    @property
    def mllm_folder(self) -> Path:
        assert self.folder is not None
        inner = self.folder / "mllm" / "llm"  # of a VILA
        return inner if inner.is_dir() else self.folder / "mllm"

    @cached_property
    def mllm_tokenizer(self) -> "Tokenizer":
        return load_tokenizer(self.mllm_folder)

    @cached_property
    def encoder_tokenizer(self) -> "Tokenizer":
        assert self.folder is not None
        return load_tokenizer(self.folder / "tokenizer")

    @cached_property
    def max_mllm_tokens(self) -> int:
        """The number of positions of the language model."""
        bounds = []
        for name, key in (("tokenizer_config.json", "model_max_length"), ("config.json", "max_position_embeddings")):
            path = self.mllm_folder / name
            fields = json.loads(path.read_text()) if path.is_file() else {}
            fields |= fields.get("text_config", {})
            bounds += [int(fields[key])] if fields.get(key) else []
        return min(bounds, default=1_000_000)


def load_tokenizer(folder: Path) -> "Tokenizer":
    """Load the tokenizer of a folder, which truncates nothing."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if path.is_file():
        tokenizer = Tokenizer.from_file(str(path))
    else:  # in an older format, which transformers converts
        from transformers.models.auto.tokenization_auto import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
