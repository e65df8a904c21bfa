"""What the words of a turn say about its shape: the acts in it, what they refer to, whether to think first.

Plain text analysis, the same for the same words.  What the request means is the model's to say; this only finds
which picture or clip it should be shown.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from omnivideo.contracts import Artifact, Medium

ORDERS = (
    "make", "turn", "paint", "change", "recolour", "recolor", "add", "put", "draw", "remove", "delete", "erase",
    "take", "get", "set", "use", "replace", "transform", "generate", "create", "show", "let", "have", "go", "return",
    "switch", "give",
)  # fmt: skip
ASKS = ("how", "what", "which", "where", "who", "why", "when", "is", "are", "does", "do", "tell", "describe", "count",
        "caption", "say", "explain")  # fmt: skip
START = "|".join((*ORDERS, *ASKS))
LEADS = r"(?:and|then|now|also|next|finally|afterwards|after that|ok|okay|so|but|please)"
NUMBER = r"(?:an?|one|two|three|four|five|six|some|several|another|as many|half|twice|\d+)"

BOUNDARY = re.compile(
    rf"(?<=[.!?])\s+(?=\S)|\s*;\s*|\s*,?\s+(?:and\s+)?(?:then|afterwards|after that)\s+(?={LEADS}|{START})"
    rf"|\s*,\s*(?:and\s+)?(?={LEADS}?\s*(?:{START})\b)|\s+and\s+(?=(?:{START}|now)\b)",
    re.IGNORECASE,
)
POLITE = re.compile(
    rf"^(?:{LEADS}[\s,]+|(?:can|could|would|will) you (?!see\b)(?:please )?"
    r"|tell me\s+(?=how|what|which|where|who|why))+",
    re.IGNORECASE,
)
# A new thing is asked for: "a red star", "draw two circles", "i want a clip of ...".
FRESH = re.compile(
    rf"^(?:(?:make|draw|show|generate|create|give|produce)(?: me| us)?\s+|i (?:want|need|would like)(?: to see)?\s+)?"
    rf"(?:{NUMBER}\b|(?:pictures?|images?|photos?|videos?|clips?|animations?|footage) of\b)",
    re.IGNORECASE,
)
CHANGE = re.compile(
    r"^(?:make|turn|paint|change|recolou?r|add|put|remove|delete|erase|take away|get rid of|set|use|replace|transform"
    r"|let|have|now)\b",
    re.IGNORECASE,
)
ASKING = re.compile(rf"^(?:{'|'.join(ASKS)}|can you see|do you see)\b|\?\s*$", re.IGNORECASE)
POINTING = re.compile(r"\b(?:it|its|them|they|there|this|these|those|you see|the)\b", re.IGNORECASE)
PRONOUN = re.compile(r"\b(?:it|its|them|they|this|these|those)\b", re.IGNORECASE)

MEDIA: dict[str, Medium | None] = {
    "clip": "video", "video": "video", "animation": "video", "movie": "video", "picture": "image", "image": "image",
    "still": "image", "photo": "image", "drawing": "image", "one": None, "result": None, "version": None,
}  # fmt: skip
ORDINALS = {
    "first": 0, "second": 1, "third": 2, "fourth": 3, "fifth": 4, "sixth": 5, "seventh": 6, "eighth": 7, "ninth": 8,
    "tenth": 9, "last": -1, "latest": -1, "newest": -1, "previous": -2,
}  # fmt: skip
BY_NUMBER = re.compile(rf"\bthe ({'|'.join(ORDINALS)}) ({'|'.join(MEDIA)})\b", re.IGNORECASE)
BACK = re.compile(r"\b(?:go|return|switch|come) back to (?:the |my |that )?(.+)$|^undo\b", re.IGNORECASE)
LOOKS = r"((?:(?!(?:the|in|of|on|is|are|to|does|this|and)\b)[\w-]+ ){1,3})"
BY_LOOKS = re.compile(
    rf"\b(?:in|use|open) the {LOOKS}({'|'.join(MEDIA)})\b"
    rf"|\bthe {LOOKS}({'|'.join(name for name in MEDIA if name not in ('one', 'still'))})\b",
    re.IGNORECASE,
)
EMPTY = {"the", "a", "an", "one", "ones", "with", "of", "and", "my", "that", "again", "please", *MEDIA}

# What is meant must first be worked out: a comparison, a description in place of a name, a sum in words.
INDIRECT = re.compile(
    r"(?<!would )\blike\b|\bcolou?rs? of\b|\bas \w+(?: \w+)? as\b|\bas many\b|\b(?:more|less|fewer) than\b"
    r"|\b(?:half|twice|double|pairs?)\b|\bwhose\b|\bsomething\b|\bsomeone\b|\bopposite\b|\bremind"
    r"|\ban? (?:\w+ )?shape\b|\bshapes? (?:with|that|without|you)\b|,\s*(?:it|they)\b|\bthe (?:number|amount) of\b",
    re.IGNORECASE,
)


def acts(text: str) -> list[str]:
    """The separate things that a turn asks for, in order, each without the words that join it to the others."""
    pieces = [POLITE.sub("", piece.strip(" ,;")).strip(" ,;.!") for piece in BOUNDARY.split(text)]
    return [piece for piece in pieces if piece] or [text.strip()]


def is_indirect(text: str) -> bool:
    """Whether a request names things by description, or says too little, so that thinking first should pay."""
    alone = len(text.split()) < 2 and text.isascii()  # not every script puts blanks between words
    return bool(INDIRECT.search(text)) or alone


def changes(text: str) -> bool:
    """Whether it tells to change something that is there, rather than to draw something new."""
    return bool(CHANGE.match(text)) and not FRESH.match(text)


def points(text: str) -> bool:
    """Whether the words are about something that is already there."""
    if FRESH.match(text):
        return False
    return changes(text) or bool(PRONOUN.search(text)) or bool(ASKING.search(text) and POINTING.search(text))


@dataclass(frozen=True)
class Named:
    """An artifact by its place in the conversation, `None` where there is none there."""

    artifact: Artifact | None
    words: str


def by_number(text: str, artifacts: Sequence[Artifact]) -> Named | None:
    """ "the second clip": the artifact that an ordinal names; None where no ordinal is said."""
    found = BY_NUMBER.search(text)
    if found is None:
        return None
    medium = MEDIA[found[2].lower()]
    among = [one for one in artifacts if medium in (None, one.medium)]
    at = ORDINALS[found[1].lower()]
    there = -len(among) <= at < len(among)
    return Named(among[at] if there else None, found[0])


def looks(text: str) -> tuple[str, Medium | None] | None:
    """ "go back to the red one", "in the blue clip": the words that describe an artifact, and its medium if named."""
    if (found := BACK.search(text)) and found[1]:
        words, medium = found[1], next((MEDIA[word] for word in found[1].lower().split() if word in MEDIA), None)
    elif found := BY_LOOKS.search(text):
        words, medium = found[1] or found[3], MEDIA[(found[2] or found[4]).lower()]
    else:
        return None
    return (words, medium) if content(words) else None


def goes_back(text: str) -> bool:
    """Whether it only asks for something of before, as it was."""
    return BACK.search(text) is not None


def content(words: str) -> set[str]:
    """The words that say something, without their plural."""
    return {word.rstrip("s") for word in re.findall(r"[\w-]+", words.lower()) if word not in EMPTY | set(ORDINALS)}


def fits(words: str, description: str) -> bool:
    return content(words) <= content(description)


def which_one(options: Sequence[Artifact], descriptions: Sequence[str]) -> str:
    """A question that lists what there is."""
    named = {"image": "picture", "video": "clip"}
    listed = (f"{at}) the {named[one.medium]}: {description}"
              for at, (one, description) in enumerate(zip(options, descriptions, strict=True), start=1))  # fmt: skip
    return "Which one do you mean? " + "; ".join(listed)


def chosen(reply: str, options: Sequence[Artifact], descriptions: Sequence[str]) -> Artifact | None:
    """The option that a reply to `which_one` means: by number, ordinal or description."""
    if (number := re.search(r"\d+", reply)) and 1 <= int(number[0]) <= len(options):
        return options[int(number[0]) - 1]
    for word, at in ORDINALS.items():
        if re.search(rf"\b{word}\b", reply.lower()) and -len(options) <= at < len(options):
            return options[at]
    fitting = [one for one, told in zip(options, descriptions, strict=True) if content(reply) and fits(reply, told)]
    return fitting[-1] if fitting else None


# ---------------------------------------------------------------- plans that the model makes


@dataclass(frozen=True)
class Planned:
    """One act of a model's plan; `about` is "new", "last", "unclear", or the number of an artifact from 1."""

    do: str
    about: str


def plan_request(text: str, made: Sequence[Artifact]) -> str:
    listed = "\n".join(f"{at}. {one.medium}: {one.about}" for at, one in enumerate(made, start=1))
    return f"Made so far:\n{listed or 'nothing'}\n\nThe user says: {text}"


def planned(written: str, count: int) -> list[Planned]:
    """The plan in what a model wrote; empty where it is not of the form that was asked for."""
    begin, end = written.find("["), written.rfind("]")
    try:
        entries = json.loads(written[begin : end + 1])
        found = [Planned(str(one["do"]).strip(), str(one["about"])) for one in entries]
    except (ValueError, TypeError, KeyError):
        return []
    known = {"new", "last", "unclear", *map(str, range(1, count + 1))}
    return found if all(one.do and one.about in known for one in found) else []
