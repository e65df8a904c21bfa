"""Keep special tokens out of a user's text.

A request becomes one string with the chat markup around it, and the tokenizer finds its special tokens anywhere in
that string. A user who types one (`<BOI>`, `<|im_end|>`, `<think>`) could override the model's own decision. An
invisible character after the token's first character turns it into ordinary text.
"""

import re
from collections.abc import Iterable
from functools import lru_cache

ZERO_WIDTH_SPACE = "\u200b"


@lru_cache(maxsize=8)
def compile_token_pattern(special_tokens: frozenset[str]) -> re.Pattern[str]:
    # Longest first: if two tokens begin alike, the tokenizer takes the longer one too.
    by_length = sorted(special_tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, by_length)))


def sanitize_text(text: str, special_tokens: Iterable[str]) -> str:
    """Return the text with every special token broken after its first character. Other texts stay as they are.

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
    """Return the strings that a Hugging Face tokenizer maps to one token wherever they stand."""
    return frozenset(tokenizer.get_added_vocab())  # type: ignore[attr-defined]
