"""The decoder's condition: visual context, visual tokens and text, each between two markers.

    c = [<img_st> h <img_ed> || <ipl_st> v <ipl_ed> || <prp_st> t <prp_ed> || zeros]

`h` is the visual context of the source (editing only), `v` the adapter's tokens and `t` the text. The order is that
of the released code; the paper writes v, h, t (section 3.3). If a part is absent, so are its markers.
Shapes: B batch, L tokens, D text width of the decoder.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from omnivideo.errors import ConditionTooLong

MARKER_NAMES = ("img_st", "img_ed", "ipl_st", "ipl_ed", "prp_st", "prp_ed")


class MarkerEmbeddings(nn.Module):
    """Six learned markers [n, D]; n is 1 unless `lengths` gives another value, as it does for published weights."""

    def __init__(self, dim: int, lengths: Mapping[str, int] | None = None):
        super().__init__()
        for name in MARKER_NAMES:
            rows = (lengths or {}).get(name, 1)
            self.register_parameter(name, nn.Parameter(torch.randn(rows, dim) * 0.02))


def assemble_conditions(
    markers: MarkerEmbeddings,
    texts_LD: Sequence[Tensor],
    visual_LD: Sequence[Tensor | None],
    context_LD: Sequence[Tensor | None],
    min_tokens: int,
    max_tokens: int,
) -> Tensor:
    """Return the conditions [B, L, D] of a batch, zero-padded to the longest of them and to at least `min_tokens`.

    Raises ConditionTooLong if one of them has more than `max_tokens` tokens; nothing is ever truncated.
    """
    # Concatenate all tokens once and gather the rows from them: launching a kernel for every part of every row would
    # leave a GPU idle.
    pool = [texts_LD[0].new_zeros(1, texts_LD[0].shape[-1])]  # index 0 is the padding
    pool_length = 1

    def add_to_pool(tokens_LD: Tensor) -> range:
        nonlocal pool_length
        pool.append(tokens_LD.to(pool[0]))
        pool_length += len(tokens_LD)
        return range(pool_length - len(tokens_LD), pool_length)

    marker = {name: add_to_pool(getattr(markers, name)) for name in MARKER_NAMES}
    rows: list[list[int]] = []
    for text, visual, context in zip(texts_LD, visual_LD, context_LD, strict=True):
        row: list[int] = []
        for kind, tokens in (("img", context), ("ipl", visual), ("prp", text)):
            if tokens is not None:
                row += (*marker[f"{kind}_st"], *add_to_pool(tokens), *marker[f"{kind}_ed"])
        check_condition_length(len(row), max_tokens)
        rows.append(row)
    longest = max(min_tokens, *map(len, rows))
    indices_BL = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=pool[0].device)
    return nn.functional.embedding(indices_BL, torch.cat(pool))


def count_condition_tokens(
    markers: MarkerEmbeddings, text_tokens: int, visual_tokens: int | None, context_tokens: int | None
) -> int:
    """Return the number of tokens of a condition before padding; None stands for an absent part."""
    parts = (("prp", text_tokens), ("ipl", visual_tokens), ("img", context_tokens))
    return sum(
        count + len(getattr(markers, f"{kind}_st")) + len(getattr(markers, f"{kind}_ed"))
        for kind, count in parts if count is not None
    )  # fmt: skip


def pad_condition(tokens_BLD: Tensor, min_tokens: int, max_tokens: int) -> Tensor:
    """Return [B, L, D] padded with zeros to at least `min_tokens` tokens; raise ConditionTooLong."""
    length = tokens_BLD.shape[-2]
    check_condition_length(length, max_tokens)
    return nn.functional.pad(tokens_BLD, (0, 0, 0, max(0, min_tokens - length)))


def check_condition_length(length: int, max_tokens: int) -> None:
    if length > max_tokens:
        raise ConditionTooLong("prompt", f"the condition has {length} tokens; the decoder takes 1 to {max_tokens}")


def encode_text(
    tokenizer: PreTrainedTokenizerBase, encoder: UMT5EncoderModel, prompts: Sequence[str], max_tokens: int
) -> tuple[Tensor, Tensor]:
    """Return text embeddings [B, L, D], which are zero after the end of each prompt, and the prompts' lengths [B].

    Raises ConditionTooLong if a prompt has more than `max_tokens` tokens.
    """
    tokens = tokenizer(list(prompts), padding=True, return_tensors="pt", verbose=False)
    ids_BL, mask_BL = (tokens[name].to(encoder.device) for name in ("input_ids", "attention_mask"))
    check_prompt_length(ids_BL.shape[1], max_tokens)
    hidden_BLD = encoder(ids_BL, attention_mask=mask_BL).last_hidden_state
    return hidden_BLD * mask_BL[..., None].to(hidden_BLD), mask_BL.sum(1)


def check_prompt_length(count: int, max_tokens: int) -> None:
    if count > max_tokens:
        raise ConditionTooLong("prompt", f"it has {count} tokens; the text encoder takes 1 to {max_tokens}")
