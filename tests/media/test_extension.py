"""Clips that are continued and clips that are joined."""

import io
import random

import av
import numpy as np
import pytest
import torch

from omnivideo.errors import InvalidInput
from omnivideo.manifests import FrameManifest, JoinManifest, parse_manifest
from omnivideo.media.artifacts import encode_clip, extract_frame, join_clips, load_frames
from omnivideo.media.extension import join_extension, read_last_frames
from omnivideo.media.read import read_media
from omnivideo.models.vae import decode_latents, encode_pixels, pixels_from_bytes, pixels_to_bytes
from omnivideo.models.weights import checkpoint
from omnivideo.models.weights.shipped import find_shipped_weights
from omnivideo.presets import TINY
from omnivideo.presets.shapes import Delivery
from omnivideo.storage.objects.memory import MemoryObjectStore
from omnivideo.synthetic.rendering import render_scene
from omnivideo.synthetic.requests import sample_continuation_request
from omnivideo.synthetic.scorer import measure_seam
from tests.support.continuations import make_frames, store_frames
from tests.support.sound import encode_with_sound


def test_the_seam_of_an_extended_file_is_not_visible():
    """The first 5 frames are a file's, the others what the shipped VAE makes of the clip, as if they were generated."""
    vae, rng = checkpoint.load(find_shipped_weights("tiny"), torch.device("cpu")).vae, random.Random(0)
    seams = []
    for _ in range(12):
        clip = render_scene(sample_continuation_request(rng, "video-extension", 0.0).target)
        source = read_media(encode_clip(clip[:5], 8)[0]).frames
        with torch.no_grad():
            rendered = pixels_to_bytes(decode_latents(vae, encode_pixels(vae, pixels_from_bytes(clip[None]))))[0]
        abrupt = np.concatenate([source, rendered[5:]])
        seams.append([measure_seam(frames, 5) for frames in (clip, abrupt, join_extension(source, rendered, 5))])
    original, abrupt, joined = np.mean(seams, axis=0)
    assert abs(joined - original) < 0.15 and abrupt > joined + 0.4


def test_the_last_frames_of_a_file_are_fitted():
    data = encode_clip(make_frames(12, 96, 48), 8)[0]
    delivery = Delivery(width=96, height=48, frames=20)
    last = read_last_frames(data, 9, 64, 64, TINY.source, delivery)
    assert last.shape == (9, 64, 64, 3)
    assert np.array_equal(last[:, 0], last[:, 15])  # 96x48 is scaled to 64x32, and the rest repeats its edge
    assert np.array_equal(read_last_frames(data, 1, 64, 64, TINY.source, delivery)[0], last[-1])


def test_joined_clips_have_the_size_and_the_rate_of_the_first():
    store = MemoryObjectStore()
    clips = [store_frames(store, make_frames(9), 8), store_frames(store, make_frames(10, 96, 48), 4)]
    joined = join_clips(store, clips, "turn")
    assert (joined.width, joined.height, joined.frames, joined.fps) == (64, 64, 29, 8)
    frames = load_frames(store, joined)
    assert len(frames) == 29 and store.has(joined.preview) and joined.source == clips[0].key
    assert np.abs(frames[:9].astype(int) - load_frames(store, clips[0])).mean() < 4  # encoded once more
    again = join_clips(store, clips, "turn")
    assert again.key == joined.key and again.manifest == joined.manifest
    manifest = parse_manifest(store.get(joined.manifest))
    assert isinstance(manifest, JoinManifest) and manifest.parts == tuple(clips)
    assert (manifest.fps, manifest.delivered) == (8, Delivery(width=64, height=64, frames=29))


def test_joined_clips_keep_their_sounds():
    store = MemoryObjectStore()
    silent, data = store_frames(store, make_frames(8)), encode_with_sound("mp4", "libx264", "aac", 2)
    key, shape = store.put(data, "mp4"), {"width": 64, "height": 48, "frames": 16}
    joined = join_clips(store, [silent, silent.model_copy(update={"key": key} | shape)], "turn")
    assert parse_manifest(store.get(joined.manifest)).sound == "kept"
    with av.open(io.BytesIO(store.get(joined.key))) as container:
        (sound,) = container.streams.audio
        assert float(next(container.demux(sound)).pts * sound.time_base) == pytest.approx(1, abs=0.05)


def test_a_frame_states_the_clip_that_it_was_taken_from():
    store = MemoryObjectStore()
    clip = store_frames(store, make_frames(9))
    frame = extract_frame(store, clip, "last", "turn")
    manifest = parse_manifest(store.get(frame.manifest))
    assert isinstance(manifest, FrameManifest) and (manifest.parts, manifest.position) == ((clip,), "last")


def test_clips_that_are_too_long_together_are_not_joined():
    store = MemoryObjectStore()
    clip = store_frames(store, make_frames(9)).model_copy(update={"frames": 1900, "width": 640, "height": 360})
    with pytest.raises(InvalidInput, match="they would have 3800 frames"):
        join_clips(store, [clip, clip], "turn")
