"""The question about an artifact that a text asks, in the MLLM's words."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from omnivideo.agent.small_world.edits import name_target
from omnivideo.agent.small_world.lexicon import Token
from omnivideo.contracts import Medium

QUESTION_START = re.compile(
    r"^(?:(?:and|so|but|ok|okay|hm+|well|hey|now|um|er|then|also|oh|hang on|wait|please|just|by the way|quick question|sorry)[ ,]+)*"
    r"(?:how|what|which|where|who|whose|why|when|is|are|was|were|does|do|did|any|has|have you|am|tell me|describe|count|list|"
    r"name|say what|explain|caption|can you (?:see|tell|say|describe|count|name|spot)|could you (?:see|tell|say|describe|count|name)|"
    r"do you (?:see|know)|say|calculate|compute|i wonder|i would like to know|let me know|in which|in what|from which|give me the (?:number|colour))\b"
)
SUGGESTION = re.compile(r"^(?:and |so |but |ok |okay )*(?:what if|how about (?!the )|what about (?!the ))")
FOLLOW_UP = re.compile(r"^(?:and|what about|how about|so|but) (?:the |is the )?(?P<rest>.+?)\s*\?$")
# The wordings that the MLLM was trained on; they are passed on as they are.
TRAINED_FORMS = re.compile(
    r"(?:what|which) (?:colour|shape) (?:is|are|do) the [\w -]+(?: have)?\??|how many [\w -]+ (?:are there|do you see)\??"
    r"|count the [\w -]+|describe (?:the (?:picture|video)|what you see)|caption this (?:picture|video)|what do you see\??"
    r"|(?:is there|do you see|can you see) an? [\w -]+\??|(?:where is|where can you see|in which part of the picture is) the [\w -]+\??"
    r"|(?:how|what|which way) does the [\w -]+ (?:move|do)\??|what happens to the [\w -]+\??|what is the \w+ (?:\w+ )?of (?:the )?[\w -]+\??"
    r"|tell me the colour of the [\w -]+|is the [\w -]+ (?:small|little|tiny) or (?:large|big|huge)\??"
    r"|does the [\w -]+ (?:stay still|move (?:left|right|up|down)|grow|shrink)\??"
    r"|is the background \w+\??|what is the background colour\??|(?:what is in|is|does) this [\w ,-]+\??"
    r"|what does the (?:picture|video) show\??|what is where\??|where is everything\??|where are the objects\??|how fast [\w -]+\??"
    r"|(?:what shape|which shape|what) is the \w+ (?:object|one|thing)\??|is the [\w -]+ (?:left of|right of|above|over|higher than|below"
    r"|under|beneath) the [\w -]+\??"
)
FileFact = Literal["medium", "length", "size", "corners", "earlier"]


@dataclass(frozen=True)
class QuestionReading:
    """A question in the MLLM's words, or a fact that the file, the world or the thread gives; neither if not understood."""

    text: str = ""
    fact: FileFact | None = None


def is_question(text: str) -> bool:
    """Return whether a normalised text asks something about what there is."""
    if SUGGESTION.match(text):
        return False
    if QUESTION_START.match(text) or FOLLOW_UP.match(text):
        return True
    return text.endswith("?") and bool(re.search(r"\b(?:is|are|was|were|does|do|did|has|have|right|correct)\b", text))


def read_question(text: str, tokens: Sequence[Token], medium: Medium, last: str = "") -> QuestionReading:
    """Return what a normalised text asks about an artifact; `last` is the question before it, for "and the star?"."""
    if fact := find_file_fact(text):
        return QuestionReading(fact=fact)
    if TRAINED_FORMS.fullmatch(text.strip(" .!")):
        return QuestionReading(text)
    target = find_target(tokens)
    about_background = any(token.has("ground") for token in tokens)
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
        return QuestionReading(re.sub(r"\bthe [\w -]+?(?=\?|$| move| small)", target, last, count=1))
    if nouns or re.search(
        r"\b(?:shape|shapes|see|show|shows|shown|describe|there|contain|made|got|caption|picture|clip|video|image)\b",
        text,
    ):
        return describe
    return QuestionReading()


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
        r"\b(?:resolution|pixels?|dimensions?|aspect ratio|how wide|how tall|how high|file format|file type)\b", text
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
