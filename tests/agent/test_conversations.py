"""The embedded wiring over a real, untrained model: store, jobs and threads."""

import errno
import json
import os
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from omnivideo.agent.english_rules import split_actions
from omnivideo.backends.mllm.local import LocalMLLM
from omnivideo.contracts import (
    Artifact,
    Job,
    MLLMRequest,
    Preview,
    Route,
    StepProgress,
    resolve_sampling_params,
)
from omnivideo.errors import ArtifactNotFound, InvalidInput, JobCancelled, StoreError, UnreadableMedia
from omnivideo.evaluation import planner
from omnivideo.evaluation.report import build_score_table, score_planner
from omnivideo.manifests import Manifest, list_needed_keys
from omnivideo.presets import TINY
from omnivideo.sdk.studio import Studio
from omnivideo.settings import load_settings
from omnivideo.storage.objects.local import LocalObjectStore
from omnivideo.storage.objects.tensors import get_tensors, put_tensors
from omnivideo.synthetic.rendering import render_scene
from omnivideo.synthetic.scenes import BACKGROUNDS
from omnivideo.turns import Action, ActionResult, TurnCompleted


@pytest.fixture(scope="module")
def studio(weights, tmp_path_factory) -> Studio:
    return Studio(weights=weights, home=tmp_path_factory.mktemp("home"), device="cpu")


def build_job(studio, name="t.1.1.1", source=None, seed=3) -> Job:
    mllm = studio.conversations.graph  # creates the wiring
    assert mllm is not None
    ask = MLLMRequest(text="a red ball", artifacts=(source,) if source else ())
    tokens = LocalMLLM(studio.omni, studio.conversations.store).predict_visual_tokens(ask, "video")
    task = "video-editing" if source else "text-to-video"
    return Job(
        id=name,
        prompt="a red ball",
        visual_tokens=tokens,
        source=source,
        params=resolve_sampling_params(TINY, task, seed=seed, steps=4),
    )


def run_job(studio, job: Job) -> Artifact:
    return [event for event in studio.conversations.queue_for("local").run(job)][-1]


# ---------------------------------------------------------------- store


def test_the_store_is_content_addressed(tmp_path):
    store = LocalObjectStore(tmp_path)
    key = store.put(b"frames", "mp4")
    assert store.put(b"frames", "mp4") == key and store.get(key) == b"frames"
    assert list(store.iter_keys()) == [key]
    tensors = {"x": torch.arange(6.0).view(2, 3)}
    assert torch.equal(get_tensors(store, put_tensors(store, tensors))["x"], tensors["x"])
    with pytest.raises(StoreError, match="contains no tensors"):
        get_tensors(store, key)


@pytest.mark.parametrize("key", ["../../etc/passwd", "", "a" * 64, "a" * 64 + "./x"])
def test_an_invalid_key_is_not_found(tmp_path, key):
    with pytest.raises(ArtifactNotFound, match="not an artifact key"):
        LocalObjectStore(tmp_path).get(key)


def test_the_sweep_keeps_referenced_and_recent_objects(tmp_path):
    store = LocalObjectStore(tmp_path)
    referenced, old, recent = (store.put(name, "bin") for name in (b"referenced", b"old", b"recent"))
    for key in (referenced, old):
        os.utime(store.path_for_key(key), (0, 0))
    partial_file = store.path_for_key(old).with_name(".0123.part")
    partial_file.write_bytes(b"partial")
    os.utime(partial_file, (0, 0))
    assert store.sweep({referenced}, lifetime_seconds=60) == [old]
    assert sorted(store.iter_keys()) == sorted([referenced, recent]) and not partial_file.exists()
    os.utime(store.path_for_key(recent), (0, 0))
    store.put(b"recent", "bin")  # another put makes it recent again
    assert store.sweep({referenced}, lifetime_seconds=60) == []


def test_a_full_disk_is_reported_and_leaves_no_partial_file(tmp_path, monkeypatch):
    store = LocalObjectStore(tmp_path)

    def fail_on_full_disk(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail_on_full_disk)
    with pytest.raises(StoreError, match="store: the file was not written: No space left on device"):
        store.put(b"frames", "mp4")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# ---------------------------------------------------------------- jobs


def test_a_job_yields_steps_previews_and_one_artifact(studio):
    events = list(studio.conversations.queue_for("local").run(build_job(studio)))
    assert [event.step for event in events if isinstance(event, StepProgress)] == [1, 2, 3, 4]
    assert len([event for event in events if isinstance(event, Preview)]) == 2
    artifact = events[-1]
    assert artifact.medium == "video" and artifact.frames == 9
    manifest = Manifest(**json.loads(studio.conversations.store.get(artifact.manifest)))
    assert manifest.prompt == "a red ball" and manifest.settings.seed == 3 and manifest.weights == studio.weights_digest


def test_replaying_a_manifest_gives_the_same_bytes(studio):
    first = run_job(studio, build_job(studio))
    edited = run_job(studio, build_job(studio, "t.2.1.1", source=first, seed=9))
    assert studio.replay(edited) == edited.key
    assert studio.replay(first) == first.key
    assert run_job(studio, build_job(studio, "other")).key == first.key


def test_an_edit_starts_from_the_stored_latents(studio):
    first = run_job(studio, build_job(studio))
    source = studio.conversations.queue_for("local").renderer.load_source(first, build_edit_params(studio))
    assert torch.equal(source, get_tensors(studio.conversations.store, first.latents)["latents"])
    without_latents = first.model_copy(update={"latents": None})
    assert isinstance(
        studio.conversations.queue_for("local").renderer.load_source(without_latents, build_edit_params(studio)),
        np.ndarray,
    )


def build_edit_params(studio):
    return resolve_sampling_params(studio.omni.preset, "video-editing")


def test_a_cancelled_job_stops_within_a_step(studio):
    running = studio.conversations.queue_for("local").run(build_job(studio, "cancelled"))
    assert isinstance(next(running), StepProgress)
    studio.conversations.queue_for("local").cancel("cancelled")
    with pytest.raises(JobCancelled):
        next(running)


# ---------------------------------------------------------------- threads


def test_a_thread_runs_with_the_real_components(studio):
    thread = studio.open_thread()
    last = list(thread.send("a red ball; make it blue", steps=2, think="off"))[-1]
    assert isinstance(last, TurnCompleted) or last.kind == "question"
    assert studio.open_thread(thread.id).id == thread.id
    assert thread.id in studio.conversations.list_thread_ids()
    with pytest.raises(InvalidInput, match="thread: there is no thread 'nobody'"):
        studio.open_thread("nobody")


def test_an_invalid_attachment_changes_nothing(studio, tmp_path):
    thread = studio.open_thread()
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(UnreadableMedia):
        list(thread.send("make it blue", [tmp_path / "notes.txt"]))
    assert thread.get_turns() == [] and thread.get_open_question() is None


def test_the_sweep_keeps_the_artifacts_of_threads(studio, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(studio.conversations.mllm, "route", lambda ask: Route(kind="image", probability=1.0))

    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    thread = studio.open_thread()
    list(thread.send("make it blue", [tmp_path / "red.png"], steps=1, think="off"))
    store = studio.conversations.store
    stray = store.put(b"stray", "bin")
    for key in list(store.iter_keys()):
        os.utime(store.path_for_key(key), (0, 0))
    removed = studio.conversations.sweep_artifacts(studio.settings.artifact_lifetime_seconds)
    assert stray in removed
    for artifact in thread.get_artifacts():
        assert store.has(artifact.key)
    generated = thread.get_artifacts()[-1]
    assert studio.replay(generated) == generated.key  # its sources are stored as well


def test_the_sweep_keeps_what_results_were_made_of_as_long_as_these(studio):
    """A joined clip and a frame can be made again in a thread to which only they were attached."""
    conversations = studio.conversations
    store, thread = conversations.store, studio.open_thread()
    clips = [run_job(studio, build_job(studio, f"parts.{seed}", seed=seed)) for seed in (1, 2)]
    tools = conversations.local_media_tools
    joined = tools.join_clips(clips, "turn")
    twice = tools.join_clips([joined, clips[0]], "turn")
    frame = tools.extract_frame(twice, "first", "turn")
    thread.update_state(thread.config, {"artifacts": [frame.model_dump()]})
    for key in list(store.iter_keys()):
        os.utime(store.path_for_key(key), (0, 0))
    conversations.sweep_artifacts(studio.settings.artifact_lifetime_seconds)
    for artifact in (*clips, joined, twice, frame):
        assert studio.replay(artifact) == artifact.key


def test_a_join_that_is_stopped_stores_nothing(studio):
    store, tools = studio.conversations.store, studio.conversations.local_media_tools
    clips = [run_job(studio, build_job(studio, f"stopped.{seed}", seed=seed)) for seed in (1, 2)]
    stored = set(store.iter_keys())

    def stop(number):
        raise JobCancelled(f"after clip {number}")

    with pytest.raises(JobCancelled, match="after clip 1"):
        tools.join_clips(clips, "turn", stop)
    assert set(store.iter_keys()) == stored


def test_a_clip_that_ends_with_a_picture_keeps_its_latents():
    assert [*list_needed_keys({"last_frame_latents": "a.safetensors", "visual_tokens": None})] == ["a.safetensors"]


def test_settings_are_read_from_the_environment_and_validated(monkeypatch, tmp_path):
    monkeypatch.setenv("OMNIVIDEO_HOME", str(tmp_path))
    assert load_settings().home == tmp_path
    monkeypatch.setenv("OMNIVIDEO_DATABASE", "mysql://x")
    with pytest.raises(InvalidInput, match="OMNIVIDEO_DATABASE"):
        load_settings()


# ---------------------------------------------------------------- evaluation


def test_the_planner_evaluation_runs_with_the_real_components(studio, monkeypatch):
    """An untrained model answers nothing correctly, but every request is made and counted."""
    steps = {task: params.model_copy(update={"steps": 1}) for task, params in TINY.sampling.items()}
    monkeypatch.setattr(studio.omni, "preset", TINY.model_copy(update={"sampling": steps}))
    scores = score_planner(studio.conversations, split_actions, 1, lambda name, done, of: None)
    for kind in ("reasoning", "plain"):
        assert [scores[f"{kind}, think {mode}"].count for mode in ("off", "on", "auto")] == [4, 4, 4]
    assert scores["counting, 4 tries"].count == 1 and scores["conversations"].count == 10
    assert scores["acts split"].mean == 1 and scores["routing"].count == 10
    assert build_score_table(scores).row_count == len(scores)


def test_a_scripted_turn_is_scored_by_its_pixels():
    """With ground truth in place of the model, a turn is correct for its own scene and wrong for another."""
    rng = random.Random(0)
    for _ in range(5):
        scene = planner.sample_first_scene(rng, True)
        turn = planner.make_opening_turn(scene)
        done = ActionResult(action=Action(text=""), goal="generate", route=ROUTED, trace=None, artifact=ARTIFACT)
        assert turn.is_right(done, lambda artifact, scene=scene: render_scene(scene))
        other = replace(scene, background=next(name for name in BACKGROUNDS if name not in list_colours(scene)))
        assert not turn.is_right(done, lambda artifact, other=other: render_scene(other))


ROUTED = Route(kind="video", probability=1.0)
ARTIFACT = Artifact(key="", medium="video", width=64, height=64, frames=9, fps=8.0, caption="", created_by="")


def list_colours(scene):
    return {scene.background, *(thing.colour for thing in scene.objects)}
