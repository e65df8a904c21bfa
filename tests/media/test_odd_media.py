"""A folder of odd media, made here, reads as FFmpeg's own filters show it, within 2 levels.

`python -m benchmarks.odd_media` prints the time and memory of each.
"""

from pathlib import Path

import numpy as np
import pytest
from av.video.reformatter import ColorTrc
from PIL import Image

from omnivideo.errors import UnreadableMedia
from omnivideo.media.containers import can_read_heic
from omnivideo.media.ingest import ingest_media
from omnivideo.media.read import read_fitted_media, read_media
from omnivideo.media.sandbox import measure_in_sandbox
from omnivideo.storage.objects.memory import MemoryObjectStore
from tests.support import odd_media
from tests.support.reference_reader import read_reference

TOLERANCE = 2  # levels


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("odd")


def largest_difference(first: np.ndarray, second: np.ndarray) -> int:
    assert first.shape == second.shape
    return int(np.abs(first.astype(int) - second).max())


@pytest.mark.parametrize("name", ["vp8-alpha.webm", "vp9-alpha.webm", "prores-alpha.mov"])
def test_alpha_is_composited_on_white(folder, name):
    path = odd_media.CLIPS[name](folder / name)
    frames = read_media(path).frames
    assert largest_difference(frames, read_reference(path)) <= TOLERANCE
    assert frames[:, 2, 2].min() >= 255 - TOLERANCE  # transparent black
    assert read_fitted_media(path, 32, 32, 2, 8)[0, 0, 0].min() >= 255 - TOLERANCE
    assert ingest_media(MemoryObjectStore(), path.read_bytes(), "user").frames == 5


@pytest.mark.parametrize(
    "name", ["ten-bit.mkv", "odd-size.mp4", "variable-rate.mkv", "no-frame-count.webm", "plain.mp4"]
)
def test_clips_read_as_ffmpeg_shows_them(folder, name):
    path = odd_media.CLIPS[name](folder / name)
    media, expected = read_media(path), read_reference(path)
    if name == "variable-rate.mkv":  # frames at 0, 0.1, 0.2, 0.6 and 0.7 s: the grid repeats the third
        expected = expected[[0, 1, 2, 2, 2, 2, 3, 4]]
    assert largest_difference(media.frames, expected) <= TOLERANCE
    info = measure_in_sandbox(path.read_bytes())
    assert (info.frames, info.height, info.width) == media.frames.shape[:3] and info.fps == media.fps


@pytest.mark.parametrize("orientation", odd_media.ORIENTATION_MATRICES)
def test_all_eight_orientations_are_upright(folder, orientation):
    plain = odd_media.CLIPS["plain.mp4"](folder / f"plain{orientation}.mp4")
    turned = folder / f"turned{orientation}.mp4"
    matrix = odd_media.ORIENTATION_MATRICES[orientation]
    turned.write_bytes(odd_media.set_display_matrix(plain.read_bytes(), matrix))
    make_upright = odd_media.UPRIGHT_BY_ORIENTATION[orientation]
    frames = read_media(turned).frames
    assert (frames == np.stack([make_upright(pixels) for pixels in read_media(plain).frames])).all()
    assert largest_difference(frames, read_reference(turned)) <= TOLERANCE
    info = measure_in_sandbox(turned.read_bytes())
    assert (info.height, info.width) == frames.shape[1:3]
    picture = odd_media.make_gradient(64, 48)
    still = odd_media.write_still(folder / f"still{orientation}.png", picture, orientation)
    assert (read_media(still).frames[0] == make_upright(picture)).all()


@pytest.mark.parametrize(("name", "transfer"), [("pq.mp4", ColorTrc.SMPTE2084), ("hlg.mp4", ColorTrc.ARIB_STD_B67)])
def test_hdr_is_tone_mapped_to_bt709(folder, name, transfer):
    nits = [0.0, 26.0, 0.18 * 203, 100.0, 203.0, 400.0, 1000.0]
    picture = np.repeat(np.repeat(np.array(nits)[None, :, None], 32, axis=1), 3, axis=2).repeat(64, axis=0)
    path = odd_media.write_hdr_clip(folder / name, odd_media.encode_hdr_levels(picture, transfer), transfer)
    frame = read_media(path).frames[0]
    levels = frame[32, 16::32].mean(axis=-1)
    print(name, dict(zip(nits, levels, strict=True)))
    black, grey_card, grey, half, white, _, bright = levels
    assert black <= 1 and white >= 235 and bright - white >= 10
    assert (np.diff(levels) > 0).all() and np.ptp(frame[32, 16::32], axis=-1).max() <= TOLERANCE
    assert abs(grey - 255 * 0.18 ** (1 / 2.4)) <= 8  # a BT.1886 display
    assert abs(grey_card - 255 * (1.099 * 0.18**0.45 - 0.099)) <= 8  # what BT.709's camera curve gives for 18 %
    assert abs(half - 255 * (100 / 203) ** (1 / 2.4)) <= 8
    assert measure_in_sandbox(path.read_bytes()).frames == 3


def test_hdr_colours_keep_their_hue(folder):
    """Colours inside BT.709, from dark to far above white, keep the ratio of their channels in linear light."""
    to_bt2020 = np.linalg.inv(
        np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])
    )
    colors = np.array([[1, 0.25, 0.25], [0.25, 1, 0.25], [0.25, 0.25, 1], [1, 0.8, 0.3], [0.3, 0.8, 1]])
    light = np.concatenate([colors * nits for nits in (60, 203, 800)]) @ to_bt2020.T
    picture = np.repeat(light[None], 32, axis=1).repeat(64, axis=0)
    path = odd_media.write_hdr_clip(
        folder / "hue.mp4", odd_media.encode_hdr_levels(picture, ColorTrc.SMPTE2084), ColorTrc.SMPTE2084
    )
    shown = (read_media(path).frames[0, 32, 16::32] / 255) ** 2.4
    ratios = shown / shown.max(axis=-1, keepdims=True)
    assert np.abs(ratios - np.concatenate([colors] * 3)).max() < 0.04


@pytest.mark.parametrize(
    ("size", "kind", "reduction"),
    [((4000, 3000), "jpeg", 2), ((8160, 6120), "jpeg", 4), ((4000, 3000), "png", 2), ((4000, 3000), "webp", 2)],
)
def test_large_photos_are_decoded_at_reduced_size(folder, size, kind, reduction):
    width, height = size
    options = {"jpeg": {"quality": 95, "subsampling": 0}, "png": {"compress_level": 1}, "webp": {"method": 0}}[kind]
    path = odd_media.write_still(folder / f"{width}.{kind}", odd_media.enlarge_gradient(width, height), **options)
    info = measure_in_sandbox(path.read_bytes())
    assert (info.width, info.height, info.kind) == (width // reduction, height // reduction, "image")
    frame, full = read_media(path).frames[0], read_reference(path)[0]
    blocks = full.reshape(height // reduction, reduction, width // reduction, reduction, 3)
    means = np.stack([rows.mean(axis=(0, 2)) for rows in blocks])
    assert np.abs(frame - means).max() <= TOLERANCE


def test_a_large_photo_is_turned_and_composited_too(folder):
    picture = odd_media.add_alpha(odd_media.enlarge_gradient(4000, 3000))
    path = odd_media.write_still(folder / "large.png", picture, 6, compress_level=1)
    frame = read_media(path).frames[0]
    assert frame.shape == (2000, 1500, 3) and frame[1000, 1490].min() >= 254  # the transparent part is at the right


@pytest.mark.parametrize("kind", ["webp", "avif"])
def test_animations_are_read(folder, kind):
    clip = [odd_media.make_gradient(96, 64, index) for index in range(5)]
    options = {"lossless": True} if kind == "webp" else {"quality": 100, "subsampling": "4:4:4"}
    path = odd_media.write_pictures(folder / f"moving.{kind}", clip, duration=120, **options)
    media = read_media(path)
    expected = read_reference(path) if kind == "avif" else np.stack(clip)  # this FFmpeg reads no moving webp
    assert largest_difference(media.frames, expected) <= TOLERANCE and media.fps == pytest.approx(8.33, abs=0.01)
    artifact = ingest_media(MemoryObjectStore(), path.read_bytes(), "user")
    assert (artifact.frames, artifact.medium, artifact.key.rpartition(".")[2]) == (5, "video", kind)
    still = odd_media.write_pictures(folder / f"still.{kind}", clip[:1], **options)
    assert read_media(still).kind == "image"


@pytest.mark.skipif(not can_read_heic(), reason="pillow-heif is not installed")
def test_heic_is_read_where_it_can_be_decoded(folder):
    """The reference is the package's own decoder; the file is turned by its display orientation as well."""
    import pillow_heif

    pixels = odd_media.make_gradient(96, 64, 0)
    path = folder / "phone.heic"
    pillow_heif.from_pillow(Image.fromarray(pixels)).save(path, quality=-1)
    media = read_media(path)
    assert media.kind == "image" and media.frames.shape == (1, 64, 96, 3)
    assert largest_difference(media.frames[0], pixels) <= 8
    artifact = ingest_media(MemoryObjectStore(), path.read_bytes(), "user")
    assert (artifact.width, artifact.height, artifact.key.rpartition(".")[2]) == (96, 64, "heic")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UnreadableMedia, match="cut short"):
        read_media(path)


def test_heic_is_refused_by_name_without_its_package(folder, monkeypatch):
    monkeypatch.setattr("omnivideo.media.containers.can_read_heic", lambda: False)
    (folder / "a.heic").write_bytes(b"\0\0\0\x20ftypheic" + bytes(64))
    with pytest.raises(UnreadableMedia, match="is a HEIC picture, which cannot be read; allowed: mp4"):
        read_media(folder / "a.heic")


def test_twenty_seconds_of_full_hd_are_accepted(folder):
    path = odd_media.CLIPS["twenty-seconds.mp4"](folder / "long.mp4")
    info = measure_in_sandbox(path.read_bytes())
    assert (info.width, info.height, info.frames, info.fps) == (1920, 1080, 600, 30)
