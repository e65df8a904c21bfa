"""An edit keeps its source's sound where the length is unchanged, and says why where it does not."""

import io

import av
import numpy as np
import pytest

from omnivideo.media.artifacts import encode_clip
from omnivideo.media.read import read_media
from omnivideo.media.sound import SoundSource, join_sounds, keep_sound
from omnivideo.media.write import write_media
from tests.support.sound import RATE, encode_with_sound

FPS = 8
CLIP = np.random.default_rng(0).integers(0, 256, (17, 48, 64, 3), np.uint8)
SECONDS = len(CLIP) / FPS


def find_tone(data: bytes, start: float = 0, stop: float = 99) -> tuple[float, float]:
    """Return when the tone begins and ends between two times, in s."""
    heard: list[float] = []
    with av.open(io.BytesIO(data)) as container:
        for frame in container.decode(audio=0):
            samples = np.abs(frame.to_ndarray()[0].astype(float))
            scale = 1 if frame.format.name.startswith("flt") else 2.0**15
            heard += (frame.time + np.nonzero(samples / scale > 0.2)[0] / RATE).tolist()
    heard = [time for time in heard if start <= time <= stop]
    return min(heard), max(heard)


@pytest.mark.parametrize(
    ("kind", "video_codec", "sound_codec"),
    [
        ("mp4", "libx264", "aac"),
        ("webm", "libvpx", "libopus"),
        ("matroska", "libx264", "aac"),
        ("matroska", "libx264", "libmp3lame"),
        ("matroska", "libx264", "flac"),
    ],
)
def test_the_sound_of_the_source_is_kept_in_time(kind, video_codec, sound_codec):
    source = SoundSource(encode_with_sound(kind, video_codec, sound_codec), 2.0)
    silent, _ = encode_clip(CLIP, FPS)
    edited, note = keep_sound(silent, source, SECONDS, FPS)
    assert note == "kept"
    assert find_tone(edited) == pytest.approx((0, 1), abs=0.005)
    expected, found = read_media(silent), read_media(edited)
    assert (found.frames == expected.frames).all() and found.fps == expected.fps
    assert keep_sound(silent, source, SECONDS, FPS)[0] == edited  # the bytes are a function of the inputs


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (encode_with_sound("mp4", "libx264", "aac", 4), "the source lasts 4.00 s and the clip 2.12 s"),
        (encode_with_sound("mov", "libx264", "pcm_s16le"), "it is coded as pcm_s16le; an mp4 takes aac"),
        (encode_with_sound("mp4", "libx264", "aac")[:3000], "it cannot be copied into an mp4"),
    ],
    ids=["length", "codec", "damaged"],
)
def test_sound_that_cannot_be_kept_is_named(source, why):
    silent, _ = encode_clip(CLIP, FPS)
    edited, note = keep_sound(silent, SoundSource(source, 4.0 if "4.00" in why else 2.0), SECONDS, FPS)
    assert edited == silent and note is not None and note.startswith("left out: " + why)


def test_a_source_without_sound_needs_no_note():
    silent, _ = encode_clip(CLIP, FPS)
    assert keep_sound(silent, SoundSource(silent, SECONDS), SECONDS, FPS) == (silent, None)
    png, _ = encode_clip(CLIP[:1], FPS)
    assert keep_sound(silent, SoundSource(png, SECONDS), SECONDS, FPS) == (silent, None)


def test_a_file_is_written_with_sound_and_a_gif_says_that_it_holds_none(tmp_path):
    (tmp_path / "source.mp4").write_bytes(encode_with_sound("mp4", "libx264", "aac"))
    source = SoundSource(tmp_path / "source.mp4", 2.0)
    assert write_media(tmp_path / "a.mp4", CLIP, FPS, source) == "kept"
    assert find_tone((tmp_path / "a.mp4").read_bytes()) == pytest.approx((0, 1), abs=0.005)
    assert write_media(tmp_path / "a.gif", CLIP, FPS, source) == "left out: a gif holds no sound"
    assert write_media(tmp_path / "b.mp4", CLIP, FPS) is None


def test_the_sound_of_an_extended_clip_is_at_its_beginning():
    """And only there, also where its source has more sound than video."""
    source = encode_with_sound("mp4", "libx264", "aac", 2)
    silent, _ = encode_clip(np.concatenate([CLIP, CLIP]), FPS)
    extended, note = keep_sound(silent, SoundSource(source, 0.5, is_beginning=True), 2 * SECONDS, FPS)
    assert note == "kept" and find_tone(extended) == pytest.approx((0, 0.5), abs=0.03)
    assert len(read_media(extended).frames) == 2 * len(CLIP)


@pytest.mark.parametrize(("kind", "video_codec", "sound_codec"), [
    ("mp4", "libx264", "aac"), ("webm", "libvpx", "libopus"), ("matroska", "libx264", "libmp3lame"),
    ("matroska", "libx264", "flac"),
])  # fmt: skip
def test_the_sounds_of_joined_clips_follow_each_other_in_time(kind, video_codec, sound_codec):
    """The first part is silent, the second has a tone in its first second, the third begins with it again."""
    source, (silent, _) = encode_with_sound(kind, video_codec, sound_codec), encode_clip(CLIP[:8], FPS)
    clip, _ = encode_clip(np.concatenate([CLIP[:8], *[CLIP[:16]] * 2]), FPS)
    joined, note = join_sounds(clip, [SoundSource(silent, 1), SoundSource(source, 2), SoundSource(source, 2)])
    assert note == "kept" and find_tone(joined) == pytest.approx((1, 4), abs=0.03)
    assert find_tone(joined, 1.1, 2.9) == pytest.approx((1.1, 2), abs=0.06)
    assert find_tone(joined, 2.2, 9) == pytest.approx((3, 4), abs=0.06)
    assert join_sounds(clip, [SoundSource(silent, 1), SoundSource(source, 2), SoundSource(source, 2)])[0] == joined


def test_a_silent_clip_between_two_with_sound_keeps_its_length():
    source, (silent, _) = encode_with_sound("mp4", "libx264", "aac", 1), encode_clip(CLIP[:8], FPS)
    clip, _ = encode_clip(CLIP[np.arange(24) % 17], FPS)
    joined, note = join_sounds(clip, [SoundSource(source, 1), SoundSource(silent, 1), SoundSource(source, 1)])
    assert note == "kept" and find_tone(joined, 1.2, 9) == pytest.approx((2, 3), abs=0.05)


@pytest.mark.parametrize(("kind", "video_codec", "sound_codec"), [
    ("mp4", "libx264", "aac"), ("matroska", "libx264", "aac"), ("webm", "libvpx", "libopus"),
    ("mp4", "libx264", "libmp3lame"), ("matroska", "libx264", "flac"),
])  # fmt: skip
def test_a_player_that_counts_samples_plays_joined_sounds_in_time(kind, video_codec, sound_codec):
    """Chromium ignores gaps in a track, and decoders return all of a packet that a file shows in part."""
    source, (silent, _) = encode_with_sound(kind, video_codec, sound_codec, 1.5), encode_clip(CLIP[:12], FPS)
    clip, _ = encode_clip(CLIP[np.arange(180) % 17], FPS)
    joined, note = join_sounds(clip, [SoundSource(source, 1.5), SoundSource(silent, 1.5), SoundSource(source, 1.5)] * 5)
    with av.open(io.BytesIO(joined)) as container:
        samples = np.concatenate([np.abs(frame.to_ndarray()[0].astype(float)) for frame in container.decode(audio=0)])
    (loud,) = np.nonzero(samples > samples.max() / 3)
    ends = [loud[index] / RATE for index in np.nonzero(np.diff(loud, append=2**60) > RATE / 5)[0]]
    expected = [start + 1 for index in range(5) for start in (4.5 * index, 4.5 * index + 3)]
    assert note == "kept" and ends == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(("second", "why"), [
    (("webm", "libvpx", "libopus"), "the sounds of the clips are not coded alike"),
    (("mov", "libx264", "pcm_s16le"), "it is coded as pcm_s16le; an mp4 takes aac"),
])  # fmt: skip
def test_sounds_that_cannot_be_joined_are_named(second, why):
    sources = [SoundSource(encode_with_sound(*kind), 2) for kind in (("mp4", "libx264", "aac"), second)]
    silent, _ = encode_clip(CLIP[np.arange(32) % 17], FPS)
    joined, note = join_sounds(silent, sources)
    assert joined == silent and note is not None and note.startswith("left out: " + why)


def test_clips_without_sound_are_joined_without_a_note():
    silent, _ = encode_clip(CLIP, FPS)
    assert join_sounds(silent, [SoundSource(silent, SECONDS)] * 2) == (silent, None)
