"""The decoder's condition: its parts in the preset's order, each between two markers if it has any, then zeros.

    version 1   <img_st> source <img_ed> || <ipl_st> visual <ipl_ed> || <prp_st> text <prp_ed> || zeros
    version 2   hidden || <prp_st> text <prp_ed> || <img_st> source <img_ed> || zeros

`source` is the visual context of an edit's source, `visual` the adapter's tokens, `hidden` the projected hidden states
of the MLLM. The order of version 1 is that of the released code; the paper writes visual, source, text (section 3.3).
If a part is absent, so are its markers. The zeros are attended to, so their number matters.
Shapes: B batch, L tokens, D text width of the decoder.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.models.umt5.modeling_umt5 import UMT5EncoderModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from omnivideo.errors import ConditionTooLong
from omnivideo.models.bridge import sample_parameter
from omnivideo.models.text_limits import clean_text
from omnivideo.presets import ConditionConfig, ConditionPart, TextConfig

ConditionTokens = Mapping[ConditionPart, Tensor]  # the tokens [L, D] of each part of one condition


class MarkerEmbeddings(nn.Module):
    """Learned markers [n, D] by name; n is 1 unless `lengths` gives another value, as it does for published weights.

    Markers of length 0 stand for weights without any.
    """

    def __init__(self, dim: int, names: Sequence[str], lengths: Mapping[str, int] | None = None):
        super().__init__()
        for name in names:
            rows = (lengths or {}).get(name, 1)
            self.register_parameter(name, sample_parameter(rows, dim))

    @classmethod
    def without_rows(cls, dim: int, names: Sequence[str]) -> "MarkerEmbeddings":
        """Return the markers of weights without any."""
        return cls(dim, names, dict.fromkeys(names, 0))


def assemble_conditions(
    config: ConditionConfig, markers: MarkerEmbeddings, rows: Sequence[ConditionTokens], dtype: torch.dtype
) -> Tensor:
    """Return the conditions [B, L, D] of a batch, zero-padded to the longest of them and to at least `min_tokens`.

    A condition of more than `max_tokens` loses its end if the preset says so; otherwise it raises ConditionTooLong.
    """
    # Concatenate all tokens once and gather the rows from them: launching a kernel for every part of every row would
    # leave a GPU idle.
    first = next(iter(rows[0].values()))
    pool = [torch.zeros(1, first.shape[-1], dtype=dtype, device=first.device)]  # index 0 is the padding
    pool_length = 1

    def add_to_pool(tokens_LD: Tensor) -> range:
        nonlocal pool_length
        pool.append(tokens_LD.to(pool[0]))
        pool_length += len(tokens_LD)
        return range(pool_length - len(tokens_LD), pool_length)

    marker = {name: add_to_pool(getattr(markers, name)) for name in config.marker_names}
    indices: list[list[int]] = []
    for row in rows:
        row_indices: list[int] = []
        for part in config.parts:
            if part in row:
                name = config.markers.get(part)
                start, end = (marker[f"{name}_st"], marker[f"{name}_ed"]) if name else (range(0), range(0))
                row_indices += (*start, *add_to_pool(row[part]), *end)
        if config.overflow == "refuse":
            check_condition_length(len(row_indices), config.max_tokens)
        indices.append(row_indices[: config.max_tokens])
    longest = max(config.min_tokens, *map(len, indices))
    indices_BL = torch.tensor([row + [0] * (longest - len(row)) for row in indices], device=first.device)
    return nn.functional.embedding(indices_BL, torch.cat(pool))


def zip_condition_parts(columns: Mapping[ConditionPart, Sequence[Tensor | None]]) -> list[ConditionTokens]:
    """Return the parts of each condition of a batch from one column for each part; None is an absent part."""
    rows: list[dict[ConditionPart, Tensor]] = [{} for _ in next(iter(columns.values()))]
    for part, column in columns.items():
        for row, tokens_LD in zip(rows, column, strict=True):
            if tokens_LD is not None:
                row[part] = tokens_LD
    return list(rows)


def count_condition_tokens(
    config: ConditionConfig, markers: MarkerEmbeddings, counts: Mapping[ConditionPart, int]
) -> int:
    """Return the number of tokens of a condition before padding, from those of its parts."""
    total = sum(counts.values())
    for part in counts:
        if name := config.markers.get(part):
            total += len(getattr(markers, f"{name}_st")) + len(getattr(markers, f"{name}_ed"))
    return total


def pad_condition(tokens_BLD: Tensor, min_tokens: int, max_tokens: int) -> Tensor:
    """Return [B, L, D] padded with zeros to at least `min_tokens` tokens; raise ConditionTooLong."""
    length = tokens_BLD.shape[-2]
    check_condition_length(length, max_tokens)
    return nn.functional.pad(tokens_BLD, (0, 0, 0, max(0, min_tokens - length)))


def check_condition_length(length: int, max_tokens: int) -> None:
    if length > max_tokens:
        raise ConditionTooLong("prompt", f"the condition has {length} tokens; the decoder takes 1 to {max_tokens}")


# ---------------------------------------------------------------- text


def encode_text(
    tokenizer: PreTrainedTokenizerBase,
    encoder: UMT5EncoderModel,
    prompts: Sequence[str],
    config: TextConfig,
    field: str = "prompt",
) -> tuple[Tensor, Tensor]:
    """Return text embeddings [B, L, D], which are zero after the end of each prompt, and the prompts' lengths [B].

    A prompt of more than `max_tokens` tokens is cut, or raises ConditionTooLong, as the preset says.
    """
    tokens = tokenize_prompts(tokenizer, prompts, config, field)
    ids_BL, mask_BL = (tokens[name].to(encoder.device) for name in ("input_ids", "attention_mask"))
    hidden_BLD = encoder(ids_BL, attention_mask=mask_BL).last_hidden_state
    return hidden_BLD * mask_BL[..., None].to(hidden_BLD), mask_BL.sum(1)


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], config: TextConfig, field: str = "prompt"
) -> dict[str, Tensor]:
    """Return the token ids [B, L] of prompts and their attention mask; raise ConditionTooLong with their field."""
    texts = [clean_text(prompt) for prompt in prompts] if config.clean else list(prompts)
    options = {"truncation": True, "max_length": config.max_tokens} if config.overflow == "cut" else {}
    tokens = tokenizer(texts, padding=True, return_tensors="pt", verbose=False, **options)
    check_prompt_length(tokens["input_ids"].shape[1], config, field)
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


def check_prompt_length(count: int, config: TextConfig, field: str) -> None:
    if count > config.max_tokens and config.overflow == "refuse":
        raise ConditionTooLong(field, f"it has {count} tokens; the text encoder takes 1 to {config.max_tokens}")
