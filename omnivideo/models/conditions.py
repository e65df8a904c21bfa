"""The decoder's condition: visual context, visual tokens and text, each between two markers.

    c = [<img_st> h <img_ed> || <ipl_st> v <ipl_ed> || <prp_st> t <prp_ed> || zeros]

`h` is the source's visual context (editing mode only), `v` the adapter's tokens, `t` the text.  The order is the
released code's; the paper writes v, h, t (section 3.3).  A part that is absent takes its markers with it.
Shapes: B batch, L tokens, D the decoder's text width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from omnivideo.errors import ConditionTooLong

MARKERS = ("img_st", "img_ed", "ipl_st", "ipl_ed", "prp_st", "prp_ed")


class Markers(nn.Module):
    """Six learned embeddings [1, D]."""

    def __init__(self, dim: int):
        super().__init__()
        for name in MARKERS:
            self.register_parameter(name, nn.Parameter(torch.randn(1, dim) * 0.02))

    def around(self, kind: str, tokens_BLD: Tensor) -> list[Tensor]:
        """The tokens between their two markers, as parts to concatenate."""
        batch = len(tokens_BLD)
        start, end = (getattr(self, f"{kind}_{side}").expand(batch, 1, -1) for side in ("st", "ed"))
        return [start.to(tokens_BLD), tokens_BLD, end.to(tokens_BLD)]


@dataclass(frozen=True)
class Condition:
    """The parts of a batch: text [B, L, D] always, visual tokens and visual context [B, L, D] where there are any."""

    text: Tensor
    visual: Tensor | None = None
    context: Tensor | None = None


def assemble(markers: Markers, condition: Condition, least: int, most: int) -> Tensor:
    """The condition [B, L, D], zero-padded to `least` tokens.

    Raises ConditionTooLong above `most`: nothing is ever cut.
    """
    parts: list[Tensor] = []
    for kind, tokens in (("img", condition.context), ("ipl", condition.visual), ("prp", condition.text)):
        if tokens is not None:
            parts += markers.around(kind, tokens)
    return pad(torch.cat(parts, dim=1), least, most)


def pad(tokens_BLD: Tensor, least: int, most: int) -> Tensor:
    length = tokens_BLD.shape[1]
    if length > most:
        raise ConditionTooLong("prompt", f"the condition has {length} tokens; the decoder takes 1 to {most}")
    return nn.functional.pad(tokens_BLD, (0, 0, 0, max(0, least - length)))


def encode_text(
    tokenizer: PreTrainedTokenizerBase, encoder: UMT5EncoderModel, prompts: list[str], most: int
) -> Tensor:
    """Text embeddings [B, L, D], L the longest prompt's length; zero past the end of each prompt.

    Raises ConditionTooLong where a prompt has more than `most` tokens.
    """
    tokens = tokenizer(prompts, padding=True, return_tensors="pt")
    ids, mask = (tokens[name].to(encoder.device) for name in ("input_ids", "attention_mask"))
    if ids.shape[1] > most:
        raise ConditionTooLong("prompt", f"it has {ids.shape[1]} tokens; the text encoder takes 1 to {most}")
    hidden = encoder(ids, attention_mask=mask).last_hidden_state
    return hidden * mask[..., None].to(hidden)
