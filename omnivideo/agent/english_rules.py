"""Rules on English text: the actions in a turn, which artifact each refers to, and whether to think first.

They split turns and resolve references for an MLLM that cannot plan. They only find the image or clip that the MLLM
is shown; the MLLM decides what a request means. The same text always gives the same result.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from omnivideo.agent.media_words import is_medium_request
from omnivideo.contracts import Artifact, Medium

MAX_WORDING_CHARS = 300  # of a command, a question or the beginning of a request
IMPERATIVE_VERBS = (
    "make", "turn", "paint", "change", "recolour", "recolor", "add", "put", "draw", "remove", "delete", "erase",
    "take", "get", "set", "use", "replace", "transform", "generate", "create", "show", "let", "have", "go", "return",
    "switch", "give", "move", "place", "swap", "exchange", "drop", "try", "save", "export", "undo", "send",
    "animate", "list", "download", "store", "start over",
)  # fmt: skip
QUESTION_WORDS = (
    "how", "what", "which", "where", "who", "why", "when", "is", "are", "does", "do", "tell", "describe", "count",
    "caption", "say", "explain",
)  # fmt: skip
ACTION_START = "|".join((*IMPERATIVE_VERBS, *QUESTION_WORDS))
LEAD_IN = r"(?:and|then|now|also|next|finally|afterwards|after that|ok|okay|so|but|please)"
QUANTITY = (
    r"(?:an?|one|two|three|four|five|six|seven|eight|nine|ten|some|several|another|as many|the same number|half|twice"
    r"|\d+)"
)
PLURAL_NOUN = r"(?:circles|balls|discs|dots|round shapes|squares|boxes|blocks|triangles|stars|shapes|things)"

# "go right, then move up" is one action, "then move the star" another; "then it should be red", "then bigger" too.
MOTION_COMMAND = (
    r"(?:move|go|rise|fall|stay|stand|stop|grow|shrink|get)\b"
    r"(?! (?:back|it|them|the|all|rid)\b(?! (?:left|right|top)))"
)
ELLIPTICAL_CHANGE = (
    r"(?:it|they|the [\w-]+(?: [\w-]+)?) should|can (?:it|they|the)|a bit|a lot|much|bigger|larger|smaller|faster"
    r"|slower|without|(?:the )?same|with|on|in|i (?:do not )?want (?:it|them|the)"
)

# Blanks are matched possessively and only from the first one on: the time stays linear in the length of the text.
BLANKS = r"(?<!\s)\s++"
ACTION_BOUNDARY = re.compile(
    rf"(?<=[.!?])\s++(?=\S)|(?:{BLANKS})?;\s*+"
    rf"|(?:(?:{BLANKS})?,\s++|{BLANKS})(?:and\s++)?(?:then|afterwards|after that)\s++(?!{MOTION_COMMAND})"
    rf"(?=(?:{LEAD_IN}|{ACTION_START}|{ELLIPTICAL_CHANGE})\b)"
    rf"|(?:{BLANKS})?,\s*+(?:and\s++)?"
    rf"(?={LEAD_IN}?\s*+(?:(?:can|could|would|will) you (?:also |please )?)?(?:{ACTION_START})\b)"
    # "remove the star and put a circle there instead" is one action.
    rf"|{BLANKS}and\s++(?!(?:put|draw|place|add)\b[^.;]{{0,100}}\b(?:instead|in its place)\b)"
    rf"(?=(?:{ACTION_START}|now)\b)",
    re.IGNORECASE,
)
GREETING = re.compile(
    r"^(?:(?:hi|hello|hey|ok|okay|so|well|alright|great|nice|perfect|thanks)(?: there)?[,!]?\s+)+(?=\S+ \S)",
    re.IGNORECASE,
)
LEAD_IN_ONLY = re.compile(rf"{LEAD_IN}$", re.IGNORECASE)
POLITE_PREFIX = re.compile(
    rf"^(?:{LEAD_IN}[\s,]+|(?:can|could|would|will) you (?!see\b)(?:please )?"
    r"|tell me\s+(?=how|what|which|where|who|why))+",
    re.IGNORECASE,
)
DEFINITE_WORD = (
    r"(?:the|them|their|all|of|swap|exchange|switch|paint|recolou?r|change|turn|remove|delete|"
    rf"{'|'.join(QUESTION_WORDS)})"
)
# A request for something new: "a red star", "draw two circles", "i want a clip of ...".
NEW_SUBJECT = re.compile(
    rf"^(?:(?:make|draw|show|generate|create|give|produce)(?: me| us)?\s+|i (?:want|need|would like)(?: to see)?\s+)?"
    rf"(?:(?!a (?:bit|lot)\b){QUANTITY}\b|(?:(?!{DEFINITE_WORD}\b)[\w-]+ ){{0,3}}{PLURAL_NOUN}\b"
    r"|(?:pictures?|images?|photos?|videos?|clips?|animations?|footage) of\b)",
    re.IGNORECASE,
)
CHANGE_REQUEST = re.compile(
    r"^(?:make|turn|paint|change|recolou?r|add|put|place|move|remove|delete|erase|take away|get rid of|drop|set|use"
    r"|replace|transform|swap|exchange|switch|let|have|now|try|without|in|with|the same(?! number)|no|not|sorry|wrong"
    r"|and also|give me also|on (?!an?\b)\w+ instead|after that|afterwards|i do not want|i meant?)\b"
    r"|^(?:i want|can|could) (?:it|them|the|all the)\b|^(?:it|them|they|the|all the)\b.* should\b"
    r"|\binstead\b|^\w+ (?:background|please)$|^(?:a bit |much |a lot )?\w+er(?: please)?$",
    re.IGNORECASE,
)
QUESTION = re.compile(rf"^(?:{'|'.join(QUESTION_WORDS)}|can you see|do you see)\b|\?\s*$", re.IGNORECASE)
DEFINITE_REFERENCE = re.compile(r"\b(?:it|its|them|they|there|this|these|those|you see|the)\b", re.IGNORECASE)
PRONOUN = re.compile(r"\b(?:it|its|them|they|this|these|those)\b", re.IGNORECASE)

MEDIUM_BY_NOUN: dict[str, Medium | None] = {
    "clip": "video", "video": "video", "animation": "video", "movie": "video", "picture": "image", "image": "image",
    "still": "image", "photo": "image", "drawing": "image", "one": None, "result": None, "version": None,
}  # fmt: skip
ORDINAL_INDEX = {
    "first": 0, "second": 1, "third": 2, "fourth": 3, "fifth": 4, "sixth": 5, "seventh": 6, "eighth": 7, "ninth": 8,
    "tenth": 9, "last": -1, "latest": -1, "newest": -1, "previous": -2,
}  # fmt: skip
ORDINAL_REFERENCE = re.compile(
    rf"(?:\bthe |^(?=previous))({'|'.join(ORDINAL_INDEX)}) ({'|'.join(MEDIUM_BY_NOUN)})\b", re.IGNORECASE
)
GO_BACK_REQUEST = re.compile(
    r"\b(?:go|return|switch|come) back to (?:the |my |that )?(.{1,200})$|^undo\b", re.IGNORECASE
)
DESCRIPTION = r"((?:(?!(?:the|in|of|on|is|are|to|does|this|and)\b)[\w-]+ ){1,3})"
DESCRIPTION_REFERENCE = re.compile(
    rf"\b(?:in|use|open) the {DESCRIPTION}({'|'.join(MEDIUM_BY_NOUN)})\b"
    rf"|\bthe {DESCRIPTION}({'|'.join(name for name in MEDIUM_BY_NOUN if name not in ('one', 'still'))})\b",
    re.IGNORECASE,
)
STOP_WORDS = {"the", "a", "an", "one", "ones", "with", "of", "and", "my", "that", "again", "please", *MEDIUM_BY_NOUN}

# A request that needs reasoning: a comparison, a description instead of a name, an amount in words.
INDIRECT_REQUEST = re.compile(
    r"(?<!would )\blike\b|\bcolou?rs? of\b|\bas \w+(?: \w+)? as\b|\bas many\b|\b(?:more|less|fewer) than\b"
    r"|\b(?:half|twice|double|pairs?)\b|\bwhose\b|\bsomething\b|\bsomeone\b|\bopposite\b|\bremind"
    r"|\ban? (?:\w+ )?shape\b|\bshapes? (?:with|that (?!does not move)|without|you)\b|,\s*(?:it|they)\b"
    r"|\bthe (?:number|amount) of\b|, not\b",
    re.IGNORECASE,
)


def split_actions(text: str) -> list[str]:
    """Split a turn into the actions that it requests, in order, without the words that join them."""
    parts = [
        POLITE_PREFIX.sub("", part.strip(" ,;")).strip(" ,;.!")
        for part in ACTION_BOUNDARY.split(GREETING.sub("", text))
    ]
    return [part for part in parts if part and not LEAD_IN_ONLY.match(part)] or [text.strip()]


def is_indirect(text: str) -> bool:
    """Return whether a request describes things instead of naming them, or is a single word."""
    is_single_word = len(text.split()) < 2 and text.isascii()  # not every script puts spaces between words
    return bool(INDIRECT_REQUEST.search(text)) or is_single_word


@cache
def load_plain_words() -> frozenset[str]:
    """Return the words of direct requests and edits to an MLLM with a closed vocabulary."""
    return frozenset((files("omnivideo.agent") / "prompts/keywords/plain_words.txt").read_text().split())


def has_other_words(text: str) -> bool:
    """Return whether a request has words that direct ones do not have: it needs reasoning, or cannot be fulfilled."""
    return not load_plain_words().issuperset(re.findall(r"[a-z0-9'-]+", text.lower()))


def is_change_request(text: str) -> bool:
    """Return whether a request changes an existing artifact instead of asking for a new one."""
    return bool(CHANGE_REQUEST.search(text)) and not (NEW_SUBJECT.match(text) and "instead" not in text.lower())


def is_reference(text: str) -> bool:
    """Return whether a request refers to an existing artifact."""
    if is_change_request(text) or is_medium_request(text):
        return True
    if NEW_SUBJECT.match(text):
        return False
    return bool(PRONOUN.search(text)) or bool(QUESTION.search(text) and DEFINITE_REFERENCE.search(text))


class WordingPattern:
    """A pattern of many wordings, which only sees MAX_WORDING_CHARS of a text, so that its time is bounded.

    A longer text is no wording as a whole; its beginning may be one.
    """

    def __init__(self, pattern: str):
        self.pattern = re.compile(pattern)

    def match(self, text: str) -> re.Match[str] | None:
        return self.pattern.match(text[:MAX_WORDING_CHARS])

    def search(self, text: str) -> re.Match[str] | None:
        return self.pattern.search(text[:MAX_WORDING_CHARS])

    def fullmatch(self, text: str) -> re.Match[str] | None:
        return None if len(text) > MAX_WORDING_CHARS else self.pattern.fullmatch(text)

    def sub(self, replacement: str | Callable[[re.Match[str]], str], text: str) -> str:
        """Return the text with what matches replaced; a longer text is left as it is."""
        return text if len(text) > MAX_WORDING_CHARS else self.pattern.sub(replacement, text)

    def split(self, text: str) -> list[str]:
        """Return the pieces between what matches; a longer text is one piece."""
        return [text] if len(text) > MAX_WORDING_CHARS else self.pattern.split(text)


def is_plain_wording(text: str, normalized: str, form: WordingPattern) -> bool:
    """Return whether a request is in the MLLM's own words and form, in which it is passed on as it is."""
    words = re.findall(r"[a-z0-9'-]+", text.lower())
    is_fluent = not re.search(r"[.;:!?](?=.)|,(?! (?:and )?(?:one|two|three|four|\d)\b)", normalized)
    is_fluent = is_fluent and normalized == " ".join(text.lower().split())  # "there should be no star" is reworded
    is_fluent = is_fluent and not normalized.endswith("?")
    return is_fluent and bool(form.fullmatch(normalized)) and load_plain_words().issuperset(words)


@dataclass(frozen=True)
class OrdinalMatch:
    """An ordinal ("the second clip") and the artifact that it refers to, or None if there are fewer."""

    artifact: Artifact | None
    words: str


def find_by_ordinal(text: str, artifacts: Sequence[Artifact]) -> OrdinalMatch | None:
    """Return the artifact that an ordinal such as "the second clip" refers to; None if the text has no ordinal."""
    match = ORDINAL_REFERENCE.search(text)
    if match is None:
        return None
    medium = MEDIUM_BY_NOUN[match[2].lower()]
    candidates = [artifact for artifact in artifacts if medium in (None, artifact.medium)]
    index = ORDINAL_INDEX[match[1].lower()]
    in_range = -len(candidates) <= index < len(candidates)
    return OrdinalMatch(candidates[index] if in_range else None, match[0])


def find_description(text: str) -> tuple[str, Medium | None] | None:
    """Return the words that describe an artifact, as in "go back to the red one" or "in the blue clip", and its medium.

    The medium is None if the text does not name it. Return None if the text describes no artifact.
    """
    if (match := GO_BACK_REQUEST.search(text)) and match[1]:
        words = match[1]
        medium = next((MEDIUM_BY_NOUN[word] for word in words.lower().split() if word in MEDIUM_BY_NOUN), None)
    elif match := DESCRIPTION_REFERENCE.search(text):
        words, medium = match[1] or match[3], MEDIUM_BY_NOUN[(match[2] or match[4]).lower()]
    else:
        return None
    return (words, medium) if get_content_words(words) else None


def is_go_back_request(text: str) -> bool:
    """Return whether a request only returns to an earlier artifact, without changing it."""
    return GO_BACK_REQUEST.search(text) is not None


def get_content_words(words: str) -> set[str]:
    """Return the words that describe something, in the singular."""
    return {
        word.rstrip("s") for word in re.findall(r"[\w-]+", words.lower()) if word not in STOP_WORDS | set(ORDINAL_INDEX)
    }


def matches_description(words: str, description: str) -> bool:
    return get_content_words(words) <= get_content_words(description)


def build_choice_question(options: Sequence[Artifact], descriptions: Sequence[str]) -> str:
    """Return a question that lists the artifacts to choose from."""
    nouns = {"image": "picture", "video": "clip"}
    choices = (
        f"{number}) the {nouns[artifact.medium]}: {description}"
        for number, (artifact, description) in enumerate(zip(options, descriptions, strict=True), start=1)
    )
    return "Which one do you mean? " + "; ".join(choices)


def artifact_from_reply(reply: str, options: Sequence[Artifact], descriptions: Sequence[str]) -> Artifact | None:
    """Return the option that a reply to the question names by number, ordinal or description, or None."""
    if (number := re.search(r"\d+", reply)) and 1 <= int(number[0]) <= len(options):
        return options[int(number[0]) - 1]
    for word, index in ORDINAL_INDEX.items():
        if re.search(rf"\b{word}\b", reply.lower()) and -len(options) <= index < len(options):
            return options[index]
    matches = [
        artifact
        for artifact, description in zip(options, descriptions, strict=True)
        if get_content_words(reply) and matches_description(reply, description)
    ]
    return matches[-1] if matches else None
