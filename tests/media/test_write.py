"""Writing media gives the same bytes every time, and a failure leaves no file."""

import errno
import os
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from omnivideo.errors import InvalidInput
from omnivideo.media import write
from omnivideo.media.read import read_media
from omnivideo.media.write import check_output, write_media
from tests.support.clips import FPS, make_clip


@pytest.fixture(scope="module")
def mp4(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_media(path, make_clip(), FPS)
    return path


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_two_writes_give_the_same_bytes(tmp_path, name):
    (tmp_path / "other").mkdir()
    for path in (tmp_path / name, tmp_path / "other" / name):
        write_media(path, make_clip(), FPS)
    assert (tmp_path / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_an_mp4_plays_in_browsers(mp4):
    data = mp4.read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")
    with av.open(str(mp4)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", FPS)


@pytest.mark.parametrize(("width", "height", "frames"), [(33, 17, 3), (2, 2, 1), (1, 1, 1), (64, 64, 1)])
def test_odd_sizes_and_single_frames_are_written_as_mp4(tmp_path, width, height, frames):
    clip = np.full((frames, height, width, 3), 90, np.uint8)
    write_media(tmp_path / "a.mp4", clip, FPS)
    media = read_media(tmp_path / "a.mp4")
    assert media.frames.shape == (frames, height + height % 2, width + width % 2, 3)
    assert media.fps == FPS and np.abs(media.frames.astype(int) - 90).max() <= 2


@pytest.mark.parametrize("fps", [0.5, 8, 23.976, 29.97, 60])
def test_an_mp4_keeps_its_rate(tmp_path, fps):
    write_media(tmp_path / "a.mp4", make_clip(), fps)
    assert read_media(tmp_path / "a.mp4").fps == pytest.approx(fps, rel=1e-4)


@pytest.mark.parametrize("fps", [8, 12, 24])
def test_a_gif_loops_and_keeps_its_mean_rate(tmp_path, fps):
    write_media(tmp_path / "a.gif", make_clip(), fps)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.info["loop"] == 0
    media = read_media(tmp_path / "a.gif")
    assert media.fps == pytest.approx(fps, rel=0.02) and (media.frames == make_clip()).all()


def test_a_png_holds_one_frame(tmp_path):
    write_media(tmp_path / "a.png", make_clip(1), FPS)
    assert (read_media(tmp_path / "a.png").frames == make_clip(1)).all()
    with pytest.raises(InvalidInput, match=r"output: 'b.png' holds one frame, not 9"):
        write_media(tmp_path / "b.png", make_clip(), FPS)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("name", ["a.webm", "a", "mp4", "a.mp4.txt", ".png"])
def test_unknown_suffixes_are_refused(tmp_path, name):
    with pytest.raises(InvalidInput, match=r"allowed: \.mp4, \.gif, \.png") as caught:
        write_media(tmp_path / name, make_clip(1), FPS)
    assert caught.value.field == "output" and not list(tmp_path.iterdir())


def test_output_paths_are_checked(tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    for name in ("a.mp4", "a.GIF", "a.png"):
        check_output(tmp_path / name, 1)
    for name, frames in [("a.png", 2), ("folder.mp4", 1), ("none/a.mp4", 1), ("a.avi", 1)]:
        with pytest.raises(InvalidInput, match=r"^output: [^\n]*allowed: ") as caught:
            check_output(tmp_path / name, frames)
        assert str(tmp_path) not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(InvalidInput, match="read-only"):
        check_output(tmp_path / "a.mp4", 1)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 1000])
def test_an_invalid_rate_is_refused(tmp_path, fps):
    with pytest.raises(InvalidInput, match=r"fps: .* allowed: 0\.1 to 240"):
        write_media(tmp_path / "a.mp4", make_clip(), fps)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (RuntimeError("a bug"), RuntimeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), InvalidInput),
    ],
)
def test_a_failure_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch, failure, raised):
    (tmp_path / "a.mp4").write_bytes(b"old")
    whole, frames = write.rgb_to_yuv, []

    def failing(pixels: np.ndarray) -> av.VideoFrame:
        frames.append(pixels)
        if len(frames) == 5:
            raise failure
        return whole(pixels)

    monkeypatch.setattr(write, "rgb_to_yuv", failing)
    with pytest.raises(raised):
        write_media(tmp_path / "a.mp4", make_clip(), FPS)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"] and (tmp_path / "a.mp4").read_bytes() == b"old"


def test_a_written_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    write_media(tmp_path / "a.mp4", make_clip(1), FPS)
    assert (tmp_path / "a.mp4").stat().st_mode == (tmp_path / "usual").stat().st_mode
