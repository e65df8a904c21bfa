"""Choose among fixed answers by their likelihoods, for an MLLM without routing tokens.

The answers form a tree of tokens. Wherever it branches, the model's probabilities are normalised over the branches; an
answer's probability is the product along its path. So the probabilities of all answers add up to 1, nothing is sampled,
and most tokenizers need one forward pass, because the answers differ in their first token. transformers and vLLM give
the same result, since `score_choices` leaves the model's part to its caller.
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BranchQuery:
    """A question to the model: the log probabilities of `token_ids` as the next token after `prefix_ids`."""

    prefix_ids: tuple[int, ...]
    token_ids: tuple[int, ...]


def score_choices(choices: Sequence[Sequence[int]]) -> Generator[BranchQuery, Sequence[float], list[float]]:
    """Yield what the model must be asked, take its log probabilities, and return the probability of each choice.

    Every choice ends in a token that no other choice has at that place, such as the end token.
    """
    probabilities = [1.0] * len(choices)
    prefixes: list[tuple[int, ...]] = [()]
    while prefixes:
        prefix = prefixes.pop()
        matching = [index for index, ids in enumerate(choices) if tuple(ids[: len(prefix)]) == prefix]
        branches = sorted({choices[index][len(prefix)] for index in matching if len(choices[index]) > len(prefix)})
        if len(matching) < 2 or not branches:
            continue
        if len(branches) > 1:
            logprobs = yield BranchQuery(prefix, tuple(branches))
            shares = normalize_logprobs(logprobs)
            for index in matching:
                probabilities[index] *= shares[branches.index(choices[index][len(prefix)])]
        prefixes += [(*prefix, token_id) for token_id in branches]
    return probabilities


def normalize_logprobs(logprobs: Sequence[float]) -> list[float]:
    """Return the probabilities of these values alone."""
    highest = max(logprobs)
    weights = [math.exp(value - highest) for value in logprobs]
    return [weight / sum(weights) for weight in weights]
