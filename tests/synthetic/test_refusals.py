"""Refusals and contradictions, checked from the words of their texts."""

import random
import re
from collections import defaultdict

import pytest

from omnivideo.synthetic.captions import (
    BACKGROUND_WORDS,
    COLOUR_WORDS,
    MOTION_WORDS,
    NUMBER_WORDS,
    SHAPE_WORDS,
    pluralize,
)
from omnivideo.synthetic.contradictions import (
    EDIT_SIZE_WORDS,
    FORMS_BY_KIND,
    MOTION_NAMES,
    STILL_WORDS,
    sample_contradiction,
)
from omnivideo.synthetic.edits import sample_edit
from omnivideo.synthetic.foreign_requests import HELD_OUT_LANGUAGES, LANGUAGES
from omnivideo.synthetic.indirect_requests import sample_indirect_request
from omnivideo.synthetic.refusals import FORMS, REPLIES, WORDS, sample_refusal
from omnivideo.synthetic.requests import make_caption_prompt, make_indirect_prompt

WORLD_COLOURS = {word for words in COLOUR_WORDS.values() for word in words}
WORLD_BACKGROUNDS = {word for words in BACKGROUND_WORDS.values() for word in words}
MINIMUM_WORDS = {"object": 200, "colour": 40, "place": 60, "motion": 40, "effect": 80, "number": 20}


def split_words(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text)


def contains(text: str, phrase: str) -> bool:
    return phrase in text and re.search(rf"(?<![\w-]){re.escape(phrase)}(?![\w-])", text) is not None


@pytest.fixture(scope="module")
def legitimate_texts() -> set[str]:
    rng = random.Random("legitimate")
    texts = set()
    for index in range(4000):
        is_video = index % 2 == 0
        texts.add(make_caption_prompt(rng, is_video)[0])
        texts.add(sample_edit(rng, is_video).instruction)
    return texts


@pytest.fixture(scope="module")
def training_texts() -> dict[str, str]:
    """Return 20,000 training refusals by category, one to a line."""
    rng = random.Random("training refusals")
    texts = defaultdict(list)
    for _ in range(20_000):
        refusal = sample_refusal(rng, "train")
        texts[refusal.category].append(refusal.text)
    return {category: "\n".join(group) for category, group in texts.items()}


def list_phrases(entry: str) -> list[str]:
    return entry.split(": ")


@pytest.mark.parametrize("kind", [*MINIMUM_WORDS, "background"])
def test_vocabulary_is_outside_the_world(kind, legitimate_texts):
    vocabulary = {word for text in legitimate_texts for word in split_words(text)}
    entries = [*WORDS["train"][kind], *WORDS["held_out"][kind]]
    assert len(set(entries)) == len(entries) >= MINIMUM_WORDS.get(kind, 0)
    for entry in entries:
        if kind == "number":
            assert entry not in NUMBER_WORDS[:5]
        elif kind == "colour":
            assert entry not in WORLD_COLOURS
            assert entry in WORLD_BACKGROUNDS or not set(split_words(entry)) <= vocabulary
        elif kind == "background":
            assert entry not in WORLD_BACKGROUNDS
            assert entry in WORLD_COLOURS or not set(split_words(entry)) <= vocabulary
        else:
            assert all(not set(split_words(phrase)) <= vocabulary for phrase in list_phrases(entry)), entry


@pytest.mark.parametrize("kind", MINIMUM_WORDS)
def test_held_out_words_never_occur_in_training(kind, training_texts):
    category = {"place": "background", "number": "amount"}.get(kind, kind)
    for entry in WORDS["held_out"][kind]:
        phrases = [f"{entry} {shape}" for shape in SHAPE_WORDS] if entry in WORLD_BACKGROUNDS else list_phrases(entry)
        assert not any(contains(training_texts[category], phrase) for phrase in phrases), entry
    shares = len(WORDS["held_out"][kind]) / (len(WORDS["train"][kind]) + len(WORDS["held_out"][kind]))
    assert 0.3 <= shares <= 0.35


@pytest.mark.parametrize("category", REPLIES)
def test_held_out_refusals_use_held_out_words(category, training_texts):
    rng = random.Random(f"held out/{category}")
    kinds = {"background": ("place", "background"), "amount": ("number",)}.get(category, (category,))
    for _ in range(300):
        refusal = sample_refusal(rng, "held_out", category)
        assert (refusal.category, refusal.answer) == (category, REPLIES[category])
        assert refusal.text not in training_texts[category].split("\n")
        if category == "language":
            forms = [form for name in HELD_OUT_LANGUAGES for form in LANGUAGES[name].forms]
            assert any(find_form(refusal.text, form) for form in forms)
        elif category not in ("object", "amount"):
            held_out = [phrase for kind in kinds for entry in WORDS["held_out"][kind] for phrase in list_phrases(entry)]
            assert any(contains(refusal.text, phrase) for phrase in held_out), refusal


def list_literals(form: str) -> list[str]:
    """Return the literal parts of a wording that are long enough to recognize it."""
    return [part.strip() for part in re.split(r"\{\w+\}", form.removeprefix("draw ").replace("{draw}", ""))]


def find_form(text: str, form: str) -> bool:
    pattern = " ?.+ ?".join(re.escape(part) for part in list_literals(form))
    return re.search(f"^{pattern}$", text, re.MULTILINE) is not None


def test_wordings_of_the_splits_are_disjoint(training_texts):
    for kind in FORMS["train"]:
        assert FORMS["held_out"][kind]
        assert not set(FORMS["train"][kind]) & set(FORMS["held_out"][kind])
    for form in FORMS["held_out"]["motion"]:
        if len(" ".join(list_literals(form)).split()) >= 4:
            assert not find_form(training_texts["motion"], form)


def test_refusals_are_no_legitimate_requests(legitimate_texts):
    rng = random.Random("indirect")
    texts = set(legitimate_texts)
    for index in range(6000):
        texts.add(sample_indirect_request(rng, index % 2 == 0).prompt)
        texts.add(make_indirect_prompt(rng, index % 2 == 0)[0])
    for split in ("train", "held_out"):
        for _ in range(10_000):
            assert sample_refusal(rng, split).text not in texts
            assert sample_contradiction(rng, split).text not in texts


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_categories_follow_from_the_words(split, legitimate_texts):
    vocabulary = {word for text in legitimate_texts for word in split_words(text)}
    rng = random.Random(f"categories/{split}")
    for _ in range(4000):
        refusal = sample_refusal(rng, split)
        words = set(split_words(refusal.text))
        numbers = [NUMBER_WORDS.index(word) if word in NUMBER_WORDS else 0 for word in split_words(refusal.text)]
        numbers += [int(word) for word in words if word.isdigit()]
        if refusal.category == "language":
            assert len(words - vocabulary) >= min(len(words), 2), refusal
        elif refusal.category == "amount":
            assert words - vocabulary or sum(numbers) >= 5, refusal
        elif refusal.category == "colour":
            assert words - vocabulary or words & WORLD_BACKGROUNDS, refusal
        elif refusal.category == "background":
            assert words - vocabulary or words & WORLD_COLOURS, refusal
        else:
            assert words - vocabulary, refusal


def list_value_words(value: str) -> list[str]:
    """Return the words in which a contradiction can mention a value of its answer."""
    shape = value.removeprefix("an ").removeprefix("a ")
    if shape in SHAPE_WORDS:
        return [form for word in SHAPE_WORDS[shape] for form in (word, pluralize(word))]
    motions = {name: key for key, name in MOTION_NAMES.items()}
    if value in motions:
        return list(MOTION_WORDS[motions[value]])
    tables = {**COLOUR_WORDS, **EDIT_SIZE_WORDS, "still": STILL_WORDS}
    return [*tables.get(value, ()), *BACKGROUND_WORDS.get(value, ()), *({value} & set(NUMBER_WORDS))]


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_contradictions_mention_both_values_in_order(split):
    rng = random.Random(f"contradictions/{split}")
    for kind in FORMS_BY_KIND:
        for _ in range(500):
            contradiction = sample_contradiction(rng, split, kind)
            first, second = contradiction.values
            assert first != second
            assert contradiction.answer == f"do you mean {first} or {second}?"
            places = [
                [
                    match.start()
                    for word in list_value_words(value)
                    for match in re.finditer(rf"(?<![\w-]){re.escape(word)}(?![\w-])", contradiction.text)
                ]
                for value in (first, second)
            ]
            assert min(places[0]) < max(places[1]), contradiction


@pytest.mark.parametrize("kind", FORMS_BY_KIND)
def test_held_out_wordings_of_contradictions_never_occur_in_training(kind):
    rng = random.Random("training contradictions")
    texts = {sample_contradiction(rng, "train", kind).text for _ in range(20_000)}
    forms = FORMS_BY_KIND[kind]
    assert len(set(forms)) == len(forms)
    assert texts.isdisjoint(sample_contradiction(rng, "held_out", kind).text for _ in range(2000))


def test_sampling_repeats_for_a_seed():
    first, second = random.Random(4), random.Random(4)
    assert [sample_refusal(first) for _ in range(50)] == [sample_refusal(second) for _ in range(50)]
    assert [sample_contradiction(first) for _ in range(50)] == [sample_contradiction(second) for _ in range(50)]
