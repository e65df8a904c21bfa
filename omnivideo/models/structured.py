"""Constrain an answer to a JSON schema: before each token, those that cannot continue valid JSON are excluded.

vLLM's server is started with the same library (llguidance) and the same settings, so both engines write the same text.
Shapes: V vocabulary.
"""

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from omnivideo.errors import InvalidInput

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

GRAMMAR_DEFAULTS: "JsonCompileOptions" = {"whitespace_flexible": False}  # vLLM's disable_any_whitespace


@lru_cache(maxsize=4)
def build_token_table(tokenizer: Any, num_logits: int) -> Any:
    """Return the tokenizer as llguidance needs it; that takes about a second for a large vocabulary."""
    import llguidance.hf

    return llguidance.hf.from_tokenizer(tokenizer, n_vocab=max(num_logits, len(tokenizer)))


class SchemaConstraint:
    """The state of one answer that must be valid JSON of a schema. Special tokens never match, except the end token.

    Raises InvalidInput for a schema that cannot be enforced.
    """

    def __init__(self, tokenizer: Any, num_logits: int, json_schema: str):
        import llguidance

        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json.loads(json_schema), defaults=GRAMMAR_DEFAULTS)
        except ValueError as error:
            raise InvalidInput("json_schema", f"it is not JSON: {error}") from None
        self.matcher = llguidance.LLMatcher(build_token_table(tokenizer, num_logits), grammar)
        if self.matcher.is_error():
            raise InvalidInput("json_schema", self.matcher.get_error().splitlines()[0])

    def mask_logits(self, logits_V: Tensor) -> Tensor:
        """Return the logits with those of the excluded tokens at minus infinity."""
        bits = np.unpackbits(np.frombuffer(self.matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed_V = torch.from_numpy(bits[: len(logits_V)].astype(bool)).to(logits_V.device)
        return logits_V.masked_fill(~allowed_V, -torch.inf)

    def accept_token(self, token_id: int) -> None:
        accepted = self.matcher.consume_token(token_id)
        assert accepted, "the token was excluded"
