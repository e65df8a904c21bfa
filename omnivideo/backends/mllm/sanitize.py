"""A user's words as nothing but words: no special token of the tokenizer is left in them.

A request is written into one string with the marks of the chat around it, and the tokenizer finds its special tokens
anywhere in that.  A user who types one (`<BOI>`, `<|im_end|>`, `<think>`) would steer the model past its own decision;
with an invisible character after its first one it is text.
"""

import re
from collections.abc import Iterable
from functools import lru_cache

ZERO_WIDTH_SPACE = "\u200b"  # zero width space


@lru_cache(maxsize=8)
def compile_token_pattern(special_tokens: frozenset[str]) -> re.Pattern[str]:
    # The longest first: of two that begin alike, the tokenizer takes the longer one too.
    return re.compile("|".join(re.escape(one) for one in sorted(special_tokens, key=len, reverse=True)))


def sanitize_text(text: str, special_tokens: Iterable[str]) -> str:
    """The text with every one of `specials` broken after its first character; other texts are left as they are.

    A special token of one character is not taken for one: there is nothing to break.
    """
    breakable_tokens = frozenset(one for one in special_tokens if len(one) > 1)
    if not breakable_tokens or not compile_token_pattern(breakable_tokens).search(text):
        return text
    broken = compile_token_pattern(breakable_tokens).sub(
        lambda match: match[0][0] + ZERO_WIDTH_SPACE + match[0][1:], text
    )
    return sanitize_text(broken, breakable_tokens)  # two may overlap: the second was behind the first one's end


def list_special_tokens(tokenizer: object) -> frozenset[str]:
    """What a Hugging Face tokenizer takes for one token wherever it stands."""
    return frozenset(tokenizer.get_added_vocab())  # type: ignore[attr-defined]
