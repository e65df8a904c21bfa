"""The rendered world says the same in pixels, words and facts; the scorer reads it without our model."""

import random
from dataclasses import replace

import numpy as np
import pytest

from omnivideo.evaluation.prompts import CATEGORIES, prompts
from omnivideo.training.edits import IMAGE_EDITS, VIDEO_EDITS, random_edit
from omnivideo.training.facts import Demand, Wanted
from omnivideo.training.language import caption, description
from omnivideo.training.latents import first_scenes
from omnivideo.training.questions import ASKS, random_question
from omnivideo.training.riddles import random_riddle
from omnivideo.training.scorer import read
from omnivideo.training.world import (
    COLOURS,
    MOTIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    held_out,
    random_scene,
    render,
    scenes,
)


def facts(things) -> list[tuple]:
    return sorted((str(t.shape), str(t.colour), t.size, str(t.motion)) for t in things)


@pytest.mark.parametrize(("video", "count"), [(False, 400), (True, 120)])
def test_scorer_reads_ground_truth(video, count):
    found = [(scene, read(render(scene))) for scene in first_scenes(scenes(77, video), count)]
    right = [
        facts(reading.things) == facts(scene.things) and reading.background == scene.background
        for scene, reading in found
    ]
    assert np.mean(right) >= 0.99
    assert np.mean([reading.steadiness for _, reading in found]) >= 0.99


@pytest.mark.parametrize("amount", [12, 30])
def test_scorer_sees_damage(amount):
    """Heavily distorted outlines have no name: the scorer does not call a smear right."""
    rng = np.random.default_rng(0)
    scene = Scene("black", (Thing("star", "red", "large", "still", 32, 32),), 1)
    frame = render(scene)[0].astype(float)
    rows = np.arange(64)[:, None]
    shift = (rng.standard_normal((64, 1)) * amount / 3).round().astype(int)
    torn = frame[rows, (np.arange(64)[None] + shift) % 64].astype(np.uint8)
    assert not Demand((Wanted("star", "red"),)).met_by(read(torn[None]))


def test_scorer_tells_motion_from_stillness():
    thing = Thing("circle", "blue", "small", "right", 8, 24)
    clip = render(Scene("white", (thing,), 9))
    assert read(clip).things[0].motion == "right"
    assert read(clip[::-1]).things[0].motion == "left"
    assert read(np.repeat(clip[:1], 9, axis=0)).things[0].motion == "still"


@pytest.mark.parametrize("composed", [0.0, 0.9])
@pytest.mark.parametrize("video", [False, True])
def test_captions_state_what_is_seen(video, composed):
    rng = random.Random(1)
    for scene in first_scenes(scenes(5, video, composed=composed), 60):
        made = caption(rng, scene, composed > 0)
        assert made.demand.met_by(read(render(scene))), made


@pytest.mark.parametrize("video", [False, True])
def test_a_composed_caption_that_says_no_place_leaves_one_layout(video):
    rng = random.Random(1)
    layouts: dict[tuple, set] = {}
    for scene in first_scenes(scenes(5, video, composed=1.0), 3000):
        demand = caption(rng, scene, composed=True).demand
        if not demand.relation and not demand.region:
            kinds = tuple((thing.size, thing.motion) for thing in scene.things)
            layouts.setdefault(kinds, set()).add(tuple((thing.x, thing.y) for thing in scene.things))
    assert len(layouts) > 10
    assert all(len(places) == 1 for places in layouts.values())


def test_a_wrong_scene_does_not_meet_the_demand():
    rng = random.Random(2)
    wrong = 0
    for scene in first_scenes(scenes(6, False), 60):
        made = caption(rng, scene)
        thing = scene.things[0]
        other = next(c for c in COLOURS if c not in {t.colour for t in scene.things} | {scene.background})
        changed = replace(scene, things=(replace(thing, colour=other), *scene.things[1:]))
        wrong += made.demand.met_by(read(render(changed)))
    assert wrong == 0


@pytest.mark.parametrize("video", [False, True])
def test_training_never_shows_a_held_out_object(video):
    for scene in first_scenes(scenes(8, video), 1500):
        assert not any(map(held_out, scene.things))
    rng = random.Random(3)
    for _ in range(400):
        edit = random_edit(rng, video)
        assert not any(map(held_out, edit.source.things + edit.target.things))


def test_the_rule_holds_out_an_eighth_and_leaves_every_word_in_training():
    everything = [Thing(s, c, z, m, 0, 0) for s in SHAPES for c in COLOURS for z in SIZES for m in MOTIONS]
    kept = [thing for thing in everything if not held_out(thing)]
    assert len(kept) == len(everything) * 7 / 8
    for field, names in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES), ("motion", MOTIONS)):
        assert {getattr(thing, field) for thing in kept} == set(names)


@pytest.mark.parametrize("kind", VIDEO_EDITS)
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_edits_change_what_is_named_and_nothing_else(kind, split):
    rng = random.Random(kind)
    for _ in range(15):
        edit = random_edit(rng, video=True, split=split, kinds=[kind])
        assert edit.demand.met_by(read(render(edit.target))), edit
        kept = [t for t in edit.source.things if t not in edit.touched]
        assert all(thing in edit.target.things for thing in kept)
        assert (edit.source.background != edit.target.background) == (kind == "background")
        assert edit.source != edit.target


def test_image_edits_are_stills():
    rng = random.Random(0)
    for kind in IMAGE_EDITS:
        assert not random_edit(rng, video=False, kinds=[kind]).target.is_video


@pytest.mark.parametrize("video", [False, True])
def test_questions_have_answers_of_every_kind(video):
    rng = random.Random(4)
    kinds = set()
    for _ in range(4000):
        scene = random_scene(rng, video)
        question = random_question(rng, scene)
        kinds.add(question.kind)
        assert question.text and question.answer
        if question.kind == "caption":
            assert question.answer == description(scene)
    assert kinds == set(ASKS) - (set() if video else {"motion"})


def test_riddles_hide_what_their_rewrite_says():
    rng = random.Random(5)
    for split in ("train", "held_out"):
        for _ in range(100):
            riddle = random_riddle(rng, video=rng.random() < 0.5, split=split)
            assert riddle.rewrite not in riddle.prompt
            assert riddle.reasoning


def test_evaluation_prompts_are_held_out_and_repeatable():
    made = prompts(20)
    assert made == prompts(20)
    assert {prompt.category for prompt in made} == set(CATEGORIES)


def test_scenes_repeat_for_a_seed():
    assert first_scenes(scenes(9, True), 20) == first_scenes(scenes(9, True), 20)
    assert first_scenes(scenes(9, True), 20) != first_scenes(scenes(10, True), 20)
