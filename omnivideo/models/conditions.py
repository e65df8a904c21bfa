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

    def around(self, kind: str, tokens_LD: Tensor) -> list[Tensor]:
        """The tokens between their two markers, as parts to concatenate."""
        start, end = (getattr(self, f"{kind}_{side}").to(tokens_LD) for side in ("st", "ed"))
        return [start, tokens_LD, end]


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
    rows = []
    for text, visual, context in zip(texts_LD, visual_LD, context_LD, strict=True):
        parts: list[Tensor] = []
        for kind, tokens in (("img", context), ("ipl", visual), ("prp", text)):
            if tokens is not None:
                parts += markers.around(kind, tokens)
        rows.append(torch.cat(parts))
    longest = max(least, *(len(row) for row in rows))
    return torch.stack([pad(row, longest, most) for row in rows])


def pad(tokens: Tensor, least: int, most: int) -> Tensor:
    """[..., L, D] with zeros up to `least` tokens."""
    length = tokens.shape[-2]
    if length > most:
        raise ConditionTooLong("prompt", f"the condition has {length} tokens; the decoder takes 1 to {most}")
    return nn.functional.pad(tokens, (0, 0, 0, max(0, least - length)))


def encode_text(
    tokenizer: PreTrainedTokenizerBase, encoder: UMT5EncoderModel, prompts: Sequence[str], most: int
) -> tuple[Tensor, Tensor]:
    """Text embeddings [B, L, D], zero past the end of each prompt, and the prompts' lengths [B].

    Raises ConditionTooLong where a prompt has more than `most` tokens.
    """
    tokens = tokenizer(list(prompts), padding=True, return_tensors="pt", verbose=False)
    ids, mask = (tokens[name].to(encoder.device) for name in ("input_ids", "attention_mask"))
    if ids.shape[1] > most:
        raise ConditionTooLong("prompt", f"it has {ids.shape[1]} tokens; the text encoder takes 1 to {most}")
    hidden = encoder(ids, attention_mask=mask).last_hidden_state
    return hidden * mask[..., None].to(hidden), mask.sum(1)
