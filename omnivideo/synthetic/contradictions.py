"""Requests that contradict themselves, with the question that asks which of two values is meant.

In the wordings, {u} and {v} are the two values in words, {s} is a shape, {c} a colour and {draw} a way to ask. Every
third wording of a list is held out.
"""

import random
from dataclasses import dataclass
from itertools import pairwise

from omnivideo.synthetic.captions import (
    BACKGROUND_WORDS,
    COLOUR_WORDS,
    MOTION_WORDS,
    NUMBER_WORDS,
    SHAPE_WORDS,
    SIZE_WORDS,
    add_article,
    pluralize,
)
from omnivideo.synthetic.scenes import Split

COLOUR_FORMS = (
    "{draw} a {u} {s} that is completely {v}", "{draw} a {u} {s} that is {v}", "{draw} a {u} {s}, all {v}",
    "make it {u} and {v}", "make the {s} {u} and {v} at the same time", "paint the {s} {u}, but {v}",
    "{draw} a {s} that is only {u} and only {v}", "{draw} a {u} {s} and it must be {v}", "turn it both {u} and {v}",
    "the {s} should be {u} and entirely {v}", "{draw} a {u} {s} in {v}", "recolour the {s} to {u} and to {v}",
    "{draw} an all {u}, all {v} {s}", "{draw} a {u} {s} whose colour is {v}", "i want it {u} and also {v}",
    "colour it {u}, and it should stay {v}", "{draw} a purely {u} {s}, coloured {v}",
    "{draw} a {u} {s}, as {v} as can be",
)  # fmt: skip
SHAPE_FORMS = (
    "{draw} a {c} {u} that is a {v}", "{draw} a {u} that is really a {v}", "{draw} a {c} {u} shaped like a {v}",
    "turn it into a {u} that is a {v}", "make it a {u} and a {v} at the same time", "make it both a {u} and a {v}",
    "{draw} one shape that is a {u} and a {v}", "{draw} a {c} {u} with the shape of a {v}", "{draw} a {u} like a {v}",
    "it should be a {u} and also a {v}", "{draw} a {u} in the form of a {v}", "change it into a {u}, which is a {v}",
)  # fmt: skip
SIZE_FORMS = (
    "{draw} a {u} {c} {s} that is {v}", "make it {u} and {v}", "make the {s} {u} and {v} at the same time",
    "{draw} a {u} and {v} {s}", "{draw} a {c} {s} that is {u} and {v}", "make it both {u} and {v}",
    "the {s} should be {u}, and {v}", "{draw} a {u} {s}, very {v}", "i want it {u} but {v}",
    "{draw} a {c} {s} with a {u} size that is {v}", "{draw} a {u} {v} {s}", "it should be {u} and also {v}",
)  # fmt: skip
MOTION_FORMS = (
    "{draw} a {c} {s} {u} and {v} at the same time", "{draw} a {s} {u} while {v}", "it should be {u} and {v} at once",
    "{draw} a {c} {s} that is both {u} and {v}", "the {s} should be {u} and at the same time {v}",
    "show it {u} and {v} at once", "{draw} a {c} {s} only {u} and only {v}", "i want it {u} and simultaneously {v}",
    "{draw} a {s}, always {u}, always {v}",
)  # fmt: skip
STILL_FORMS = (
    "{draw} a {u} {c} {s} {v}", "{draw} a {u} {s} that is {v}", "{draw} a {u} {s}, {v}",
    "{draw} a completely {u} {s} {v}", "make it {u} while {v}", "let it be {u} and {v}", "keep it {u}, but {v}",
    "the {s} should be {u} and {v}", "i want a {u} {s} {v}",
)  # fmt: skip
COUNT_FORMS = (
    "{draw} {u} {c} {us}, {v} of them", "{draw} {u} {us}, exactly {v}", "{draw} {u} {us}, that is {v}",
    "{draw} exactly {u} {us} and exactly {v} {us}", "there should be {u} {us}, {v} in all",
    "{draw} only {u} {c} {us}, namely {v}", "{draw} {u} {us}, not more and not fewer than {v}",
    "make it {u} {us}, {v} in total", "i want {u} {us}, all {v} of them",
)  # fmt: skip
BACKGROUND_FORMS = (
    "{draw} a {c} {s} on a {u} background that is {v}", "{draw} a {c} {s} on a {u} and {v} background",
    "make the background {u} and {v}", "{draw} a {s} on a {u} background, on a {v} background",
    "change the background to {u} and to {v}", "put it on a {u} background, which is {v}",
    "the background should be {u} and entirely {v}", "{draw} a {c} {s} against {u} and against {v}",
    "use a {u} background that is completely {v}", "set the background to {u}, but {v}",
    "{draw} a {s} on an all {u}, all {v} background", "i want the background {u} and also {v}",
)  # fmt: skip
FORMS_BY_KIND = {
    "colour": COLOUR_FORMS, "shape": SHAPE_FORMS, "size": SIZE_FORMS, "motion": MOTION_FORMS, "still": STILL_FORMS,
    "count": COUNT_FORMS, "background": BACKGROUND_FORMS,
}  # fmt: skip
KIND_WEIGHTS = {"colour": 4, "shape": 3, "size": 2, "motion": 2, "still": 2, "count": 2, "background": 3}
DRAW_WORDS = ("", "", "", "draw", "make", "show me", "please draw", "i want", "generate", "create")
EDIT_SIZE_WORDS = {"small": (*SIZE_WORDS["small"], "smaller"), "large": (*SIZE_WORDS["large"], "bigger", "larger")}
STILL_WORDS = ("still", "motionless", "unmoving")
MOTION_NAMES = {"growing": "growing", "shrinking": "shrinking"} | {
    name: f"moving {name}" for name in ("left", "right", "up", "down")
}
OPPOSITE_MOTIONS = (("left", "right"), ("up", "down"), ("growing", "shrinking"))


@dataclass(frozen=True)
class Contradiction:
    """A request that names two values of which one object can have only one, and the question that asks for one."""

    text: str
    answer: str
    values: tuple[str, str]


def fix_articles(text: str) -> str:
    """Return the text with single spaces, "an" before vowels and "a" before other letters."""
    words = text.split()
    for index, (word, following) in enumerate(pairwise(words)):
        if word in ("a", "an") and following[0].isalpha():
            is_vowel = following[0] in "aeiou" and not following.startswith(("uni", "ufo"))
            words[index] = "an" if is_vowel else "a"
    return " ".join(words)


def choose_values(rng: random.Random, kind: str, is_edit: bool) -> tuple[tuple[str, str], tuple[str, str]]:
    """Return two values with their words, as they are mentioned, and their canonical words for the question."""
    if kind in ("colour", "background"):
        table = COLOUR_WORDS if kind == "colour" else BACKGROUND_WORDS
        first, second = rng.sample(list(table), 2)
        return (rng.choice(table[first]), rng.choice(table[second])), (first, second)
    if kind == "shape":
        first, second = rng.sample(list(SHAPE_WORDS), 2)
        words = rng.choice(SHAPE_WORDS[first]), rng.choice(SHAPE_WORDS[second])
        return words, (add_article(first), add_article(second))
    if kind == "size":
        first, second = rng.sample(list(SIZE_WORDS), 2)
        sizes = EDIT_SIZE_WORDS if is_edit else SIZE_WORDS
        return (rng.choice(sizes[first]), rng.choice(sizes[second])), (first, second)
    if kind == "count":
        first, second = rng.sample(NUMBER_WORDS[1:5], 2)
        return (first, second), (first, second)
    if kind == "still":
        motion = rng.choice(list(MOTION_NAMES))
        return (rng.choice(STILL_WORDS), rng.choice(MOTION_WORDS[motion])), ("still", MOTION_NAMES[motion])
    first, second = rng.sample(rng.choice(OPPOSITE_MOTIONS), 2)
    words = rng.choice(MOTION_WORDS[first]), rng.choice(MOTION_WORDS[second])
    return words, (MOTION_NAMES[first], MOTION_NAMES[second])


def sample_contradiction(rng: random.Random, split: Split = "train", kind: str | None = None) -> Contradiction:
    """Return a contradictory request for something new, or about what is shown, and the question back."""
    kind = kind or rng.choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()))[0]
    forms = FORMS_BY_KIND[kind]
    index = rng.choice([index for index in range(len(forms)) if (index % 3 == 2) == (split == "held_out")])
    (first_words, second_words), (first, second) = choose_values(rng, kind, "{draw}" not in forms[index])
    shape = rng.choice(SHAPE_WORDS[rng.choice(list(SHAPE_WORDS))])
    text = forms[index].format(
        draw=rng.choice(DRAW_WORDS),
        u=first_words,
        v=second_words,
        s=shape,
        us=shape if first == "one" else pluralize(shape),
        c=rng.choice(COLOUR_WORDS[rng.choice(list(COLOUR_WORDS))]),
    )
    return Contradiction(fix_articles(text), f"do you mean {first} or {second}?", (first, second))
