"""The list of things that people say is complete, balanced and consistent, and the judge judges every behaviour."""

import hashlib
import random
import re
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from omnivideo.evaluation.phrases.entries import (
    Command,
    Edit,
    ExpectedScene,
    Generate,
    Half,
    Kind,
    Phrase,
    StepSequence,
    load_phrases,
)
from omnivideo.evaluation.phrases.judge import PhraseOutcome, judge_phrase
from omnivideo.presets import StandardTask
from omnivideo.synthetic.facts import ObjectDetection, SceneDetection
from omnivideo.synthetic.questions import QUESTION_WEIGHTS, sample_question
from omnivideo.synthetic.requests import sample_requests
from omnivideo.synthetic.scenes import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, sample_scene

ROOT = Path(__file__).parents[2]
HALVES = get_args(Half)
TASKS = frozenset(get_args(StandardTask))
TODAY = TASKS | {f"edit:{kind}" for kind in ("recolour", "reshape", "add", "remove", "background", "motion")}


@cache
def load_all():
    return tuple(phrase for half in HALVES for phrase in load_phrases(half))


def iterate_steps(phrase):
    """Yield every step of every reaction that a phrase allows."""
    for case in phrase.expect:
        for reaction in case.any_of:
            yield from reaction.steps if isinstance(reaction, StepSequence) else (reaction,)


def count_results(phrase):
    """Return the number of results before a phrase; only a question gives none."""
    return sum(not message.endswith("?") for message in phrase.before)


# ---------------------------------------------------------------- the list


@pytest.mark.parametrize("half", HALVES)
def test_each_half_has_at_least_a_hundred_valid_entries(half):
    assert len(load_phrases(half)) >= 110


def test_an_invalid_entry_is_refused():
    good = load_phrases("development")[0].model_dump(mode="json")
    Phrase.model_validate(good)
    for bad in ({"kind": "chat"}, {"expect": []}, {"other": 1}):
        with pytest.raises(ValidationError):
            Phrase.model_validate(good | bad)
    always = {"any_of": [{"behaviour": "ask"}]}
    for cases in ([always, always], [always | {"requires": ["text-to-image"]}]):
        with pytest.raises(ValidationError, match="exactly the last case"):
            Phrase.model_validate(good | {"expect": cases})


def test_ids_and_texts_are_unique():
    assert len({phrase.id for phrase in load_all()}) == len(load_all())
    texts = Counter(" ".join(phrase.text.casefold().split()) for phrase in load_all())
    assert not [text for text, count in texts.items() if count > 1]


def test_each_kind_is_in_both_halves_in_similar_numbers():
    development, held_out = (Counter(phrase.kind for phrase in load_phrases(half)) for half in HALVES)
    assert development.keys() == held_out.keys() == set(get_args(Kind))
    for kind in get_args(Kind):
        assert abs(development[kind] - held_out[kind]) <= 2
        assert development[kind] + held_out[kind] >= 16


def test_the_halves_are_divided_by_the_digests_of_the_ids():
    """Within each kind, in the order of the digests, every other entry is held out."""
    for kind in get_args(Kind):
        ids = sorted(
            (phrase.id for phrase in load_all() if phrase.kind == kind),
            key=lambda name: hashlib.sha256(name.encode()).hexdigest(),
        )
        held_out = {phrase.id for phrase in load_phrases("held_out") if phrase.kind == kind}
        assert held_out == set(ids[1::2])


@cache
def collect_vocabulary():
    """Return every word of many requests, edits and questions of the world."""
    texts = [request.text for task in get_args(StandardTask) for request in sample_requests(0, task, 1500)]
    rng = random.Random("vocabulary")
    scenes = (sample_scene(rng, is_video) for _ in range(600) for is_video in (False, True))
    texts += [sample_question(rng, scene, QUESTION_WEIGHTS).text for scene in scenes]
    return {word for text in texts for word in split_words(text)}


def split_words(text):
    return re.findall(r"[^\s,.;?]+", text)


def test_conversations_before_a_phrase_are_in_the_words_of_the_world():
    unknown = {
        word for phrase in load_all() for text in phrase.before for word in split_words(text)
    } - collect_vocabulary()
    assert not unknown


def test_expectations_name_results_that_exist():
    for phrase in load_all():
        earlier = count_results(phrase)
        for step in iterate_steps(phrase):
            numbers = step.sources if isinstance(step, Edit) else ()
            if isinstance(step, Command):
                numbers = tuple(number for number in (step.arguments.get("which"), step.current) if number)
            assert all(1 <= number <= earlier for number in numbers), phrase.id
            assert earlier or step.behaviour != "edit" or phrase.kind == "several", phrase.id


def test_expectations_state_facts_of_the_world():
    for phrase in load_all():
        for step in iterate_steps(phrase):
            scene = step.scene if isinstance(step, Generate | Edit) else None
            for obj in scene.objects if scene else ():
                assert obj.shape in (None, *SHAPES), phrase.id
                assert obj.colour in (None, *COLOURS), phrase.id
                assert set(obj.motion.split(" then ") if obj.motion else ()) <= set(MOTIONS), phrase.id
                assert obj.motion is None or step.medium == "video", phrase.id
                assert scene.background in (None, *BACKGROUNDS), phrase.id
                assert scene.background is None or scene.background != obj.colour, phrase.id


def test_results_need_a_capability():
    """Without any capability a phrase never has to generate anything."""
    for phrase in load_all():
        last = phrase.expect[-1].any_of
        assert any(not isinstance(reaction, Generate | Edit | StepSequence) for reaction in last), phrase.id


def test_patterns_are_regular_expressions():
    for phrase in load_all():
        for step in iterate_steps(phrase):
            assert all(re.compile(pattern) for pattern in step.patterns)


def test_the_list_is_in_the_package():
    artifacts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["artifacts"]
    assert "omnivideo/**/*.jsonl" in artifacts


# ---------------------------------------------------------------- the judge

RED_CIRCLE = SceneDetection("black", (ObjectDetection("circle", "red", "small", "still", 31, 31),), 1.0)
BLUE_CIRCLE = SceneDetection("black", (ObjectDetection("circle", "blue", "small", "still", 31, 31),), 1.0)


def build_phrase(*cases):
    """Return a phrase from cases, or from the reactions of its only case."""
    expect = cases if "any_of" in cases[0] else [{"any_of": list(cases)}]
    return Phrase.model_validate({"id": "x", "kind": "command", "text": "x", "expect": expect})


def artifact(number, facts=None, *, sources=(), medium="image", frames=1):
    return {"number": number, "medium": medium, "frames": frames, "sources": sources, "facts": facts}


def judge(phrase, capabilities=TODAY, **outcome):
    verdict = judge_phrase(phrase, PhraseOutcome(**outcome), capabilities)
    assert bool(verdict.reason) == (verdict.judgement != "right")
    return verdict.judgement


SCENE = {"objects": [{"shape": "circle", "colour": "blue"}], "background": "black"}
GENERATE = {"behaviour": "generate", "medium": "image", "scene": SCENE}
EDIT = {"behaviour": "edit", "medium": "image", "scene": SCENE}
ASK, DECLINE, ANSWER = {"behaviour": "ask"}, {"behaviour": "decline"}, {"behaviour": "answer"}


def test_judging_a_new_result():
    phrase = build_phrase(GENERATE)
    assert judge(phrase, artifacts=[artifact(1, BLUE_CIRCLE)]) == "right"
    assert judge(phrase, artifacts=[artifact(1)]) == "right"  # without facts only the behaviour counts
    assert judge(phrase, artifacts=[artifact(1, RED_CIRCLE)]) == "wrong_clip"
    assert judge(phrase, artifacts=[artifact(1, BLUE_CIRCLE, medium="video", frames=9)]) == "wrong_clip"
    assert judge(phrase, artifacts=[artifact(3, BLUE_CIRCLE, sources=[2])], earlier=2) == "wrong_clip"
    assert judge(phrase, artifacts=[artifact(1, BLUE_CIRCLE), artifact(2, RED_CIRCLE)]) == "wrong_clip"
    assert judge(phrase, reply="What do you mean?", is_question=True) == "wrong_other"
    assert judge(phrase, reply="I cannot do that.", declined=True) == "wrong_other"


def test_judging_an_edit():
    phrase = build_phrase(EDIT)
    assert judge(phrase, artifacts=[artifact(3, BLUE_CIRCLE, sources=[2])], earlier=2) == "right"
    assert judge(phrase, artifacts=[artifact(3, RED_CIRCLE, sources=[2])], earlier=2) == "wrong_clip"
    assert judge(phrase, artifacts=[artifact(3, BLUE_CIRCLE, sources=[1])], earlier=2) == "wrong_clip"
    assert judge(phrase, artifacts=[artifact(3, BLUE_CIRCLE)], earlier=2) == "wrong_clip"
    assert judge(phrase, artifacts=[artifact(3, sources=[1])], earlier=2) == "wrong_clip"
    assert judge(phrase, earlier=2) == "wrong_other"
    edited = [artifact(3, BLUE_CIRCLE, sources=[2])]
    assert judge(phrase, artifacts=edited, commands=[{"name": "undo"}], earlier=2) == "right"
    assert judge(phrase, artifacts=edited, commands=[{"name": "restart"}], earlier=2) == "wrong_other"
    of_the_first = build_phrase(EDIT | {"sources": [1]})
    assert judge(of_the_first, artifacts=[artifact(3, BLUE_CIRCLE, sources=[1])], earlier=2) == "right"
    assert judge(of_the_first, artifacts=[artifact(3, BLUE_CIRCLE, sources=[2])], earlier=2) == "wrong_clip"


def test_an_edit_may_take_two_steps():
    phrase = build_phrase(EDIT)
    first, second = artifact(2, RED_CIRCLE, sources=[1]), artifact(3, BLUE_CIRCLE, sources=[2])
    assert judge(phrase, artifacts=[first, second], earlier=1) == "right"
    unrelated = artifact(3, BLUE_CIRCLE, sources=[1])
    assert judge(phrase, artifacts=[first, unrelated], earlier=1) == "wrong_clip"


def test_judging_a_result_of_several_sources():
    phrase = build_phrase({"behaviour": "edit", "medium": "video", "sources": [2, 1], "frames": [17]})
    facts = RED_CIRCLE
    options = {"medium": "video", "frames": 17}
    assert judge(phrase, artifacts=[artifact(3, facts, sources=[2, 1], **options)], earlier=2) == "right"
    assert judge(phrase, artifacts=[artifact(3, facts, sources=[1, 2], **options)], earlier=2) == "wrong_clip"
    short = artifact(3, facts, sources=[2, 1], medium="video", frames=9)
    assert judge(phrase, artifacts=[short], earlier=2) == "wrong_clip"


def test_judging_an_answer():
    phrase = build_phrase(ANSWER | {"patterns": [r"\bblue\b"]})
    assert judge(phrase, reply="It is Blue.") == "right"
    assert judge(phrase, reply="It is red.") == "wrong_other"
    assert judge(phrase, reply="Is it blue?", is_question=True) == "wrong_other"
    assert judge(phrase, reply="I cannot say blue.", declined=True) == "wrong_other"
    assert judge(phrase, reply="blue", artifacts=[artifact(1, BLUE_CIRCLE)]) == "wrong_clip"
    assert judge(phrase, reply="blue", commands=[{"name": "undo"}]) == "wrong_other"
    assert judge(phrase, reply="blue", commands=[{"name": "recap"}]) == "right"
    assert judge(build_phrase(ANSWER), reply=" ") == "wrong_other"


def test_judging_a_question_and_a_refusal():
    asking, declining = build_phrase(ASK), build_phrase(DECLINE | {"patterns": ["english"]})
    assert judge(asking, reply="Which one?", is_question=True) == "right"
    assert judge(asking, reply="The blue one.") == "wrong_other"
    assert judge(asking, reply="?", is_question=True, artifacts=[artifact(1)]) == "wrong_clip"
    assert judge(declining, reply="Sorry, I only know English.", declined=True) == "right"
    assert judge(declining, reply="Sorry, no.", declined=True) == "wrong_other"
    assert judge(declining, reply="english") == "wrong_other"
    assert judge(declining, reply="english", declined=True, artifacts=[artifact(1)]) == "wrong_clip"


def test_judging_a_command():
    undo = build_phrase({"behaviour": "command", "name": "undo", "current": 1})
    assert judge(undo, commands=[{"name": "undo"}], earlier=2, current=1) == "right"
    assert judge(undo, commands=[{"name": "undo"}], earlier=2, current=2) == "wrong_other"
    assert judge(undo, commands=[{"name": "restart"}], current=1) == "wrong_other"
    assert judge(undo, reply="Done.", current=1) == "wrong_other"
    assert judge(undo, artifacts=[artifact(3, RED_CIRCLE)], earlier=2, current=3) == "wrong_clip"
    save = build_phrase({"behaviour": "command", "name": "save", "arguments": {"file": "a.mp4"}})
    assert judge(save, commands=[{"name": "save", "arguments": {"file": "A.mp4", "format": "mp4"}}]) == "right"
    assert judge(save, commands=[{"name": "save", "arguments": {"file": "b.mp4"}}]) == "wrong_other"
    assert judge(save, commands=[{"name": "save"}]) == "wrong_other"


def test_judging_variations():
    expected = {"behaviour": "command", "name": "vary", "arguments": {"count": 2}, "results": GENERATE | {"count": 2}}
    phrase, command = build_phrase(expected), {"name": "vary", "arguments": {"count": 2}}
    made = [artifact(3, BLUE_CIRCLE, sources=[1]), artifact(4, BLUE_CIRCLE, sources=[1])]
    assert judge(phrase, commands=[command], artifacts=made, earlier=2) == "right"
    assert judge(phrase, commands=[command], artifacts=made[:1], earlier=2) == "wrong_clip"
    assert judge(phrase, commands=[command], artifacts=[*made, artifact(5, BLUE_CIRCLE)], earlier=2) == "wrong_clip"
    assert judge(phrase, artifacts=made, earlier=2) == "wrong_other"
    assert judge(phrase, commands=[command], earlier=2) == "wrong_other"
    any_number = build_phrase({"behaviour": "command", "name": "vary", "results": GENERATE | {"count": None}})
    for count in (1, 2):
        assert judge(any_number, commands=[{"name": "vary"}], artifacts=made[:count], earlier=2) == "right"
    assert judge(any_number, commands=[{"name": "vary"}], earlier=2) == "wrong_other"
    assert (
        judge(any_number, commands=[{"name": "vary"}], artifacts=[artifact(3, RED_CIRCLE)], earlier=2) == "wrong_clip"
    )


def test_judging_a_sequence():
    phrase = build_phrase({"behaviour": "sequence", "steps": [
        GENERATE | {"scene": None}, EDIT, ANSWER | {"patterns": ["one"]},
    ]})  # fmt: skip
    made = [artifact(1, RED_CIRCLE), artifact(2, BLUE_CIRCLE, sources=[1])]
    assert judge(phrase, artifacts=made, reply="There is one circle.") == "right"
    assert judge(phrase, artifacts=made, reply="There are two circles.") == "wrong_other"
    assert judge(phrase, artifacts=made[:1], reply="one") == "wrong_clip"
    assert judge(phrase, reply="one") == "wrong_other"
    assert judge(phrase, artifacts=[made[0], artifact(2, BLUE_CIRCLE)], reply="one") == "wrong_clip"


def test_the_most_favourable_reaction_counts():
    phrase = build_phrase(ASK, GENERATE | {"patterns": ["sorry"]})
    assert judge(phrase, is_question=True) == "right"
    assert judge(phrase, artifacts=[artifact(1, BLUE_CIRCLE)], reply="sorry") == "right"
    assert judge(phrase, artifacts=[artifact(1, BLUE_CIRCLE)]) == "wrong_other"
    assert judge(phrase, artifacts=[artifact(1, RED_CIRCLE)], reply="sorry", is_question=True) == "wrong_clip"


def test_the_capabilities_select_the_case():
    needs = {"requires": ["image-editing", "edit:resize"], "any_of": [EDIT]}
    phrase = build_phrase(needs, {"any_of": [DECLINE]})
    edited = {"artifacts": [artifact(2, BLUE_CIRCLE, sources=[1])], "earlier": 1}
    assert judge(phrase, TODAY, declined=True) == "right"
    assert judge(phrase, TODAY, **edited) == "wrong_clip"
    assert judge(phrase, TODAY | {"edit:resize"}, **edited) == "right"
    assert judge(phrase, TODAY | {"edit:resize"}, declined=True) == "wrong_other"


def detect(*objects, background="grey"):
    return SceneDetection(background, objects, 1.0)


def judge_scene(scene, detection):
    expected = ExpectedScene.model_validate(scene).model_dump()
    phrase = build_phrase({"behaviour": "generate", "medium": "video", "scene": expected})
    return judge(phrase, artifacts=[artifact(1, detection, medium="video", frames=9)]) == "right"


def test_facts_of_objects_and_of_the_scene():
    star = ObjectDetection("star", "red", "large", "left", 15, 15)
    box = ObjectDetection("square", "blue", "small", "still", 49, 15)
    both = {"objects": [{"shape": "square"}, {"shape": "star", "colour": "red", "size": "large", "motion": "left"}]}
    assert judge_scene(both, detect(star, box))
    assert judge_scene(both | {"relation": "right of", "background": "grey"}, detect(star, box))
    assert not judge_scene(both | {"relation": "left of"}, detect(star, box))
    assert not judge_scene(both | {"background": "black"}, detect(star, box))
    assert not judge_scene(both, detect(star))
    assert not judge_scene(both, detect(star, box, box))
    only_star = {"objects": [{"shape": "star"}]}
    assert judge_scene(only_star | {"region": ["top", "left"]}, detect(star))
    assert not judge_scene(only_star | {"region": ["bottom"]}, detect(star))
    for name, value in (("colour", "blue"), ("size", "small"), ("motion", "right"), ("motion", "left then up")):
        assert not judge_scene({"objects": [{"shape": "star", name: value}]}, detect(star)), name


def test_speed_and_a_second_motion_are_read_where_the_scorer_reports_them():
    ball = ObjectDetection("circle", "red", "small", "right", 15, 31, "fast", "up")
    plain = ObjectDetection("circle", "red", "small", "right", 15, 31, "normal")
    two_legs = {"objects": [{"motion": "right then up", "speed": "fast"}]}
    assert judge_scene(two_legs, detect(ball))
    assert not judge_scene(two_legs, detect(plain))
    assert not judge_scene({"objects": [{"motion": "right"}]}, detect(ball))
    assert not judge_scene({"objects": [{"speed": "slow"}]}, detect(ball))


def test_an_assistant_that_always_asks_or_always_draws_does_badly():
    """The list rewards neither: what can be done must be done, and nothing else."""
    verdicts = {"asks": Counter(), "declines": Counter(), "draws": Counter()}
    for phrase in load_all():
        earlier = count_results(phrase)
        for name, outcome in (
            ("asks", {"reply": "What would you like?", "is_question": True}),
            ("declines", {"reply": "Sorry, I cannot do that.", "declined": True}),
            ("draws", {"artifacts": [artifact(earlier + 1, RED_CIRCLE)]}),
        ):
            outcome = PhraseOutcome(**outcome, earlier=earlier, current=earlier)
            verdicts[name][judge_phrase(phrase, outcome, TODAY).judgement] += 1
    assert verdicts["asks"]["right"] < 0.6 * len(load_all())
    assert verdicts["declines"]["right"] < 0.5 * len(load_all())
    assert verdicts["draws"]["wrong_clip"] > 0.9 * len(load_all())
