"""Media that can be read: formats, times, colours and orientation."""

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from omnivideo.media.read import read_media
from omnivideo.media.write import write_media
from tests.support.clips import FPS, assert_truncation_is_refused, compute_psnr, make_clip, mux_clip, write_animation


@pytest.fixture(scope="module")
def mp4(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_media(path, make_clip(), FPS)
    return path


def test_an_mp4_is_read_as_it_was_written(mp4):
    media = read_media(mp4)
    assert (media.kind, media.fps, media.frames.shape, media.frames.dtype) == ("video", 8.0, (9, 64, 64, 3), np.uint8)
    assert compute_psnr(media.frames, make_clip()) > 30
    assert abs(int(media.frames[0, 2, 2, 0]) - 140) <= 1


def test_repeated_saving_and_loading_does_not_darken(tmp_path):
    clip = make_clip()
    for _ in range(4):
        write_media(tmp_path / "a.mp4", clip, FPS)
        clip = read_media(tmp_path / "a.mp4").frames
    assert abs(clip.mean() - make_clip().mean()) < 0.5


@pytest.mark.parametrize(
    ("kind", "codec", "ending"),
    [
        ("mov", "mpeg4", "mov"),
        ("matroska", "libx264", "mkv"),
        ("webm", "libvpx", "webm"),
        ("avi", "mpeg4", "avi"),
    ],
)
def test_other_containers_are_read(tmp_path, kind, codec, ending):
    media = read_media(mux_clip(tmp_path / f"a.{ending}", make_clip(), kind, codec))
    assert (media.kind, media.fps, media.frames.shape) == ("video", 8.0, (9, 64, 64, 3))
    assert compute_psnr(media.frames, make_clip()) > 20


def test_a_fragmented_mp4_is_read(tmp_path):
    path = mux_clip(tmp_path / "a.mp4", make_clip(), "mp4", "libx264", {"movflags": "+frag_keyframe+empty_moov"})
    assert len(read_media(path).frames) == 9
    assert_truncation_is_refused(path)


def test_the_content_determines_the_format_not_the_name(tmp_path, mp4):
    Image.fromarray(make_clip()[0]).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "still.mp4")
    (tmp_path / "clip.jpg").write_bytes(mp4.read_bytes())
    assert read_media(tmp_path / "still.mp4").kind == "image"
    assert read_media(tmp_path / "clip.jpg").kind == "video"


@pytest.mark.parametrize(("ending", "least"), [("png", 99), ("webp", 99), ("jpeg", 30)])
def test_stills_are_read(tmp_path, ending, least):
    Image.fromarray(make_clip()[0]).save(tmp_path / f"a.{ending}", lossless=True, quality=95)
    media = read_media(tmp_path / f"a.{ending}")
    assert (media.kind, media.fps, media.frames.shape) == ("image", None, (1, 64, 64, 3))
    assert (media.frames == make_clip()[:1]).all() or compute_psnr(media.frames, make_clip()[:1]) > least


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_animations_are_read(tmp_path, ending):
    media = read_media(write_animation(tmp_path / f"a.{ending}", make_clip(), duration=120, lossless=True))
    assert (media.kind, media.fps, media.frames.shape) == ("video", pytest.approx(1 / 0.12, abs=1e-3), (9, 64, 64, 3))
    assert (media.frames == make_clip()).all()


def test_an_animation_with_uneven_times_is_resampled_evenly(tmp_path):
    media = read_media(write_animation(tmp_path / "a.gif", make_clip(5), duration=[300, 100, 100, 100, 200]))
    assert media.fps == 10
    assert (media.frames == make_clip(5)[[0, 0, 0, 1, 2, 3, 4, 4]]).all()


def test_a_gif_with_a_static_part_keeps_its_frames(tmp_path):
    clip = make_clip()[[0, 0, 0, 1, 2, 3, 4, 4, 4]]  # Pillow merges equal consecutive frames
    write_media(tmp_path / "a.gif", clip, 10)
    assert (read_media(tmp_path / "a.gif").frames == clip).all()


def test_a_gif_of_one_frame_is_an_image(tmp_path):
    write_media(tmp_path / "a.gif", make_clip(1), FPS)
    media = read_media(tmp_path / "a.gif")
    assert (media.kind, media.fps, len(media.frames)) == ("image", None, 1)


def test_alpha_is_composited_on_white(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:, 2:] = (10, 20, 30, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    frame = read_media(tmp_path / "a.png").frames[0]
    assert frame[0, 0].tolist() == [255, 255, 255] and frame[0, 3].tolist() == [10, 20, 30]


def test_sixteen_bit_grey_is_scaled(tmp_path):
    Image.fromarray(np.array([[0, 0x8000, 0xFFFF]], np.uint16)).save(tmp_path / "a.png")
    assert read_media(tmp_path / "a.png").frames[0, 0, :, 0].tolist() == [0, 128, 255]


def test_a_jpeg_is_rotated_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise for display
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    frame = read_media(tmp_path / "a.jpg").frames[0]
    assert frame.shape == (32, 16, 3) and frame[4].mean() > 250 and frame[28].mean() < 5


def test_a_second_view_inside_a_jpeg_does_not_make_it_a_clip(tmp_path):
    write_animation(tmp_path / "a.jpg", make_clip(2), format="MPO")
    assert read_media(tmp_path / "a.jpg").kind == "image"


def test_a_phone_clip_is_rotated_upright(tmp_path):
    write_media(tmp_path / "a.mp4", make_clip(2, 64, 48), FPS)
    data = bytearray((tmp_path / "a.mp4").read_bytes())

    def matrix(*cells: int) -> bytes:
        return b"".join(cell.to_bytes(4, "big", signed=True) for cell in cells)

    one, at = 1 << 16, data.find(matrix(1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30), data.find(b"tkhd"))
    data[at : at + 36] = matrix(0, one, 0, -one, 0, 0, 48 * one, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data)
    expected = np.rot90(read_media(tmp_path / "a.mp4").frames, -1, axes=(1, 2))
    assert (read_media(tmp_path / "turned.mp4").frames == expected).all()


def test_frames_that_an_edit_list_removes_are_not_missing(tmp_path, mp4):
    with av.open(str(mp4)) as source, av.open(str(tmp_path / "a.mp4"), "w", format="mp4") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                shift = round(3 / FPS / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                target.mux(packet)
    assert len(read_media(tmp_path / "a.mp4").frames) == 6
