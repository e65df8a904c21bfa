"""The rendered world says the same in pixels, words and facts; the scorer reads it without our model."""

import random
from dataclasses import replace

import numpy as np
import pytest

from omnivideo.evaluation.prompts import CATEGORIES, sample_prompts
from omnivideo.synthetic.captions import describe_scene, sample_caption
from omnivideo.synthetic.edits import IMAGE_EDITS, VIDEO_EDITS, sample_edit
from omnivideo.synthetic.facts import ObjectSpec, SceneSpec
from omnivideo.synthetic.indirect_requests import sample_indirect_request
from omnivideo.synthetic.questions import QUESTION_MAKERS, sample_question
from omnivideo.synthetic.rendering import render_scene
from omnivideo.synthetic.scenes import (
    COLOURS,
    MOTIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    is_held_out,
    sample_scene,
    stream_scenes,
)
from omnivideo.synthetic.scorer import detect_scene
from omnivideo.training.tiny.latents import take_scenes


def facts(things) -> list[tuple]:
    return sorted((str(t.shape), str(t.colour), t.size, str(t.motion)) for t in things)


@pytest.mark.parametrize(("video", "count"), [(False, 400), (True, 120)])
def test_scorer_reads_ground_truth(video, count):
    found = [(scene, detect_scene(render_scene(scene))) for scene in take_scenes(stream_scenes(77, video), count)]
    right = [
        facts(reading.objects) == facts(scene.objects) and reading.background == scene.background
        for scene, reading in found
    ]
    assert np.mean(right) >= 0.99
    assert np.mean([reading.steadiness for _, reading in found]) >= 0.99


@pytest.mark.parametrize("amount", [12, 30])
def test_scorer_sees_damage(amount):
    """Heavily distorted outlines have no name: the scorer does not call a smear right."""
    rng = np.random.default_rng(0)
    scene = Scene("black", (SceneObject("star", "red", "large", "still", 32, 32),), 1)
    frame = render_scene(scene)[0].astype(float)
    rows = np.arange(64)[:, None]
    shift = (rng.standard_normal((64, 1)) * amount / 3).round().astype(int)
    torn = frame[rows, (np.arange(64)[None] + shift) % 64].astype(np.uint8)
    assert not SceneSpec((ObjectSpec("star", "red"),)).is_met_by(detect_scene(torn[None]))


def test_scorer_tells_motion_from_stillness():
    thing = SceneObject("circle", "blue", "small", "right", 8, 24)
    clip = render_scene(Scene("white", (thing,), 9))
    assert detect_scene(clip).objects[0].motion == "right"
    assert detect_scene(clip[::-1]).objects[0].motion == "left"
    assert detect_scene(np.repeat(clip[:1], 9, axis=0)).objects[0].motion == "still"


@pytest.mark.parametrize("composed", [0.0, 0.9])
@pytest.mark.parametrize("video", [False, True])
def test_captions_state_what_is_seen(video, composed):
    rng = random.Random(1)
    for scene in take_scenes(stream_scenes(5, video, composed_share=composed), 60):
        made = sample_caption(rng, scene, composed > 0)
        assert made.scene_spec.is_met_by(detect_scene(render_scene(scene))), made


@pytest.mark.parametrize("video", [False, True])
def test_a_composed_caption_that_says_no_place_leaves_one_layout(video):
    rng = random.Random(1)
    layouts: dict[tuple, set] = {}
    for scene in take_scenes(stream_scenes(5, video, composed_share=1.0), 3000):
        demand = sample_caption(rng, scene, is_composed=True).scene_spec
        if not demand.relation and not demand.region:
            kinds = tuple((thing.size, thing.motion) for thing in scene.objects)
            layouts.setdefault(kinds, set()).add(tuple((thing.x, thing.y) for thing in scene.objects))
    assert len(layouts) > 10
    assert all(len(places) == 1 for places in layouts.values())


def test_a_wrong_scene_does_not_meet_the_demand():
    rng = random.Random(2)
    wrong = 0
    for scene in take_scenes(stream_scenes(6, False), 60):
        made = sample_caption(rng, scene)
        thing = scene.objects[0]
        other = next(c for c in COLOURS if c not in {t.colour for t in scene.objects} | {scene.background})
        changed = replace(scene, objects=(replace(thing, colour=other), *scene.objects[1:]))
        wrong += made.scene_spec.is_met_by(detect_scene(render_scene(changed)))
    assert wrong == 0


@pytest.mark.parametrize("video", [False, True])
def test_training_never_shows_a_held_out_object(video):
    for scene in take_scenes(stream_scenes(8, video), 1500):
        assert not any(map(is_held_out, scene.objects))
    rng = random.Random(3)
    for _ in range(400):
        edit = sample_edit(rng, video)
        assert not any(map(is_held_out, edit.source.objects + edit.target.objects))


def test_the_rule_holds_out_an_eighth_and_leaves_every_word_in_training():
    everything = [SceneObject(s, c, z, m, 0, 0) for s in SHAPES for c in COLOURS for z in SIZES for m in MOTIONS]
    kept = [thing for thing in everything if not is_held_out(thing)]
    assert len(kept) == len(everything) * 7 / 8
    for field, names in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES), ("motion", MOTIONS)):
        assert {getattr(thing, field) for thing in kept} == set(names)


@pytest.mark.parametrize("kind", VIDEO_EDITS)
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_edits_change_what_is_named_and_nothing_else(kind, split):
    rng = random.Random(kind)
    for _ in range(15):
        edit = sample_edit(rng, is_video=True, split=split, kinds=[kind])
        assert edit.target_spec.is_met_by(detect_scene(render_scene(edit.target))), edit
        kept = [t for t in edit.source.objects if t not in edit.changed_objects]
        assert all(thing in edit.target.objects for thing in kept)
        assert (edit.source.background != edit.target.background) == (kind == "background")
        assert edit.source != edit.target


def test_image_edits_are_stills():
    rng = random.Random(0)
    for kind in IMAGE_EDITS:
        assert not sample_edit(rng, is_video=False, kinds=[kind]).target.is_video


@pytest.mark.parametrize("video", [False, True])
def test_questions_have_answers_of_every_kind(video):
    rng = random.Random(4)
    kinds = set()
    for _ in range(4000):
        scene = sample_scene(rng, video)
        question = sample_question(rng, scene)
        kinds.add(question.kind)
        assert question.text and question.answer
        if question.kind == "caption":
            assert question.answer == describe_scene(scene)
    assert kinds == set(QUESTION_MAKERS) - (set() if video else {"motion"})


def test_riddles_hide_what_their_rewrite_says():
    rng = random.Random(5)
    for split in ("train", "held_out"):
        for _ in range(100):
            riddle = sample_indirect_request(rng, is_video=rng.random() < 0.5, split=split)
            assert riddle.rewrite not in riddle.prompt
            assert riddle.reasoning


def test_evaluation_prompts_are_held_out_and_repeatable():
    made = sample_prompts(20)
    assert made == sample_prompts(20)
    assert {prompt.category for prompt in made} == set(CATEGORIES)


def test_scenes_repeat_for_a_seed():
    assert take_scenes(stream_scenes(9, True), 20) == take_scenes(stream_scenes(9, True), 20)
    assert take_scenes(stream_scenes(9, True), 20) != take_scenes(stream_scenes(10, True), 20)
