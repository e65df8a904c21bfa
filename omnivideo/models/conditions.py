"""The decoder's condition: visual context, visual tokens and text, each between two markers.

    c = [<img_st> h <img_ed> || <ipl_st> v <ipl_ed> || <prp_st> t <prp_ed> || zeros]

`h` is the source's visual context (editing mode only), `v` the adapter's tokens, `t` the text.  The order is the
released code's; the paper writes v, h, t (section 3.3).  A part that is absent takes its markers with it.
Shapes: B batch, L tokens, D the decoder's text width.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from omnivideo.errors import ConditionTooLong

MARKERS = ("img_st", "img_ed", "ipl_st", "ipl_ed", "prp_st", "prp_ed")


class Markers(nn.Module):
    """Six learned embeddings [n, D], one token each unless `lengths` says otherwise, as for published weights."""

    def __init__(self, dim: int, lengths: Mapping[str, int] | None = None):
        super().__init__()
        for name in MARKERS:
            rows = (lengths or {}).get(name, 1)
            self.register_parameter(name, nn.Parameter(torch.randn(rows, dim) * 0.02))


def assemble(
    markers: Markers,
    texts_LD: Sequence[Tensor],
    visual_LD: Sequence[Tensor | None],
    context_LD: Sequence[Tensor | None],
    least: int,
    most: int,
) -> Tensor:
    """The conditions [B, L, D] of a batch, zero-padded to the longest and to `least` tokens.

    Raises ConditionTooLong above `most`: nothing is ever cut.
    """
    # All tokens once, then one gather: a kernel for each part of each row is what a GPU would wait for.
    pool = [texts_LD[0].new_zeros(1, texts_LD[0].shape[-1])]  # the padding
    used = 1

    def put(tokens: Tensor) -> range:
        nonlocal used
        pool.append(tokens.to(pool[0]))
        used += len(tokens)
        return range(used - len(tokens), used)

    marker = {name: put(getattr(markers, name)) for name in MARKERS}
    rows: list[list[int]] = []
    for text, visual, context in zip(texts_LD, visual_LD, context_LD, strict=True):
        row: list[int] = []
        for kind, tokens in (("img", context), ("ipl", visual), ("prp", text)):
            if tokens is not None:
                row += (*marker[f"{kind}_st"], *put(tokens), *marker[f"{kind}_ed"])
        check_length(len(row), most)
        rows.append(row)
    longest = max(least, *map(len, rows))
    at = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=pool[0].device)
    return nn.functional.embedding(at, torch.cat(pool))


def count_tokens(markers: Markers, text: int, visual: int | None, context: int | None) -> int:
    """How many tokens a sample's condition has, by those of its parts (None: absent), before it is padded."""
    parts = (("prp", text), ("ipl", visual), ("img", context))
    return sum(
        count + len(getattr(markers, f"{kind}_st")) + len(getattr(markers, f"{kind}_ed"))
        for kind, count in parts if count is not None
    )  # fmt: skip


def pad(tokens: Tensor, least: int, most: int) -> Tensor:
    """[..., L, D] with zeros up to `least` tokens."""
    length = tokens.shape[-2]
    check_length(length, most)
    return nn.functional.pad(tokens, (0, 0, 0, max(0, least - length)))


def check_length(length: int, most: int) -> None:
    if length > most:
        raise ConditionTooLong("prompt", f"the condition has {length} tokens; the decoder takes 1 to {most}")


def encode_text(
    tokenizer: PreTrainedTokenizerBase, encoder: UMT5EncoderModel, prompts: Sequence[str], most: int
) -> tuple[Tensor, Tensor]:
    """Text embeddings [B, L, D], zero past the end of each prompt, and the prompts' lengths [B].

    Raises ConditionTooLong where a prompt has more than `most` tokens.
    """
    tokens = tokenizer(list(prompts), padding=True, return_tensors="pt", verbose=False)
    ids, mask = (tokens[name].to(encoder.device) for name in ("input_ids", "attention_mask"))
    check_words(ids.shape[1], most)
    hidden = encoder(ids, attention_mask=mask).last_hidden_state
    return hidden * mask[..., None].to(hidden), mask.sum(1)


def check_words(count: int, most: int) -> None:
    if count > most:
        raise ConditionTooLong("prompt", f"it has {count} tokens; the text encoder takes 1 to {most}")
