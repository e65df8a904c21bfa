"""Pixels, captions and facts of the synthetic world agree; the scorer reads scenes without our model."""

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
from omnivideo.synthetic.requests import CONTINUATION_TASKS, sample_continuation_request
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
from omnivideo.synthetic.scorer import detect_scene, find_matching_frames, measure_seam
from omnivideo.training.tiny.latents import take_scenes


def list_facts(objects) -> list[tuple]:
    return sorted((str(t.shape), str(t.colour), t.size, str(t.motion), str(t.second_motion)) for t in objects)


@pytest.mark.parametrize(("video", "count"), [(False, 400), (True, 120)])
def test_the_scorer_reads_the_ground_truth(video, count):
    readings = [(scene, detect_scene(render_scene(scene))) for scene in take_scenes(stream_scenes(77, video), count)]
    is_correct = [
        list_facts(reading.objects) == list_facts(scene.objects) and reading.background == scene.background
        for scene, reading in readings
    ]
    assert np.mean(is_correct) >= 0.99
    assert np.mean([reading.steadiness for _, reading in readings]) >= 0.99


@pytest.mark.parametrize("amount", [12, 30])
def test_the_scorer_rejects_distorted_shapes(amount):
    """A heavily distorted outline is not a known shape, so the scene is not correct."""
    rng = np.random.default_rng(0)
    scene = Scene("black", (SceneObject("star", "red", "large", "still", 32, 32),), 1)
    frame = render_scene(scene)[0].astype(float)
    rows = np.arange(64)[:, None]
    shift = (rng.standard_normal((64, 1)) * amount / 3).round().astype(int)
    distorted = frame[rows, (np.arange(64)[None] + shift) % 64].astype(np.uint8)
    assert not SceneSpec((ObjectSpec("star", "red"),)).is_met_by(detect_scene(distorted[None]))


def test_the_scorer_distinguishes_motion_from_stillness():
    thing = SceneObject("circle", "blue", "small", "right", 8, 24)
    clip = render_scene(Scene("white", (thing,), 9))
    assert detect_scene(clip).objects[0].motion == "right"
    assert detect_scene(clip[::-1]).objects[0].motion == "left"
    assert detect_scene(np.repeat(clip[:1], 9, axis=0)).objects[0].motion == "still"


@pytest.mark.parametrize("composed", [0.0, 0.9])
@pytest.mark.parametrize("video", [False, True])
def test_captions_describe_the_rendered_scene(video, composed):
    rng = random.Random(1)
    for scene in take_scenes(stream_scenes(5, video, composed_share=composed), 60):
        caption = sample_caption(rng, scene, composed > 0)
        assert caption.scene_spec.is_met_by(detect_scene(render_scene(scene))), caption


@pytest.mark.parametrize("video", [False, True])
def test_a_composed_caption_without_a_place_has_one_layout(video):
    rng = random.Random(1)
    layouts: dict[tuple, set] = {}
    for scene in take_scenes(stream_scenes(5, video, composed_share=1.0), 3000):
        demand = sample_caption(rng, scene, is_composed=True).scene_spec
        if not demand.relation and demand.objects[0].region is None:
            kinds = tuple((thing.size, thing.motion, thing.speed, thing.second_motion) for thing in scene.objects)
            layouts.setdefault(kinds, set()).add(tuple((thing.x, thing.y) for thing in scene.objects))
    assert len(layouts) > 10
    assert all(len(places) == 1 for places in layouts.values())


def test_a_changed_scene_does_not_meet_the_caption():
    rng = random.Random(2)
    met_count = 0
    for scene in take_scenes(stream_scenes(6, False), 60):
        caption = sample_caption(rng, scene)
        thing = scene.objects[0]
        other = next(c for c in COLOURS if c not in {t.colour for t in scene.objects} | {scene.background})
        changed = replace(scene, objects=(replace(thing, colour=other), *scene.objects[1:]))
        met_count += caption.scene_spec.is_met_by(detect_scene(render_scene(changed)))
    assert met_count == 0


@pytest.mark.parametrize("video", [False, True])
def test_training_scenes_have_no_held_out_object(video):
    for scene in take_scenes(stream_scenes(8, video), 1500):
        assert not any(map(is_held_out, scene.objects))
    rng = random.Random(3)
    for _ in range(400):
        edit = sample_edit(rng, video)
        assert not any(map(is_held_out, edit.source.objects + edit.target.objects))


def test_an_eighth_of_the_objects_is_held_out_and_every_word_occurs_in_training():
    everything = [SceneObject(s, c, z, m, 0, 0) for s in SHAPES for c in COLOURS for z in SIZES for m in MOTIONS]
    kept = [thing for thing in everything if not is_held_out(thing)]
    assert len(kept) == len(everything) * 7 / 8
    for field, names in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES), ("motion", MOTIONS)):
        assert {getattr(thing, field) for thing in kept} == set(names)


@pytest.mark.parametrize("kind", VIDEO_EDITS)
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_edits_change_only_what_they_name(kind, split):
    rng = random.Random(kind)
    for _ in range(15):
        edit = sample_edit(rng, is_video=True, split=split, kinds=[kind])
        assert edit.target_spec.is_met_by(detect_scene(render_scene(edit.target))), edit
        kept = [t for t in edit.source.objects if t not in edit.changed_objects]
        assert all(thing in edit.target.objects for thing in kept)
        if kind != "several":
            assert (edit.source.background != edit.target.background) == (kind == "background")
        assert edit.source != edit.target
        assert not edit.target_spec.is_met_by(detect_scene(render_scene(edit.source))), edit


@pytest.mark.parametrize("frame_count", [9, 17])
def test_clips_follow_their_scene_at_every_frame(frame_count):
    """Speeds, turns and bounces: each frame shows every object where the scene has it."""
    rng = random.Random(frame_count)
    for _ in range(25):
        scene = sample_scene(rng, is_video=True, composed_share=0.5, frame_count=frame_count)
        assert all(find_matching_frames(render_scene(scene), scene)), scene


@pytest.mark.parametrize(
    ("motion", "speed", "second_motion", "start"),
    [
        ("right", "slow", None, (8, 24)),
        ("right", "fast", None, (24, 24)),
        ("up", "normal", "left", (40, 40)),
        ("left", "normal", "still", (56, 8)),
        ("still", "normal", "down", (8, 8)),
        ("right", "normal", None, (40, 24)),
    ],
)
def test_the_scorer_reads_speeds_and_turns(motion, speed, second_motion, start):
    """An object that bounces off the edge has one motion."""
    scene = Scene("black", (SceneObject("star", "red", "small", motion, *start, speed, second_motion),), 9)
    (found,) = detect_scene(render_scene(scene)).objects
    assert (found.motion, found.speed, found.second_motion) == (motion, speed, second_motion)


@pytest.mark.parametrize("task", CONTINUATION_TASKS)
def test_continued_clips_begin_with_the_given_frames(task):
    rng = random.Random(task)
    for _ in range(30):
        request = sample_continuation_request(rng, task)
        clip, source = request.render_target(), render_scene(request.source)
        assert np.array_equal(clip[: len(source)], source)
        assert not any(map(is_held_out, request.target.objects + request.source.objects))
        if task == "video-extension":
            assert len(clip) == 17
            assert measure_seam(clip, 9) < 2
        if request.last_frame is not None:
            assert np.array_equal(clip[-1:], render_scene(request.last_frame))


@pytest.mark.parametrize("task", CONTINUATION_TASKS)
def test_held_out_continuations_generate_a_held_out_object(task):
    rng = random.Random(task)
    for _ in range(20):
        assert any(map(is_held_out, sample_continuation_request(rng, task, split="held_out").target.objects))


def test_a_seam_is_seen():
    """A clip whose second half comes from another scene has a visible seam."""
    rng = random.Random(0)
    first, second = (render_scene(sample_scene(rng, is_video=True)) for _ in range(2))
    assert measure_seam(np.concatenate([first, second[1:]]), 9) > 4


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
    assert kinds == set(QUESTION_MAKERS) - (set() if video else {"motion", "speed"})


def test_indirect_requests_do_not_contain_their_rewrite():
    rng = random.Random(5)
    for split in ("train", "held_out"):
        for _ in range(100):
            request = sample_indirect_request(rng, is_video=rng.random() < 0.5, split=split)
            assert request.rewrite not in request.prompt
            assert request.reasoning


def test_evaluation_prompts_are_reproducible():
    prompts = sample_prompts(20)
    assert prompts == sample_prompts(20)
    assert {prompt.category for prompt in prompts} == set(CATEGORIES)


def test_a_seed_determines_the_scenes():
    assert take_scenes(stream_scenes(9, True), 20) == take_scenes(stream_scenes(9, True), 20)
    assert take_scenes(stream_scenes(9, True), 20) != take_scenes(stream_scenes(10, True), 20)
