"""Clips that begin with given frames: what is kept, how long they are, and that the same job gives the same bytes."""

import io
import json
from dataclasses import replace

import av
import numpy as np
import pytest
import torch

from omnivideo.backends.decoder.pipeline import GeneratedClip
from omnivideo.backends.decoder.renderer import Renderer
from omnivideo.backends.decoder.resume import pack_resume_point, unpack_resume_point
from omnivideo.contracts import Artifact, Job, resolve_sampling_params
from omnivideo.errors import InvalidInput
from omnivideo.manifests import Manifest
from omnivideo.media.artifacts import load_frames
from omnivideo.media.extension import join_extension
from omnivideo.models.vae import decode_latents, encode_pixels, pixels_from_bytes, pixels_to_bytes
from omnivideo.presets import TINY
from omnivideo.presets.shapes import SourceLength
from omnivideo.storage.objects.memory import MemoryObjectStore
from omnivideo.storage.objects.tensors import get_tensors
from tests.support.continuations import PRESET, declare_tasks, make_frames, store_frames
from tests.support.sound import encode_with_sound


@pytest.fixture
def renderer(omni):
    return Renderer(declare_tasks(omni), MemoryObjectStore(), "random")


def build_job(task: str, source: Artifact | None, last_frame: Artifact | None = None, **overrides) -> Job:
    length = None
    if task == "video-extension":
        overrides = {"width": source.width, "height": source.height} | overrides
        length = SourceLength(source.frames, source.fps)
    params = resolve_sampling_params(PRESET, task, length, steps=2, **({"seed": 3} | overrides))
    return Job(
        id="clip", prompt="it moves right", visual_tokens=None, source=source, last_frame=last_frame, params=params,
        preset="tiny",
    )  # fmt: skip


def render(renderer: Renderer, job: Job, state=None) -> tuple[GeneratedClip, list, Artifact]:
    job, params = renderer.prepare_job(job)
    *progress, clip = renderer.render_job(job, params, state)
    return clip, progress, renderer.store_result(job, params, clip)


def reconstruct(renderer: Renderer, frames: np.ndarray) -> np.ndarray:
    """Return what the VAE makes of frames."""
    with torch.no_grad():
        latents = encode_pixels(renderer.omni.vae, pixels_from_bytes(frames[None]))
        return pixels_to_bytes(decode_latents(renderer.omni.vae, latents))[0]


def test_a_picture_is_the_first_frame_of_its_clip(renderer):
    still = make_frames(1)
    clip, _, artifact = render(renderer, build_job("image-to-video", store_frames(renderer.store, still)))
    assert (artifact.frames, artifact.medium, clip.frames.shape) == (9, "video", (9, 64, 64, 3))
    assert np.array_equal(clip.frames[:1], reconstruct(renderer, still))
    others = render(renderer, build_job("image-to-video", store_frames(renderer.store, still), seed=4))[0]
    assert np.array_equal(others.frames[0], clip.frames[0]) and not np.array_equal(others.frames, clip.frames)


def test_the_latents_of_a_picture_that_was_made_here_are_given_as_they_are(renderer):
    params = resolve_sampling_params(PRESET, "text-to-image", steps=1)
    still = render(renderer, Job(id="a", prompt="a ball", visual_tokens=None, source=None, params=params))[2]
    clip = render(renderer, build_job("image-to-video", still))[0]
    given = get_tensors(renderer.store, still.latents)["latents"]
    assert torch.equal(clip.latents[:, :1], given) and not torch.equal(clip.latents[:, 1:2], given)


def test_the_last_picture_is_part_of_the_condition(renderer):
    first, last, other = (store_frames(renderer.store, make_frames(1, seed=seed)) for seed in (0, 1, 2))
    clips = [render(renderer, build_job("keyframes-to-video", first, picture)) for picture in (last, other, last)]
    assert clips[0][2].key == clips[2][2].key != clips[1][2].key
    assert np.array_equal(clips[0][0].frames[0], reconstruct(renderer, make_frames(1))[0])
    manifest = Manifest.parse_stored(renderer.store.get(clips[0][2].manifest))
    assert (manifest.source, manifest.last_frame) == (first.key, last.key)


@pytest.mark.parametrize(("length", "overrides", "added"), [
    (9, {}, 8), (9, {"frames": 3}, 3), (9, {"seconds": 2}, 16), (25, {}, 8), (12, {"frames": 11}, 11),
])  # fmt: skip
def test_a_clip_is_extended(renderer, length, overrides, added):
    source = store_frames(renderer.store, make_frames(length))
    clip, progress, artifact = render(renderer, build_job("video-extension", source, **overrides))
    assert clip.frames.shape == (length + added, 64, 64, 3) and artifact.frames == length + added
    passes = -(-added // 8)
    assert [event.step.step for event in progress] == list(range(1, 2 * passes + 1))
    kept = load_frames(renderer.store, source)
    assert np.array_equal(clip.frames[: length - 9], kept[: length - 9])
    assert (artifact.latents is not None) == (length == 9 and passes == 1)  # they would be those of the end alone
    assert artifact.key == render(renderer, build_job("video-extension", source, **overrides))[2].key


def test_an_extension_continues_the_given_frames_without_a_seam(renderer):
    """The latents of a clip that was made here are given, so its frames do not pass through its file."""
    params = resolve_sampling_params(PRESET, "text-to-video", steps=1)
    source = render(renderer, Job(id="a", prompt="a ball", visual_tokens=None, source=None, params=params))[2]
    given = get_tensors(renderer.store, source.latents)["latents"]
    clip, _, extended = render(renderer, build_job("video-extension", source))
    assert torch.equal(clip.latents[:, :3], given)
    with torch.no_grad():
        whole = pixels_to_bytes(decode_latents(renderer.omni.vae, clip.latents[None]))[0]
        before = pixels_to_bytes(decode_latents(renderer.omni.vae, given[None]))[0]
    assert np.array_equal(clip.frames, whole) and np.array_equal(clip.frames[:9], before)
    assert torch.equal(get_tensors(renderer.store, extended.latents)["latents"], clip.latents)


def test_the_end_of_a_source_turns_into_its_rendering_step_by_step():
    source, generated = np.zeros((12, 4, 4, 3), np.uint8), np.full((17, 4, 4, 3), 90, np.uint8)
    joined = join_extension(source, generated, 9)
    assert joined[:, 0, 0, 0].tolist() == [0, 0, 0, *range(10, 91, 10), *[90] * 8]


def test_an_extended_clip_keeps_its_sound(renderer):
    data = encode_with_sound("mp4", "libx264", "aac", 2)
    source = Artifact(
        key=renderer.store.put(data, "mp4"), medium="video", width=64, height=48, frames=16, fps=8, caption="a file",
        created_by="upload",
    )  # fmt: skip
    artifact = render(renderer, build_job("video-extension", source))[2]
    with av.open(io.BytesIO(renderer.store.get(artifact.key))) as container:
        seconds = [float(stream.duration * stream.time_base) for stream in container.streams]
    assert seconds == pytest.approx([3, 2], abs=0.05) and artifact.frames == 24
    manifest = Manifest.parse_stored(renderer.store.get(artifact.manifest))
    assert manifest.sound == "kept" and renderer.replay_manifest(manifest) == artifact.key


def test_an_extended_clip_keeps_its_size(renderer):
    source = store_frames(renderer.store, make_frames(10, 96, 48))
    clip = render(renderer, build_job("video-extension", source))[0]
    assert clip.frames.shape == (18, 48, 96, 3)
    assert np.array_equal(clip.frames[0], load_frames(renderer.store, source)[0])


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4, 5])
def test_an_interrupted_extension_of_several_passes_continues_to_the_same_bytes(renderer, stop_after):
    job = build_job("video-extension", store_frames(renderer.store, make_frames(9)), seconds=3)
    _, progress, whole = render(renderer, job)
    prepared, _ = renderer.prepare_job(job)
    data = pack_resume_point(progress[stop_after - 1].state, renderer.model, [prepared])
    point = unpack_resume_point(data, renderer.model, [job], torch.device("cpu"))
    _, remaining, resumed = render(renderer, prepared, point.state)
    assert (resumed.key, len(remaining)) == (whole.key, 6 - stop_after)


def test_a_resume_point_is_not_continued_with_another_last_frame(renderer):
    first, last = (store_frames(renderer.store, make_frames(1, seed=seed)) for seed in (0, 1))
    job, _ = renderer.prepare_job(build_job("keyframes-to-video", first, last))
    progress, *_ = renderer.render_job(job, job.params)
    data = pack_resume_point(progress.state, renderer.model, [job])
    assert unpack_resume_point(data, renderer.model, [job], torch.device("cpu"))
    other = job.model_copy(update={"last_frame": first})
    assert unpack_resume_point(data, renderer.model, [other], torch.device("cpu")) is None


@pytest.mark.parametrize("task", ["image-to-video", "video-extension", "keyframes-to-video"])
def test_a_manifest_gives_the_same_bytes_again(renderer, task):
    sources = [store_frames(renderer.store, make_frames(10 if task == "video-extension" else 1))]
    sources += [store_frames(renderer.store, make_frames(1, seed=1))] if task == "keyframes-to-video" else []
    artifact = render(renderer, build_job(task, *sources))[2]
    manifest = Manifest.parse_stored(renderer.store.get(artifact.manifest))
    assert renderer.replay_manifest(manifest) == artifact.key
    assert "new_frames" not in json.loads(renderer.store.get(artifact.manifest))["settings"] or len(sources) == 1


def test_a_model_without_the_task_refuses_the_job(omni, renderer):
    job = build_job("image-to-video", store_frames(renderer.store, make_frames(1)))
    with pytest.raises(InvalidInput, match="task: tiny cannot do image-to-video; its tasks are text-to-video"):
        Renderer(replace(omni, preset=TINY), renderer.store, "random").prepare_job(job)


@pytest.mark.parametrize(("length", "overrides", "message"), [
    ((5, 8), {}, "source: it has 5 frames; this model continues clips of 9 or more"),
    ((9, 100), {}, "source: it has 100 frames per second; allowed: 0.5 to 60"),
    ((9, 8), {"seconds": 0.01}, "seconds: 0 frames would be added; allowed: 0.12 to 30.12 at 8 per second"),
    ((9, 8), {"seconds": 40}, "seconds: 320 frames would be added"),
    ((9, 8), {"seconds": 1, "frames": 7}, "seconds: 1 s at 8 frames per second are 8 frames, not 7"),
    ((9, 8), {"fps": 9}, "fps: an extended clip keeps its 8 frames per second"),
    ((1900, 8), {"width": 640, "height": 360}, "source: it would have 1908 frames of 640x360; allowed: 484"),
])  # fmt: skip
def test_what_cannot_be_extended_is_refused_by_name(length, overrides, message):
    with pytest.raises(InvalidInput, match=message):
        resolve_sampling_params(PRESET, "video-extension", SourceLength(*length), **overrides)
