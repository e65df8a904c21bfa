"""Media that are refused: the message names the field, the file and the allowed range."""

import os
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from omnivideo.errors import UnreadableMedia
from omnivideo.media import decode
from omnivideo.media.limits import MediaLimits
from omnivideo.media.read import read_media
from omnivideo.media.write import write_media
from tests.support.clips import FPS, assert_truncation_is_refused, make_clip, mux_clip, read_refusal, write_animation


@pytest.fixture(scope="module")
def mp4(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_media(path, make_clip(), FPS)
    return path


def test_a_missing_file_is_refused(tmp_path):
    assert "No such file" in read_refusal(tmp_path / "none.mp4")


def test_a_folder_is_refused(tmp_path):
    (tmp_path / "a.mp4").mkdir()
    assert "folder" in read_refusal(tmp_path / "a.mp4")


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    assert "not a file" in read_refusal(tmp_path / "a.mp4")


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "a.mp4").touch()
    assert "empty" in read_refusal(tmp_path / "a.mp4")


def test_ten_gigabytes_are_refused_without_opening_the_file(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    path.touch()
    os.truncate(path, 10 * 2**30)
    monkeypatch.setattr(Path, "open", None)
    assert "10737418240 bytes; allowed: 1 to 536870912" in read_refusal(path)


@pytest.mark.parametrize(
    "content",
    [
        b"just some text, no film at all\n",
        b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"\0" * 4096,
        b"\0\0\0\x20ftypheic" + b"\0" * 64,
    ],
)
def test_files_that_are_not_media_are_refused(tmp_path, content):
    (tmp_path / "a.mp4").write_bytes(content)
    assert "not an image or video; allowed: mp4" in read_refusal(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    "head", [b"\0\0\0\x20ftypisom", b"\x1a\x45\xdf\xa3", b"RIFF\x10\0\0\0AVI ", b"GIF89a", b"\xff\xd8\xff"]
)
def test_a_valid_header_before_noise_is_refused(tmp_path, head):
    (tmp_path / "a.bin").write_bytes(head + np.random.default_rng(0).bytes(3000))
    read_refusal(tmp_path / "a.bin")


def test_a_file_with_sound_only_is_refused(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert "no video stream" in read_refusal(tmp_path / "a.mp4")


def test_a_truncated_mp4_with_its_index_at_the_front_is_refused(tmp_path):
    write_media(tmp_path / "a.mp4", make_clip(), FPS)
    assert_truncation_is_refused(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    ("kind", "codec", "ending"),
    [
        ("mp4", "libx264", "mp4"),
        ("mov", "mpeg4", "mov"),
        ("matroska", "libx264", "mkv"),
        ("webm", "libvpx", "webm"),
        ("avi", "mpeg4", "avi"),
    ],
)
def test_a_truncated_clip_is_refused(tmp_path, kind, codec, ending):
    assert_truncation_is_refused(mux_clip(tmp_path / f"a.{ending}", make_clip(), kind, codec))


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_a_truncated_animation_is_refused(tmp_path, ending):
    assert_truncation_is_refused(write_animation(tmp_path / f"a.{ending}", make_clip(), duration=120))


@pytest.mark.parametrize("ending", ["png", "jpeg", "webp", "gif"])
def test_a_truncated_still_is_refused(tmp_path, ending):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / f"a.{ending}")
    assert_truncation_is_refused(tmp_path / f"a.{ending}")


def test_fewer_frames_than_in_the_header_are_refused(tmp_path):
    write_media(tmp_path / "a.mp4", np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8), FPS)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)  # of the right length, but empty
    (tmp_path / "a.mp4").write_bytes(data)
    read_refusal(tmp_path / "a.mp4")


def png_bomb(side: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    pixels = chunk(b"IDAT", zlib.compress(bytes(10_000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "side", [4_000, 10_000, 50_000]
)  # below, at and above the limits at which Pillow warns and refuses
def test_a_bomb_is_refused_by_its_header(tmp_path, side):
    (tmp_path / "a.png").write_bytes(png_bomb(side))
    assert "pixels per frame; allowed: 1 to 9437184" in read_refusal(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("limits", "what"),
    [
        (MediaLimits(max_bytes=100), "bytes; allowed: 1 to 100"),
        (MediaLimits(max_frame_pixels=64 * 63), "has 4096 pixels per frame; allowed: 1 to 4032"),
        (MediaLimits(max_frames=8), "has 9 frames; allowed: 1 to 8"),
        (MediaLimits(max_seconds=1), "has 1.125 seconds; allowed: 1 to 1"),
        (MediaLimits(max_decoded_bytes=100_000), "has 110592 bytes of pixels; allowed: 1 to 100000"),
    ],
)
def test_a_header_over_a_limit_is_refused(mp4, limits, what, monkeypatch):
    monkeypatch.setattr(decode, "decode_stream", None)
    assert what in read_refusal(mp4, limits)


@pytest.mark.parametrize(
    ("limits", "what"),
    [
        (MediaLimits(max_frames=8), "has 9 frames; allowed: 1 to 8"),
        (MediaLimits(max_seconds=1), "seconds; allowed: 1 to 1"),
        (MediaLimits(max_decoded_bytes=100_000), "bytes of pixels; allowed: 1 to 100000"),
    ],
)
def test_a_file_over_a_limit_is_refused_while_decoding(tmp_path, limits, what):
    options = {"live": "1"}  # such a webm states neither its size nor its duration
    assert what in read_refusal(mux_clip(tmp_path / "a.webm", make_clip(), "webm", "libvpx", options), limits)
    assert what in read_refusal(write_animation(tmp_path / "a.gif", make_clip(), duration=120), limits)


def test_an_even_grid_stays_within_the_limits(tmp_path):
    path = write_animation(tmp_path / "a.gif", make_clip(4), duration=[20, 20_000, 20, 20])
    assert "frames; allowed: 1 to 100" in read_refusal(path, MediaLimits(max_frames=100))


def test_a_name_cannot_break_the_line(tmp_path):
    (tmp_path / "a\nb.mp4").write_text("no film")
    with pytest.raises(UnreadableMedia, match=r"^source: 'a\?b.mp4' is not an image or video; [^\n]*$"):
        read_media(tmp_path / "a\nb.mp4")


def test_text_in_a_png_is_not_a_duration(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("duration", "long")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    assert read_media(tmp_path / "a.png").kind == "image"
