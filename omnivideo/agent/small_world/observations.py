"""What a text says of what there is, and asks for nothing: "it looks more like purple to me"."""

import re
from collections.abc import Sequence

from omnivideo.agent.small_world import talk
from omnivideo.agent.small_world.lexicon import Token, normalize_text, tokenize
from omnivideo.agent.small_world.wordings import load_pattern

SEEMING = ("looks", "look", "seems", "seem", "appears", "appear")
COPULAS = ("is", "are", *SEEMING)
# Words before the subject, and between it and the verb.
LEADS = {
    "hm", "hmm", "no", "nope", "but", "so", "well", "ah", "oh", "hey", "sorry", "and", "wait", "now", "ok", "okay",
    "um", "er", "honestly", "i", "think", "guess", "actually", "strange", "odd", "funny", ",", "to", "me", "my", "yes",
}  # fmt: skip
ADVERBS = {"really", "actually", "still", "now", "just", "clearly", "definitely", "rather", "also", "one", "ones"}
# Words of a wish: what they stand in is not only said of what there is.
WISHES = {
    "should", "must", "supposed", "meant", "mean", "want", "wanted", "need", "needs", "needed", "instead", "please",
    "better", "nicer", "missing", "asked", "said", "prefer", "preferred", "like it", "wish", "could", "would", "can",
    "ought", "has", "have", "to be", "fine", "allowed", "required", "wrong", "keep", "leave", "same", "if", "then",
    "perfect", "great", "nice", "good", "lovely", "beautiful", "enough", "first", "second", "third", "last",
}  # fmt: skip
CLAUSE_MARK = re.compile(r"[,.;:!]")
DENIAL = re.compile(r"(?:and |but |so )?not (?:an? |the |really )?[\w-]+(?: one| at all)?")


def is_statement(text: str) -> bool:
    """Return whether a text says what there is, such as "so it is a red circle", and asks for nothing."""
    normalized = re.sub(r"(?<![ ,])[ ,]++(?:but|and|so)$", "", normalize_text(text).strip(" .!"))
    if load_pattern("correction").match(normalized) or talk.find_praise(text, has_result=True):
        return False
    if talk.find_praise(normalized, has_result=True):
        return True  # "it is a nice star but"
    return load_pattern("statement").fullmatch(normalized) is not None


def is_observation(text: str) -> bool:
    """Return whether all clauses say what a thing is or looks like, such as "hm, that is purple, not blue"."""
    normalized = normalize_text(text).strip(" .!")
    if normalized.endswith("?"):
        return False
    clauses = [clause.strip() for clause in CLAUSE_MARK.split(normalized)]
    said = [clause for clause in clauses if any(token.text not in LEADS for token in tokenize(clause))]
    claims = [clause for clause in said if not DENIAL.fullmatch(clause)]
    return bool(claims) and all(is_claim(tokenize(clause)) for clause in claims)


def is_claim(tokens: Sequence[Token]) -> bool:
    """Return whether a clause has a thing that is there, a copula and a value, and no word of a wish."""
    if any(token.text in WISHES or token.has("make", "add", "remove", "replace", "draw", "put") for token in tokens):
        return False
    rest = list(tokens)
    while rest and rest[0].text in LEADS:
        del rest[0]
    subject = 0
    if rest and rest[0].has("reference"):
        subject = 1
    elif rest and rest[0].text in ("the", "its", "these", "those"):
        subject = 1
        while subject < len(rest) and rest[subject].has("shape", "plural", "colour", "size", "thing", "ground"):
            subject += 1
        subject = subject if subject > 1 else 0
    rest = rest[subject:]
    while subject and rest and rest[0].text in ADVERBS:
        del rest[0]
    is_said = bool(subject and len(rest) > 1 and rest[0].text in COPULAS)
    return is_said and any(token.has("colour", "shape", "plural") for token in rest)
