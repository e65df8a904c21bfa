"""Requests that the world cannot fulfil, with the reply that says what it contains instead.

A request with several faults belongs to the first of its categories in `REPLIES`: a dragon in paris is an unknown
object. Of each category, every third word and every third wording is held out; a held-out request has a held-out word
in a held-out wording. Of the other languages, three are held out.

In the wordings, {a}, {n} and {ns} are an unknown object, {x} an unknown colour, {b} an unknown background colour, {p}
an unknown place, {v} and {ving} an unknown motion, {e} an effect and {many} a number over four. The others are of the
world: {c} is a colour, {s}, {ss}, {t} and {tt} are shapes, {z} is a size, {m} a motion, {d} a direction, {bg} a
background, {few} a number; {three} and {several} add up to five or more. "draw" at the start stands for one of the
ways to ask for something new, and is sometimes left out.
"""

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from omnivideo.synthetic.captions import (
    BACKGROUND_WORDS,
    CLIP_PREFIXES,
    COLOUR_WORDS,
    MOTION_WORDS,
    SHAPE_WORDS,
    SIZE_WORDS,
    STILL_PREFIXES,
    add_article,
    pluralize,
)
from omnivideo.synthetic.contradictions import Contradiction, fix_articles, sample_contradiction
from omnivideo.synthetic.foreign_requests import sample_foreign_request
from omnivideo.synthetic.refusal_words import (
    LARGE_NUMBERS,
    PSEUDO_ENDINGS,
    PSEUDO_ONSETS,
    PSEUDO_VOWELS,
    UNKNOWN_BACKGROUND_COLOURS,
    UNKNOWN_COLOURS,
    UNKNOWN_EFFECTS,
    UNKNOWN_MOTIONS,
    UNKNOWN_OBJECTS,
    UNKNOWN_PLACES,
)
from omnivideo.synthetic.scenes import Split

__all__ = ["REPLIES", "Contradiction", "Refusal", "sample_contradiction", "sample_refusal"]

REPLIES = {  # in the order of precedence
    "language": "sorry, i only understand english",
    "object": "sorry, i do not know that object. i know circles, squares, triangles and stars",
    "colour": "sorry, i do not know that colour. i know red, green, blue, yellow, orange, purple, cyan and white",
    "background": "sorry, i do not know that background. i know black, grey, white, pink and brown",
    "motion": "sorry, i do not know that motion. things can move left, right, up and down, grow and shrink",
    "effect": "sorry, i cannot do that. i can recolour, reshape, resize, move, add and remove shapes, and change the "
    "background",
    "amount": "sorry, i can show at most four shapes at once",
}
CATEGORY_WEIGHTS = {"language": 1, "object": 4, "colour": 2, "background": 2, "motion": 2, "effect": 2, "amount": 1}

OBJECT_FORMS = (
    "draw {a}", "{a}", "draw a {c} {n}", "draw {a} on a {bg} background", "{few} {ns}", "draw {a} {m}", "add {a}",
    "add {a} to it", "turn it into {a}", "turn the {s} into {a}", "draw {a} and a {c} {s}", "draw a {c} {s} and {a}",
    "replace the {s} with {a}", "draw a {z} {c} {n} {m}", "change it into {a}", "draw {a} next to a {c} {s}",
    "make it {a}", "draw a {c} {s} above {a}", "draw {few} {c} {ns} {m}", "draw {a} over {p}",
    "put {a} next to the {s}", "draw {a} {ving}", "a {c} {n} against {bg}", "remove the {n}", "make the {n} {c}",
    "draw {a} in {p}", "i want {a} instead", "no, {a}", "i meant {a}", "let the {n} move {d}", "draw a {z} {n}",
    "draw {ns}", "the {s} should be {a}", "make the {n} bigger", "can you draw {a}?", "draw a {x} {n}",
    "move the {n} to the {d}", "draw {a} with a {c} {s}", "put a {c} {n} in the corner",
    "draw {a} {m} on a {bg} background", "now {a}", "where is the {n}?", "draw a {c} {s} that looks like {a}",
    "swap the {s} for {a}", "transform it into {a}", "a {n} please",
)  # fmt: skip
COLOUR_FORMS = (
    "draw a {x} {s}", "a {x} {s}", "make it {x}", "make the {s} {x}", "draw {few} {x} {ss}", "draw a {z} {x} {s} {m}",
    "paint it {x}", "draw a {x} {s} on a {bg} background", "paint the {s} {x}", "draw a {c} {s} and a {x} {t}",
    "turn the {s} {x}", "draw a {x} {s} and a {c} {t}", "change the colour of the {s} to {x}", "change it to {x}",
    "recolour the {s} to {x}", "i want it in {x}", "draw a {s} in {x}", "add a {x} {s}", "it should be {x}",
    "no, make it {x}", "i meant a {x} {s}", "draw a {x} {s} {m}", "the {s} should be {x}", "can the {s} be {x}?",
    "draw a {x} {s} in {p}", "replace it with a {x} {s}", "draw {x} {ss}", "a {s} that is {x}", "colour the {s} {x}",
    "draw a {z} {x} {s} above a {c} {t}", "give the {s} a {x} colour", "remove the {x} {s}", "draw a {s}, {x}",
    "put a {x} {s} in the middle", "use {x} for the {s}", "draw a {x} {s} {ving}",
)  # fmt: skip
PLACE_FORMS = (
    "draw a {c} {s} in front of {p}", "draw a {c} {s} with {p} in the background", "change the background to {p}",
    "draw a {z} {c} {s} {m} with {p} behind it", "make the background {p}", "use {p} as the background",
    "draw {few} {c} {ss} in {p}", "put it in {p}", "put {p} behind it", "draw a {c} {s} against {p}",
    "replace the background with {p}", "the background should be {p}", "draw a {c} {s} {m} in {p}", "move it to {p}",
    "i want {p} as the background", "set the background to {p}", "draw a {c} {s} and a {c} {t} in front of {p}",
    "draw a {s} somewhere in {p}", "draw a {c} {s} {ving} in {p}", "can the background be {p}?",
    "now with {p} behind it",
)  # fmt: skip
BACKGROUND_COLOUR_FORMS = (
    "draw a {c} {s} on a {b} background", "change the background to {b}", "make the background {b}",
    "draw {few} {c} {ss} on a {b} background", "set the background to {b}", "use a {b} background",
    "draw a {z} {c} {s} {m} on a {b} background", "put it on a {b} background", "now with a {b} background",
    "draw a {c} {s} in front of a {b} backdrop", "turn the background {b}", "i want a {b} background",
    "the background should be {b}", "can the background be {b}?", "paint the background {b}",
)  # fmt: skip
MOTION_FORMS = (
    "draw a {c} {s} {ving}", "make it {v}", "make the {s} {v}", "let it {v}", "draw a {z} {c} {s} {ving}",
    "let the {s} {v}", "a {c} {s} {ving} on a {bg} background", "the {s} should {v}", "draw {few} {ss} {ving}",
    "have the {s} {v} instead", "it should {v}", "can you make it {v}?", "now it should {v}", "i want it to {v}",
    "draw a {s} that should {v}", "can the {s} {v}?", "the {c} {s} should {v}", "draw a {s} {ving} and a {c} {t} {m}",
    "start {ving}", "make a video of a {c} {s} {ving}", "no, it should {v}", "let it keep {ving}", "then it should {v}",
    "make the {s} {v} and then move {d}", "show the {s} {ving}", "animate it: make it {v}",
)  # fmt: skip
EFFECT_FORMS = (
    "{e}", "please {e}", "can you {e}?", "{e} please", "now {e}", "could you {e}?", "i want you to {e}",
    "draw a {c} {s} and {e}", "also {e}", "next {e}", "draw a {c} {s} on a {bg} background and {e}", "then {e}",
    "draw a {z} {c} {s} {m}, then {e}", "i would like you to {e}", "make the {s} {c} and {e}", "can you also {e}?",
    "after that {e}", "{e} for me", "let us {e}", "draw {few} {ss} and {e}", "just {e}",
)  # fmt: skip
AMOUNT_FORMS = (
    "draw {many} {c} {ss}", "{many} {ss}", "draw {many} {z} {c} {ss}", "draw {many} {c} {ss} {m}",
    "make it {many} {ss}", "draw {many} {ss} on a {bg} background", "add {many} {ss}", "i want {many} of them",
    "there should be {many} {ss}", "add {many} more {c} {ss}", "draw {many} {ss} and a {c} {t}",
    "put {many} {ss} around it", "make {many} of them", "draw a {c} {s} and {many} {c} {tt}", "{many} {c} {ss} please",
)  # fmt: skip
# Two groups that are too many together.
AMOUNT_SUM_FORMS = (
    "draw {three} {c} {ss} and {several} {tt}", "draw {several} {ss} and {three} {c} {tt}",
    "{three} {ss} together with {several} {c} {tt}",
)  # fmt: skip
DRAW_WORDS = (
    "draw", "generate", "make", "create", "show me", "i want", "please draw", "can you make", "i would like to see",
    "draw me", "i need", "give me",
)  # fmt: skip


@dataclass(frozen=True)
class Refusal:
    """A request that is declined, the reply, and the category of what the world lacks."""

    text: str
    answer: str
    category: str


def take_split(entries: Sequence[str], split: Split) -> Sequence[str]:
    """Return the entries of the split: every third is held out."""
    held_out = entries[2::3]
    return held_out if split == "held_out" else [entry for index, entry in enumerate(entries) if index % 3 != 2]


SPLITS: tuple[Split, Split] = ("train", "held_out")
WORDS = {
    split: {
        "object": take_split(UNKNOWN_OBJECTS, split),
        "colour": take_split(UNKNOWN_COLOURS, split),
        "place": take_split(UNKNOWN_PLACES, split),
        "background": take_split(UNKNOWN_BACKGROUND_COLOURS, split),
        "motion": take_split(UNKNOWN_MOTIONS, split),
        "effect": take_split(UNKNOWN_EFFECTS, split),
        "number": take_split(LARGE_NUMBERS, split),
        "pseudo ending": take_split(PSEUDO_ENDINGS, split),
    }
    for split in SPLITS
}
FORMS = {
    split: {
        "object": take_split(OBJECT_FORMS, split),
        "colour": take_split(COLOUR_FORMS, split),
        "place": take_split(PLACE_FORMS, split),
        "background": take_split(BACKGROUND_COLOUR_FORMS, split),
        "motion": take_split(MOTION_FORMS, split),
        "effect": take_split(EFFECT_FORMS, split),
        "amount": take_split(AMOUNT_FORMS, split),
        "amount sum": take_split(AMOUNT_SUM_FORMS, split),
    }
    for split in SPLITS
}


def pluralize_noun(noun: str) -> str:
    """Return the regular plural of a noun."""
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{noun}es"
    return f"{noun[:-1]}ies" if noun.endswith("y") and noun[-2] not in "aeiou" else f"{noun}s"


def invent_word(rng: random.Random, split: Split) -> str:
    """Return a word that does not exist, such as "blazork"; its ending belongs to the split."""
    ending = rng.choice(WORDS[split]["pseudo ending"])
    return f"{rng.choice(PSEUDO_ONSETS)}{rng.choice(PSEUDO_VOWELS)}{rng.choice(('', 'l', 'm', 'r'))}{ending}"


def sample_world_word(rng: random.Random, name: str) -> str:
    """Return the words of the world for a placeholder."""
    if name in ("s", "ss", "t", "tt"):
        shape = rng.choice(SHAPE_WORDS[rng.choice(list(SHAPE_WORDS))])
        return pluralize(shape) if len(name) == 2 else shape
    if name == "m":
        return rng.choice(MOTION_WORDS[rng.choice(("left", "right", "up", "down", "growing", "shrinking"))])
    if name == "c":
        return rng.choice(COLOUR_WORDS[rng.choice(list(COLOUR_WORDS))])
    if name == "z":
        return rng.choice(SIZE_WORDS[rng.choice(list(SIZE_WORDS))])
    if name == "bg":
        return rng.choice(list(BACKGROUND_WORDS))
    return rng.choice({
        "d": ("left", "right"), "few": ("two", "three", "four", "2", "3"), "three": ("three", "four", "3", "4"),
        "several": ("two", "three", "four", "2"),
    }[name])  # fmt: skip


def sample_unknown_word(rng: random.Random, name: str, split: Split) -> str:
    """Return words that the world does not have for a placeholder."""
    words = WORDS[split]
    if name in ("a", "n", "ns"):
        noun = invent_word(rng, split) if rng.random() < 0.1 else rng.choice(words["object"])
        return {"a": add_article(noun), "n": noun, "ns": pluralize_noun(noun)}[name]
    if name in ("v", "ving"):
        return rng.choice(words["motion"]).split(": ")[name == "ving"]
    tables = {"x": "colour", "p": "place", "b": "background", "e": "effect", "many": "number"}
    return rng.choice(words[tables[name]])


UNKNOWN_NAMES = ("a", "n", "ns", "x", "p", "b", "v", "ving", "e", "many")
FIELDS_BY_FORM = {
    form: tuple(name for _, name, _, _ in string.Formatter().parse(form) if name)
    for forms in FORMS.values()
    for group in forms.values()
    for form in group
}


def fill_form(rng: random.Random, form: str, split: Split) -> str:
    """Return a wording with words in place of its placeholders, and with a way to ask in place of "draw"."""
    words = {
        name: sample_unknown_word(rng, name, split) if name in UNKNOWN_NAMES else sample_world_word(rng, name)
        for name in FIELDS_BY_FORM[form]
    }
    if form.startswith("draw ") and rng.random() < 0.8:
        start = rng.choice((*DRAW_WORDS, "", "", ""))
        prefix = rng.choice((*CLIP_PREFIXES, *STILL_PREFIXES)) if rng.random() < 0.25 else ""
        form = f"{start} {prefix}{form.removeprefix('draw ')}".strip() + ("?" if start.startswith("can") else "")
    return fix_articles(form.format(**words))


def sample_background_request(rng: random.Random, split: Split) -> str:
    kind = "place" if rng.random() < 0.65 else "background"
    return fill_form(rng, rng.choice(FORMS[split][kind]), split)


def sample_amount_request(rng: random.Random, split: Split) -> str:
    kind = "amount sum" if rng.random() < 0.15 else "amount"
    return fill_form(rng, rng.choice(FORMS[split][kind]), split)


def sample_colour_request(rng: random.Random, split: Split) -> str:
    """Return a request with an unknown colour; a colour of backgrounds is asked for by name of a shape only."""
    while True:
        form = rng.choice(FORMS[split]["colour"])
        text = fill_form(rng, form, split)
        if "{s" in form or not any(word in BACKGROUND_COLOUR_WORDS for word in text.rstrip("?").split()):
            return text


BACKGROUND_COLOUR_WORDS = {word for words in BACKGROUND_WORDS.values() for word in words}


def sample_motion_request(rng: random.Random, split: Split) -> str:
    return fill_form(rng, rng.choice(FORMS[split]["motion"]), split)


def sample_effect_request(rng: random.Random, split: Split) -> str:
    return fill_form(rng, rng.choice(FORMS[split]["effect"]), split)


def sample_object_request(rng: random.Random, split: Split) -> str:
    return fill_form(rng, rng.choice(FORMS[split]["object"]), split)


def sample_language_request(rng: random.Random, split: Split) -> str:
    return sample_foreign_request(rng, split == "held_out")


REQUEST_SAMPLERS: dict[str, Callable[[random.Random, Split], str]] = {
    "language": sample_language_request,
    "object": sample_object_request,
    "colour": sample_colour_request,
    "background": sample_background_request,
    "motion": sample_motion_request,
    "effect": sample_effect_request,
    "amount": sample_amount_request,
}


def sample_refusal(rng: random.Random, split: Split = "train", category: str | None = None) -> Refusal:
    """Return a request that the world cannot fulfil, of the given category or of any."""
    category = category or rng.choices(list(CATEGORY_WEIGHTS), list(CATEGORY_WEIGHTS.values()))[0]
    return Refusal(REQUEST_SAMPLERS[category](rng, split), REPLIES[category], category)
