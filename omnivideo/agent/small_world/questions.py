"""The question about an artifact that a text asks, in the MLLM's words."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from omnivideo.agent.small_world.lexicon import Token, name_target
from omnivideo.agent.small_world.wordings import load_pattern
from omnivideo.contracts import Medium

# Only the first "the" of a clause is tried, so that the time is linear.
FIRST_OBJECT = re.compile(r"(?<![\w -])((?>[\w -]*?\bthe ))[\w -]+?(?=\?|$| move| small)")
FileFact = Literal["medium", "length", "size", "corners", "earlier", "presence"]


@dataclass(frozen=True)
class QuestionReading:
    """A question in the MLLM's words, or a fact that the file, the world or the thread gives; neither if unclear."""

    text: str = ""
    fact: FileFact | None = None


def is_question(text: str) -> bool:
    """Return whether a normalised text asks something about what there is."""
    if load_pattern("suggestion").match(text):
        return False
    if load_pattern("question_start").match(text) or load_pattern("follow_up").match(text):
        return True
    return text.endswith("?") and bool(re.search(r"\b(?:is|are|was|were|does|do|did|has|have|right|correct)\b", text))


def read_question(text: str, tokens: Sequence[Token], medium: Medium, last: str = "") -> QuestionReading:
    """Return what a normalised text asks about an artifact; `last` is the question before it, for "and the star?"."""
    if any(token.has("longer") for token in tokens):  # "what happens next?" asks for more of the clip
        return QuestionReading()
    if fact := find_file_fact(text):
        return QuestionReading(fact=fact)
    if load_pattern("presence").match(text) and is_only_presence(tokens):
        return QuestionReading(fact="presence")
    target = find_target(tokens)
    if re.search(r"\bwhere\b.*\b(?:heading|headed|going|moving|travelling|traveling|go|move|off to)\b", text):
        return QuestionReading(f"how does {target} move?")
    if load_pattern("trained_question").fullmatch(text.strip(" .!")):
        return QuestionReading(text)
    if re.match(r"(?:and |so )?(?:what|which (?:one|shape|thing|object)|who) (?:is|are) (?:moving|going)", text):
        return QuestionReading(f"describe the {'video' if medium == 'video' else 'picture'}")
    about_background = any(token.has("ground") for token in tokens) or "behind" in text.split()
    if re.search(r"\bhow many\b|\bcount\b|\bnumber of\b|\bhow much\b", text):
        return QuestionReading(f"how many {find_noun(tokens)} are there?")
    if about_background and not re.search(r"\bwhere\b", text):
        return QuestionReading("what colour is the background?")
    if re.search(
        r"\b(?:move|moves|moving|going|go|goes|motion|movement|direction|heading|which way|happens?|happening|doing)\b",
        text,
    ) or any(token.has("motion", "go") for token in tokens):
        return QuestionReading(f"how does {target} move?")
    return read_attribute_question(text, tokens, medium, target, last)


def read_attribute_question(
    text: str, tokens: Sequence[Token], medium: Medium, target: str, last: str
) -> QuestionReading:
    """Return a question about colours, shapes, sizes, places, presence or everything."""
    describe = QuestionReading(f"describe the {'video' if medium == 'video' else 'picture'}")
    if re.match(r"what (?:is|are|was) (?:it|this|that|these|they)\W*$|what did you (?:draw|make|create)\W*$", text):
        return describe
    if re.search(r"\b(?:where|position|place|corner|side|located)\b", text):
        return QuestionReading(f"where is {target}?")
    if re.search(r"\b(?:how (?:big|large|small)|what size|which size|bigger|smaller|larger)\b", text) or any(
        t.has("size") for t in tokens
    ):
        return describe if "which" in text or "them" in text else QuestionReading(f"is {target} small or large?")
    colours = [token.get("colour") for token in tokens if token.has("colour")]
    plural = re.search(r"\bcolours\b|\b(?:two|both|them|they|all|each|these|those|shapes|objects|things)\b", text)
    if re.search(r"\bcolours?\b|\bcoloured\b", text):
        return describe if plural else QuestionReading(f"what colour is {target}?")
    if re.search(r"\b(?:which|what)\b", text) and colours:
        return QuestionReading(f"what shape is the {colours[0]} object?")
    if colours and target.startswith("the ") and (len(colours) > 1 or re.search(r"\bis\b", text)):
        return QuestionReading(f"what colour is {target_without_colour(tokens)}?")
    nouns = [token for token in tokens if token.has("shape", "plural")]
    if nouns and re.search(r"\b(?:any|is there|are there|there|see|contain|have|has|got)\b", text):
        return QuestionReading(f"how many {find_noun(tokens)} are there?")
    if len(nouns) == 1 and last:
        return QuestionReading(replace_object(last, target))
    if (
        nouns
        or any(token.has("region") for token in tokens)
        or re.search(
            r"\b(?:shape|shapes|objects|things|everything|see|show|shows|shown|describe|there|contain|made|got|caption|picture|clip|video|image)\b",
            text,
        )
    ):
        return describe
    return QuestionReading()


def replace_object(question: str, target: str) -> str:
    """Return a question about another object: "how does the star move?" about "the ring"."""
    return FIRST_OBJECT.sub(lambda match: match[1].removesuffix("the ") + target, question, count=1)


def is_only_presence(tokens: Sequence[Token]) -> bool:
    """Return whether shapes or colours are named, but no places or motions of them."""
    has_more = any(token.has("relation", "region", "direction", "motion", "go", "ground") for token in tokens)
    return not has_more and any(token.has("shape", "plural", "colour") for token in tokens)


def find_file_fact(text: str) -> FileFact | None:
    """Return the fact that no look at the pixels is needed for."""
    if re.search(
        r"\bcorners?\b.*\b(?:does|do|has|have|got)\b|\bhow many (?:corners|points|sides|edges|tips|spikes|vertices)\b",
        text,
    ):
        return "corners"
    if re.search(
        r"\bhow long\b|\bhow many (?:frames|seconds)\b|\bduration\b|\bwhat length\b|\bframe rate\b|\bfps\b", text
    ):
        return "length"
    if re.search(
        r"\b(?:resolution|pixels?|dimensions?|aspect ratio|how wide|how tall|how high|file format|file type"
        r"|(?:how (?:big|large)|what size) is (?:the|this|that) (?:picture|image|photo|video|clip|frame|file))\b",
        text,
    ):
        return "size"
    if re.search(
        r"\b(?:video|clip|movie|animation)\b.*\bor\b.*\b(?:picture|image|photo|still)\b|\b(?:picture|image|photo|still)\b.*\bor\b.*\b(?:video|clip|movie|animation)\b",
        text,
    ):
        return "medium"
    if re.search(r"\b(?:before|previously|originally|earlier|used to be|original)\b", text):
        return "earlier"
    return None


def find_target(tokens: Sequence[Token]) -> str:
    """Return the MLLM's words for what is asked about: "the red circle", or "the object"."""
    for index, token in enumerate(tokens):
        if token.has("shape", "plural"):
            start = index
            while start and tokens[start - 1].has("colour", "size"):
                start -= 1
            return name_target(tokens[start : index + 1])
    for index, token in enumerate(tokens):
        if token.has("thing") and index and tokens[index - 1].has("colour"):
            return f"the {tokens[index - 1].get('colour')} object"
    return "the object"


def target_without_colour(tokens: Sequence[Token]) -> str:
    shape = next((token.get("shape") or token.get("plural") for token in tokens if token.has("shape", "plural")), None)
    return f"the {shape or 'object'}"


def find_noun(tokens: Sequence[Token]) -> str:
    """Return what is counted, in the plural: "stars", "red objects" or "objects"."""
    colour = next((token.get("colour") for token in tokens if token.has("colour")), None)
    shape = next((token.get("shape") or token.get("plural") for token in tokens if token.has("shape", "plural")), None)
    noun = f"{shape}s" if shape else "objects"
    return f"{colour} {noun}" if colour else noun
