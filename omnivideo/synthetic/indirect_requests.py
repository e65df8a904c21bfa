"""Indirect prompts for think mode, with the reasoning that solves them and the plain rewrite.

"a shape like a coin, the colour of what monkeys eat" -> "a coin is a circle; monkeys eat a banana; a banana is yellow"
-> "a yellow circle". Each of shape, colour, size, motion, number and background is named directly or by a hint of one
of the kinds. The reasoning has a step for each hint, in the order of the prompt, and its facts are those of
knowledge.py in their fixed sentences.

Held out are every third fact, every third pair of alternatives ("red or blue, but not red"), and the combinations of
kinds in `HELD_OUT_COMBINATIONS`. Comparisons and opposites are too few for that.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from omnivideo.synthetic.captions import (
    BACKGROUND_PHRASES,
    BACKGROUND_WORDS,
    COLOUR_WORDS,
    MOTION_WORDS,
    SHAPE_WORDS,
    SIZE_WORDS,
    add_article,
    pluralize,
    to_canonical_text,
)
from omnivideo.synthetic.facts import ObjectSpec, SceneSpec
from omnivideo.synthetic.indirect_wording import (
    ALTERNATIVE_FORMS,
    ARITHMETIC_FORMS,
    ASSOCIATION_FORMS,
    COMPARISON_FORMS,
    COMPARISON_STEPS,
    CONTINUATION_FORMS,
    MOTION_VALUE_WORDS,
    NEGATION_FORMS,
    OPPOSITE_FORMS,
    OPPOSITE_HOP_FORMS,
    PLURAL_WORDS,
    SINGULAR_WORDS,
)
from omnivideo.synthetic.knowledge import COUNTS, FACTS, FACTS_BY_VALUE, OPPOSITES, Fact, get_opposite_fact
from omnivideo.synthetic.scenes import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    SIZES,
    SceneObject,
    get_initial_size,
    is_held_out,
)

RequestSplit = Literal["train", "held_out", "held_out_combinations"]

KINDS = ("association", "comparison", "arithmetic", "negation", "opposite", "two hops")
KIND_WEIGHTS = (6, 2, 3, 3, 2, 5)
HELD_OUT_COMBINATIONS = (("association", "opposite"), ("comparison", "two hops"), ("arithmetic", "negation"))
KINDS_WITH_HELD_OUT_FACTS = ("association", "arithmetic", "negation", "two hops")
FIELDS_BY_KIND = {
    "association": ("shape", "colour", "size", "motion", "count", "background"),
    "comparison": ("shape", "size", "count"),
    "arithmetic": ("count",),
    "negation": ("shape", "colour", "size", "motion", "background"),
    "opposite": ("size", "motion", "background"),
    "two hops": ("shape", "colour", "size", "motion", "count", "background"),
}
# What has more facts is hinted at more often, so that each fact is as frequent as another.
FIELD_WEIGHTS = {"shape": 3, "colour": 5, "size": 1, "motion": 3, "count": 2, "background": 3}
MAX_PROMPT_WORDS = 45
MAX_REASONING_WORDS = 50


@dataclass(frozen=True)
class Hint:
    """Words for the value of one field, with the steps that solve them."""

    text: str
    steps: tuple[str, ...]
    uses_held_out_fact: bool = False


@dataclass(frozen=True)
class HintQuery:
    """What a hint is for: a field and its value, the words that agree, and whether its facts are held-out ones."""

    field: str
    value: str
    words: Mapping[str, str]
    wants_held_out: bool

    def write(self, rng: random.Random, forms: Sequence[str], thing: str) -> str:
        """Return one of the forms, filled in."""
        return rng.choice(forms).format(x=thing, **self.words)


# ---------------------------------------------------------------- hints


def choose_fact(rng: random.Random, kind: str, value: str, wants_held_out: bool) -> Fact | None:
    facts = FACTS_BY_VALUE.get((kind, value, wants_held_out))
    return rng.choice(facts) if facts else None


def hint_by_association(rng: random.Random, query: HintQuery) -> Hint | None:
    kind = "number" if query.field == "count" else query.field
    fact = choose_fact(rng, kind, query.value, query.wants_held_out)
    if fact is None:
        return None
    text = query.write(rng, ASSOCIATION_FORMS[query.field], fact.thing)
    return Hint(text, (fact.statement,), fact.is_held_out)


def hint_by_comparison(rng: random.Random, query: HintQuery) -> Hint | None:
    comparisons = COMPARISON_STEPS.get((query.field, query.value))
    if comparisons is None:
        return None
    comparison = rng.choice(comparisons)
    result = add_article(query.value) if query.field == "shape" else query.value
    return Hint(query.write(rng, COMPARISON_FORMS[query.field], comparison), (f"{comparison} is {result}",))


def hint_by_arithmetic(rng: random.Random, query: HintQuery) -> Hint | None:
    fact = choose_fact(rng, "arithmetic", query.value, query.wants_held_out)
    if fact is None:
        return None
    return Hint(query.write(rng, ARITHMETIC_FORMS, fact.thing), (fact.statement,), fact.is_held_out)


@cache
def list_alternatives(field: str, value: str, wants_held_out: bool) -> tuple[str, ...]:
    """Return the values that can stand beside this one in "red or blue"; every third pair is held out."""
    values = {"shape": SHAPES, "colour": tuple(COLOURS), "motion": MOTIONS, "background": tuple(BACKGROUNDS)}[field]
    index = values.index(value)
    others = [other for other in range(len(values)) if other != index]
    return tuple(values[other] for other in others if ((index + other) % 3 == 2) == wants_held_out)


def hint_by_exclusion(rng: random.Random, query: HintQuery) -> Hint | None:
    """Return a hint that excludes all other values, where there are few: "not large", "neither a circle nor ..."."""
    if query.field == "size":
        other = OPPOSITES[query.value]
        form = rng.choice(("not {x}", "{it} {is} not {x}", "that {is} not {x}"))
        return Hint(form.format(x=other, **query.words), (f"not {other} is {query.value}",))
    if query.field == "shape":
        first, second, third = rng.sample([add_article(shape) for shape in SHAPES if shape != query.value], 3)
        text = f"neither {first}, {second} nor {third}"
        return Hint(f"that {query.words['is']} {text}", (f"{text} is {add_article(query.value)}",))
    if query.field == "motion" and query.value == "still":
        form = rng.choice(("{it} {does} not move", "without moving", "{it} {does} not go anywhere"))
        return Hint(form.format(**query.words), ("not moving is still",))
    return None


def hint_by_negation(rng: random.Random, query: HintQuery) -> Hint | None:
    """Return a hint with two values of which one is excluded, or one that excludes all other values."""
    if query.field == "size" or (query.field in ("shape", "motion") and rng.random() < 0.35):
        return hint_by_exclusion(rng, query)
    others = list_alternatives(query.field, query.value, query.wants_held_out)
    if not others:
        return None
    excluded = rng.choice(others)
    first, second = rng.sample((query.value, excluded), 2)

    def write_value(value: str) -> str:
        if query.field == "shape":
            return add_article(value)
        return MOTION_VALUE_WORDS[value] if query.field == "motion" else value

    alternatives = rng.choice(ALTERNATIVE_FORMS).format(
        a=write_value(first), b=write_value(second), c=write_value(excluded)
    )
    names = [
        add_article(value) if query.field == "shape" else value for value in (first, second, excluded, query.value)
    ]
    step = "{} or {} but not {} is {}".format(*names)
    return Hint(query.write(rng, NEGATION_FORMS[query.field], alternatives), (step,), query.wants_held_out)


def hint_by_opposite(rng: random.Random, query: HintQuery) -> Hint | None:
    other = OPPOSITES.get(query.value)
    if other is None:
        return None
    word = MOTION_VALUE_WORDS[other] if query.field == "motion" else other
    return Hint(query.write(rng, OPPOSITE_FORMS[query.field], word), (get_opposite_fact(query.value).statement,))


def index_second_hops() -> dict[tuple[str, str, bool], tuple[tuple[Fact, Fact], ...]]:
    """Return pairs of facts by (field, value, held out): "monkeys eat a banana" and "a banana is yellow".

    A pair for training has no held-out fact; in a held-out pair, the first fact is held out.
    """
    fields = ("shape", "colour", "background")
    facts_by_thing = {fact.thing: fact for fact in FACTS if fact.kind in fields}
    pairs: dict[tuple[str, str, bool], list[tuple[Fact, Fact]]] = defaultdict(list)
    for hop in FACTS:
        if hop.kind == "second hop":
            fact = facts_by_thing[hop.value]
            if hop.is_held_out or not fact.is_held_out:
                pairs[fact.kind, fact.value, hop.is_held_out].append((hop, fact))
    return {key: tuple(group) for key, group in pairs.items()}


SECOND_HOPS_BY_VALUE = index_second_hops()


def hint_by_number_hop(rng: random.Random, query: HintQuery) -> Hint | None:
    """Return a hint that continues from a number of parts: "one more circle than a bicycle has wheels"."""
    rule = rng.choice(list(CONTINUATION_FORMS))
    target = COUNTS.index(query.value) + 1
    number = {
        "one more than": target - 1, "one less than": target + 1, "half of": target * 2,
        "twice": target // 2 if target % 2 == 0 else 0,
    }[rule]  # fmt: skip
    if not 1 <= number <= len(COUNTS):
        return None
    number_word = COUNTS[number - 1]
    fact = choose_fact(rng, "number", number_word, query.wants_held_out)
    if fact is None:
        return None
    step = f"{rule} {number_word} is {query.value}"
    text = query.write(rng, CONTINUATION_FORMS[rule], fact.thing)
    return Hint(text, (fact.statement, step), fact.is_held_out)


def hint_by_opposite_hop(rng: random.Random, query: HintQuery) -> Hint | None:
    """Return a hint by the opposite of a thing's size, motion or colour: "the opposite size of an ant"."""
    other = OPPOSITES.get(query.value)
    fact = choose_fact(rng, query.field, other, query.wants_held_out) if other else None
    if fact is None:
        return None
    text = query.write(rng, OPPOSITE_HOP_FORMS[query.field], fact.thing)
    return Hint(text, (fact.statement, get_opposite_fact(query.value).statement), fact.is_held_out)


def hint_by_two_hops(rng: random.Random, query: HintQuery) -> Hint | None:
    if query.field == "count":
        return hint_by_number_hop(rng, query)
    if query.field in ("size", "motion") or (query.value in OPPOSITES and rng.random() < 0.5):
        return hint_by_opposite_hop(rng, query)
    pairs = SECOND_HOPS_BY_VALUE.get((query.field, query.value, query.wants_held_out))
    if not pairs:
        return None
    hop, fact = rng.choice(pairs)
    return Hint(
        query.write(rng, ASSOCIATION_FORMS[query.field], hop.thing), (hop.statement, fact.statement), hop.is_held_out
    )


HINT_MAKERS: dict[str, Callable[[random.Random, HintQuery], Hint | None]] = {
    "association": hint_by_association,
    "comparison": hint_by_comparison,
    "arithmetic": hint_by_arithmetic,
    "negation": hint_by_negation,
    "opposite": hint_by_opposite,
    "two hops": hint_by_two_hops,
}


# ---------------------------------------------------------------- requests


@dataclass(frozen=True)
class IndirectRequest:
    """An indirect prompt, the reasoning that solves it, its plain rewrite, and the content that it requests.

    `kinds` are the kinds of its hints, in the order of `KINDS`.
    """

    prompt: str
    reasoning: str
    rewrite: str
    scene_spec: SceneSpec
    kinds: tuple[str, ...]


def has_held_out_combination(kinds: Sequence[str]) -> bool:
    return any(first in kinds and second in kinds for first, second in HELD_OUT_COMBINATIONS)


def check_kinds(split: RequestSplit, kinds: Sequence[str]) -> None:
    """Raise an error if no request of the split has exactly these kinds."""
    if not kinds or not set(kinds) <= set(KINDS) or len(kinds) > 3:
        raise ValueError(f"kinds must be one to three of {KINDS}, not {tuple(kinds)}")
    if has_held_out_combination(kinds) != (split == "held_out_combinations"):
        raise ValueError(f"split {split!r} has no requests with the kinds {tuple(kinds)}")
    if split == "held_out" and not set(kinds) & set(KINDS_WITH_HELD_OUT_FACTS):
        raise ValueError(f"the kinds {tuple(kinds)} have no held-out facts")


def sample_kinds(rng: random.Random, split: RequestSplit, kinds: Sequence[str] | None) -> list[str]:
    """Return the kinds of one to three hints; if `kinds` is given, exactly these, some of them repeatedly."""
    count = rng.choices((1, 2, 3), (4, 5, 2))[0]
    if kinds is not None:
        return [*kinds, *rng.choices(kinds, k=max(0, count - len(kinds)))]
    if split == "held_out_combinations":
        return [*rng.choice(HELD_OUT_COMBINATIONS), *rng.choices(KINDS, KIND_WEIGHTS, k=rng.random() < 0.3)]
    return rng.choices(KINDS, KIND_WEIGHTS, k=count)


def sample_plan(rng: random.Random, is_video: bool, split: RequestSplit, kinds: Sequence[str] | None) -> dict[str, str]:
    """Return the fields that are hinted at, each with the kind of its hint."""
    while True:
        chosen = sample_kinds(rng, split, kinds)
        if has_held_out_combination(chosen) != (split == "held_out_combinations"):
            continue
        plan: dict[str, str] = {}
        for kind in sorted(chosen, key=lambda name: len(FIELDS_BY_KIND[name])):
            fields = [field for field in FIELDS_BY_KIND[kind] if field not in plan and (is_video or field != "motion")]
            if not fields:
                break
            plan[rng.choices(fields, [FIELD_WEIGHTS[field] for field in fields])[0]] = kind
        if len(plan) == len(chosen):
            return plan


def sample_values(rng: random.Random, is_video: bool, plan: Mapping[str, str]) -> dict[str, str] | None:
    """Return the values of the fields, without the size or the background if they stay open; None if held out."""
    background = rng.choice(list(BACKGROUNDS))
    colour = rng.choice([name for name in COLOURS if name != background])
    motion = rng.choice(MOTIONS) if is_video else "still"
    shape, size = rng.choice(SHAPES), rng.choice(SIZES)
    has_size = motion not in ("growing", "shrinking") and ("size" in plan or rng.random() < 0.5)
    if ("size" in plan and not has_size) or is_held_out(
        SceneObject(shape, colour, get_initial_size(motion, size), motion, 0, 0)
    ):
        return None
    counts = COUNTS[:3] if is_video else COUNTS
    is_counted = "count" in plan or rng.random() < 0.25
    values = {"shape": shape, "colour": colour, "count": rng.choice(counts) if is_counted else "one"}
    if has_size:
        values["size"] = size
    if is_video:
        values["motion"] = motion
    if "background" in plan or rng.random() < 0.35:
        values["background"] = background
    return values


def sample_nouns(rng: random.Random, values: Mapping[str, str], plan: Mapping[str, str]) -> dict[str, str]:
    """Return the noun phrase with the attributes that are named directly, in the singular and in the plural."""
    adjectives = [
        rng.choice(table[values[field]])
        for field, table in (("size", SIZE_WORDS), ("colour", COLOUR_WORDS))
        if field in values and field not in plan
    ]
    is_hinted = "shape" in plan
    noun = rng.choice(("shape", "shape", "thing", "object", "figure") if is_hinted else SHAPE_WORDS[values["shape"]])
    return {"noun": " ".join([*adjectives, noun]), "nouns": " ".join([*adjectives, pluralize(noun)])}


def write_head(
    rng: random.Random, values: Mapping[str, str], nouns: Mapping[str, str], hints: Mapping[str, Hint]
) -> str:
    """Return the number and the noun, with the hint at the shape."""
    if "count" in hints:
        text = hints["count"].text
        return f"{text}, {hints['shape'].text}" if "shape" in hints else text
    text = add_article(nouns["noun"]) if values["count"] == "one" else f"{values['count']} {nouns['nouns']}"
    return f"{text} {hints['shape'].text}" if "shape" in hints else text


def join_hints(
    rng: random.Random, values: Mapping[str, str], nouns: Mapping[str, str], hints: Mapping[str, Hint]
) -> tuple[str, list[str]]:
    """Return the prompt, and the hinted fields in its order."""
    text = write_head(rng, values, nouns, hints)
    clauses = [(field, hints[field].text) for field in ("colour", "size", "motion") if field in hints]
    if "motion" in values and "motion" not in hints:
        motion = rng.choice([word for word in MOTION_WORDS[values["motion"]] if word])
        motion = motion.replace("that does", "that do") if values["count"] != "one" else motion
        if rng.random() < 0.6 and "count" not in hints:
            text += f" {motion}"
        else:
            clauses.append(("", motion))
    rng.shuffle(clauses)
    order = [field for field in ("count", "shape") if field in hints] + [field for field, _ in clauses if field]
    text = ", ".join([text, *(clause for _, clause in clauses)])
    if "background" in hints:
        return f"{text}, {hints['background'].text}", [*order, "background"]
    if "background" in values:
        words = rng.choice(BACKGROUND_PHRASES).format(rng.choice(BACKGROUND_WORDS[values["background"]]))
        text += f", {words}" if hints else f" {words}"
    return text, order


def build_scene_spec(values: Mapping[str, str]) -> SceneSpec:
    object_spec = ObjectSpec(
        shape=values["shape"], colour=values["colour"], size=values.get("size"), motion=values.get("motion")
    )
    count = COUNTS.index(values["count"]) + 1
    return SceneSpec(objects=(object_spec,) * count, background=values.get("background"))


def sample_hints(
    rng: random.Random, values: Mapping[str, str], nouns: Mapping[str, str], plan: Mapping[str, str], held_out: bool
) -> dict[str, Hint] | None:
    """Return the hints of a plan, or None if a value has no hint of its kind."""
    words = {**(SINGULAR_WORDS if values["count"] == "one" and "count" not in plan else PLURAL_WORDS), **nouns}
    hints = {}
    for field, kind in plan.items():
        hint = HINT_MAKERS[kind](rng, HintQuery(field, values[field], words, held_out))
        if hint is None:
            return None
        hints[field] = hint
    return hints


def sample_indirect_request(
    rng: random.Random, is_video: bool, split: RequestSplit = "train", kinds: Sequence[str] | None = None
) -> IndirectRequest:
    """Return an indirect request for one object, or for several equal objects.

    A request of the split "held_out" has a held-out fact in every hint that has facts, and at least one; those of
    "held_out_combinations" have trained facts only. If `kinds` is given, the hints have exactly these kinds; a
    ValueError tells that the split has no such request.
    """
    if kinds is not None:
        check_kinds(split, kinds)
    while True:
        plan = sample_plan(rng, is_video, split, kinds)
        values = sample_values(rng, is_video, plan)
        if values is None:
            continue
        nouns = sample_nouns(rng, values, plan)
        hints = sample_hints(rng, values, nouns, plan, split == "held_out")
        if hints is None or (split == "held_out" and not any(hint.uses_held_out_fact for hint in hints.values())):
            continue
        prompt, order = join_hints(rng, values, nouns, hints)
        reasoning = "; ".join(step for field in order for step in hints[field].steps)
        if len(prompt.split()) <= MAX_PROMPT_WORDS and len(reasoning.split()) <= MAX_REASONING_WORDS:
            scene_spec = build_scene_spec(values)
            found_kinds = tuple(kind for kind in KINDS if kind in plan.values())
            return IndirectRequest(prompt, reasoning, to_canonical_text(scene_spec), scene_spec, found_kinds)
