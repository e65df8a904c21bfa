"""Files into pixels and back: what is refused, what survives, and what is left on the disk."""

import errno
import os
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from omnivideo.errors import InvalidInput, UnreadableMedia
from omnivideo.media import read, write
from omnivideo.media.contact_sheet import make_contact_sheet
from omnivideo.media.read import DecodedMedia, MediaLimits, fit_media, read_media
from omnivideo.media.write import check_output, write_media

FPS = 8


def shapes(frames: int = 9, width: int = 64, height: int = 64) -> np.ndarray:
    """A red disc that moves right over grey, above a blue box that stands still."""
    y, x = np.mgrid[:height, :width]
    clip = np.full((frames, height, width, 3), (140, 140, 140), np.uint8)
    for index, frame in enumerate(clip):
        frame[(x - 16 - 4 * index) ** 2 + (y - 22) ** 2 <= 49] = (225, 35, 40)
        frame[40:54, 10:24] = (40, 80, 230)
    return clip


def mux(path: Path, clip: np.ndarray, kind: str, codec: str, options: dict[str, str] | None = None) -> Path:
    """The clip in a foreign container."""
    with av.open(str(path), "w", format=kind, options=options or {}) as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.height, stream.width, stream.pix_fmt = *clip.shape[1:3], "yuv420p"
        for pixels in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def animate(path: Path, clip: np.ndarray, **options: object) -> Path:
    images = [Image.fromarray(pixels) for pixels in clip]
    images[0].save(path, save_all=True, append_images=images[1:], **options)
    return path


def psnr(one: np.ndarray, two: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((one.astype(float) - two.astype(float)) ** 2)))


def refusal(path: Path, limits: MediaLimits | None = None) -> str:
    """The refusal's text, which is one line, says the field and the name, and no folder."""
    with pytest.raises(UnreadableMedia) as caught:
        read_media(path, limits or MediaLimits())
    text = str(caught.value)
    assert caught.value.field == "source" and text.startswith("source: ")
    assert path.name in text and str(path.parent) not in text and "\n" not in text and "0x" not in text
    return text


@pytest.fixture(scope="module")
def mp4(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_media(path, shapes(), FPS)
    return path


# ---------------------------------------------------------------- reading


def test_an_mp4_comes_back_as_it_went(mp4):
    media = read_media(mp4)
    assert (media.kind, media.fps, media.frames.shape, media.frames.dtype) == ("video", 8.0, (9, 64, 64, 3), np.uint8)
    assert psnr(media.frames, shapes()) > 30
    assert abs(int(media.frames[0, 2, 2, 0]) - 140) <= 1


def test_saving_and_loading_again_and_again_does_not_darken(tmp_path):
    clip = shapes()
    for _ in range(4):
        write_media(tmp_path / "a.mp4", clip, FPS)
        clip = read_media(tmp_path / "a.mp4").frames
    assert abs(clip.mean() - shapes().mean()) < 0.5


@pytest.mark.parametrize(
    ("kind", "codec", "ending"),
    [
        ("mov", "mpeg4", "mov"),
        ("matroska", "libx264", "mkv"),
        ("webm", "libvpx", "webm"),
        ("avi", "mpeg4", "avi"),
    ],
)
def test_foreign_containers(tmp_path, kind, codec, ending):
    media = read_media(mux(tmp_path / f"a.{ending}", shapes(), kind, codec))
    assert (media.kind, media.fps, media.frames.shape) == ("video", 8.0, (9, 64, 64, 3))
    assert psnr(media.frames, shapes()) > 20


def test_a_fragmented_mp4(tmp_path):
    path = mux(tmp_path / "a.mp4", shapes(), "mp4", "libx264", {"movflags": "+frag_keyframe+empty_moov"})
    assert len(read_media(path).frames) == 9
    assert_cuts_are_refused(path)


def test_the_content_decides_not_the_name(tmp_path, mp4):
    Image.fromarray(shapes()[0]).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "still.mp4")
    (tmp_path / "clip.jpg").write_bytes(mp4.read_bytes())
    assert read_media(tmp_path / "still.mp4").kind == "image"
    assert read_media(tmp_path / "clip.jpg").kind == "video"


@pytest.mark.parametrize(("ending", "least"), [("png", 99), ("webp", 99), ("jpeg", 30)])
def test_stills(tmp_path, ending, least):
    Image.fromarray(shapes()[0]).save(tmp_path / f"a.{ending}", lossless=True, quality=95)
    media = read_media(tmp_path / f"a.{ending}")
    assert (media.kind, media.fps, media.frames.shape) == ("image", None, (1, 64, 64, 3))
    assert (media.frames == shapes()[:1]).all() or psnr(media.frames, shapes()[:1]) > least


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_animations(tmp_path, ending):
    media = read_media(animate(tmp_path / f"a.{ending}", shapes(), duration=120, lossless=True))
    assert (media.kind, media.fps, media.frames.shape) == ("video", pytest.approx(1 / 0.12, abs=1e-3), (9, 64, 64, 3))
    assert (media.frames == shapes()).all()


def test_an_animation_with_uneven_times_is_laid_on_an_even_grid(tmp_path):
    media = read_media(animate(tmp_path / "a.gif", shapes(5), duration=[300, 100, 100, 100, 200]))
    assert media.fps == 10
    assert (media.frames == shapes(5)[[0, 0, 0, 1, 2, 3, 4, 4]]).all()


def test_a_gif_in_which_nothing_moves_for_a_while_keeps_its_frames(tmp_path):
    clip = shapes()[[0, 0, 0, 1, 2, 3, 4, 4, 4]]  # Pillow writes equal neighbours as one
    write_media(tmp_path / "a.gif", clip, 10)
    assert (read_media(tmp_path / "a.gif").frames == clip).all()


def test_a_gif_of_one_frame_is_an_image(tmp_path):
    write_media(tmp_path / "a.gif", shapes(1), FPS)
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


def test_a_jpeg_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it 90 degrees clockwise
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    frame = read_media(tmp_path / "a.jpg").frames[0]
    assert frame.shape == (32, 16, 3) and frame[4].mean() > 250 and frame[28].mean() < 5


def test_a_second_view_inside_a_jpeg_does_not_make_it_a_clip(tmp_path):
    animate(tmp_path / "a.jpg", shapes(2), format="MPO")
    assert read_media(tmp_path / "a.jpg").kind == "image"


def test_a_phone_clip_is_turned_upright(tmp_path):
    write_media(tmp_path / "a.mp4", shapes(2, 64, 48), FPS)
    data = bytearray((tmp_path / "a.mp4").read_bytes())

    def matrix(*cells: int) -> bytes:
        return b"".join(cell.to_bytes(4, "big", signed=True) for cell in cells)

    one, at = 1 << 16, data.find(matrix(1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30), data.find(b"tkhd"))
    data[at : at + 36] = matrix(0, one, 0, -one, 0, 0, 48 * one, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data)
    expected = np.rot90(read_media(tmp_path / "a.mp4").frames, -1, axes=(1, 2))
    assert (read_media(tmp_path / "turned.mp4").frames == expected).all()


def test_frames_that_an_edit_list_cuts_away_are_not_missed(tmp_path, mp4):
    with av.open(str(mp4)) as source, av.open(str(tmp_path / "a.mp4"), "w", format="mp4") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                shift = round(3 / FPS / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                target.mux(packet)
    assert len(read_media(tmp_path / "a.mp4").frames) == 6


# ---------------------------------------------------------------- refusals


def test_no_such_file(tmp_path):
    assert "No such file" in refusal(tmp_path / "none.mp4")


def test_a_folder(tmp_path):
    (tmp_path / "a.mp4").mkdir()
    assert "folder" in refusal(tmp_path / "a.mp4")


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    assert "not a file" in refusal(tmp_path / "a.mp4")


def test_an_empty_file(tmp_path):
    (tmp_path / "a.mp4").touch()
    assert "empty" in refusal(tmp_path / "a.mp4")


def test_ten_gigabytes_are_refused_unopened(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    path.touch()
    os.truncate(path, 10 * 2**30)
    monkeypatch.setattr(Path, "open", None)
    assert "10737418240 bytes; allowed: 1 to 536870912" in refusal(path)


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
def test_what_is_no_media(tmp_path, content):
    (tmp_path / "a.mp4").write_bytes(content)
    assert "no image or video; allowed: mp4" in refusal(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    "head", [b"\0\0\0\x20ftypisom", b"\x1a\x45\xdf\xa3", b"RIFF\x10\0\0\0AVI ", b"GIF89a", b"\xff\xd8\xff"]
)
def test_a_right_beginning_and_then_noise(tmp_path, head):
    (tmp_path / "a.bin").write_bytes(head + np.random.default_rng(0).bytes(3000))
    refusal(tmp_path / "a.bin")


def test_sound_alone(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert "no video stream" in refusal(tmp_path / "a.mp4")


def cuts(path: Path) -> list[int]:
    """Lengths at which to cut a file: in its header, between, and near its end."""
    size = path.stat().st_size
    return [20, size // 4, size // 2, size * 3 // 4, size - 200, size - 30, size - 10, size - 1]


def assert_cuts_are_refused(path: Path) -> None:
    data = path.read_bytes()
    for length in cuts(path):
        cut = path.with_name(f"cut{length}{path.suffix}")
        cut.write_bytes(data[:length])
        refusal(cut)


def test_a_cut_mp4_with_its_index_at_the_front(tmp_path):
    write_media(tmp_path / "a.mp4", shapes(), FPS)
    assert_cuts_are_refused(tmp_path / "a.mp4")


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
def test_a_cut_clip(tmp_path, kind, codec, ending):
    assert_cuts_are_refused(mux(tmp_path / f"a.{ending}", shapes(), kind, codec))


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_a_cut_animation(tmp_path, ending):
    assert_cuts_are_refused(animate(tmp_path / f"a.{ending}", shapes(), duration=120))


@pytest.mark.parametrize("ending", ["png", "jpeg", "webp", "gif"])
def test_a_cut_still(tmp_path, ending):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / f"a.{ending}")
    assert_cuts_are_refused(tmp_path / f"a.{ending}")


def test_fewer_frames_than_the_header_says(tmp_path):
    write_media(tmp_path / "a.mp4", np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8), FPS)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)  # of the right length, but with nothing in it
    (tmp_path / "a.mp4").write_bytes(data)
    refusal(tmp_path / "a.mp4")


def png_bomb(side: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    pixels = chunk(b"IDAT", zlib.compress(bytes(10_000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [4_000, 10_000, 50_000])  # below, at and above where Pillow warns and refuses
def test_a_bomb_is_refused_by_its_header(tmp_path, side):
    (tmp_path / "a.png").write_bytes(png_bomb(side))
    assert "pixels a frame; allowed: 1 to 9437184" in refusal(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("limits", "what"),
    [
        (MediaLimits(max_bytes=100), "bytes; allowed: 1 to 100"),
        (MediaLimits(max_frame_pixels=64 * 63), "has 4096 pixels a frame; allowed: 1 to 4032"),
        (MediaLimits(max_frames=8), "has 9 frames; allowed: 1 to 8"),
        (MediaLimits(max_seconds=1), "has 1.125 seconds; allowed: 1 to 1"),
        (MediaLimits(max_decoded_bytes=100_000), "has 110592 bytes of pixels; allowed: 1 to 100000"),
    ],
)
def test_over_a_limit_by_the_header(mp4, limits, what, monkeypatch):
    monkeypatch.setattr(read, "decode_stream", None)
    assert what in refusal(mp4, limits)


@pytest.mark.parametrize(
    ("limits", "what"),
    [
        (MediaLimits(max_frames=8), "has 9 frames; allowed: 1 to 8"),
        (MediaLimits(max_seconds=1), "seconds; allowed: 1 to 1"),
        (MediaLimits(max_decoded_bytes=100_000), "bytes of pixels; allowed: 1 to 100000"),
    ],
)
def test_over_a_limit_that_only_decoding_shows(tmp_path, limits, what):
    options = {"live": "1"}  # such a webm states neither its size nor its duration
    assert what in refusal(mux(tmp_path / "a.webm", shapes(), "webm", "libvpx", options), limits)
    assert what in refusal(animate(tmp_path / "a.gif", shapes(), duration=120), limits)


def test_an_even_grid_stays_within_the_limits(tmp_path):
    path = animate(tmp_path / "a.gif", shapes(4), duration=[20, 20_000, 20, 20])
    assert "frames; allowed: 1 to 100" in refusal(path, MediaLimits(max_frames=100))


def test_a_name_cannot_break_the_line(tmp_path):
    (tmp_path / "a\nb.mp4").write_text("no film")
    with pytest.raises(UnreadableMedia, match=r"^source: 'a\?b.mp4' is no image or video; [^\n]*$"):
        read_media(tmp_path / "a\nb.mp4")


def test_text_in_a_png_is_no_duration(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("duration", "long")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    assert read_media(tmp_path / "a.png").kind == "image"


# ---------------------------------------------------------------- fitting


def numbered(frames: int, fps: float) -> DecodedMedia:
    """A clip whose frames say their number."""
    return DecodedMedia(np.repeat(np.arange(frames, dtype=np.uint8), 8 * 8 * 3).reshape(-1, 8, 8, 3), fps, "video")


@pytest.mark.parametrize(
    ("source", "frames", "fps", "expected"),
    [
        (numbered(9, 8), 9, 8, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (numbered(9, 16), 4, 8, [0, 2, 4, 6]),
        (numbered(3, 4), 5, 8, [0, 1, 1, 2, 2]),
        (numbered(2, 8), 5, 8, [0, 1, 1, 1, 1]),
        (DecodedMedia(numbered(1, 1).frames, None, "image"), 3, 8, [0, 0, 0]),
    ],
)
def test_fit_in_time(source, frames, fps, expected):
    assert fit_media(source, 8, 8, frames, fps)[:, 0, 0, 0].tolist() == expected


def test_fit_leaves_what_fits_alone():
    media = DecodedMedia(shapes(), FPS, "video")
    assert (fit_media(media, 64, 64, 9, FPS) == shapes()).all()


@pytest.mark.parametrize(("width", "height"), [(32, 32), (64, 32), (30, 50), (123, 7), (1, 1)])
def test_fit_crops_at_the_centre(width, height):
    pixels = np.zeros((1, 90, 160, 3), np.uint8)
    pixels[:, 40:50, 75:85] = 255
    fitted = fit_media(DecodedMedia(pixels, None, "image"), width, height, 2, FPS)
    assert fitted.shape == (2, height, width, 3) and fitted.dtype == np.uint8
    weight = fitted[0, :, :, 0].astype(float)
    y, x = np.mgrid[:height, :width]
    centre = (weight * x).sum() / weight.sum(), (weight * y).sum() / weight.sum()
    assert centre == (pytest.approx((width - 1) / 2, abs=0.1), pytest.approx((height - 1) / 2, abs=0.1))


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_two_writes_are_the_same_bytes(tmp_path, name):
    (tmp_path / "other").mkdir()
    for path in (tmp_path / name, tmp_path / "other" / name):
        write_media(path, shapes(), FPS)
    assert (tmp_path / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_an_mp4_plays_in_browsers(mp4):
    data = mp4.read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")
    with av.open(str(mp4)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", FPS)


@pytest.mark.parametrize(("width", "height", "frames"), [(33, 17, 3), (2, 2, 1), (1, 1, 1), (64, 64, 1)])
def test_odd_sizes_and_single_frames_as_mp4(tmp_path, width, height, frames):
    clip = np.full((frames, height, width, 3), 90, np.uint8)
    write_media(tmp_path / "a.mp4", clip, FPS)
    media = read_media(tmp_path / "a.mp4")
    assert media.frames.shape == (frames, height + height % 2, width + width % 2, 3)
    assert media.fps == FPS and np.abs(media.frames.astype(int) - 90).max() <= 2


@pytest.mark.parametrize("fps", [0.5, 8, 23.976, 29.97, 60])
def test_an_mp4_keeps_its_rate(tmp_path, fps):
    write_media(tmp_path / "a.mp4", shapes(), fps)
    assert read_media(tmp_path / "a.mp4").fps == pytest.approx(fps, rel=1e-4)


@pytest.mark.parametrize("fps", [8, 12, 24])
def test_a_gif_loops_and_keeps_its_mean_rate(tmp_path, fps):
    write_media(tmp_path / "a.gif", shapes(), fps)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.info["loop"] == 0
    media = read_media(tmp_path / "a.gif")
    assert media.fps == pytest.approx(fps, rel=0.02) and (media.frames == shapes()).all()


def test_a_png_holds_one_frame(tmp_path):
    write_media(tmp_path / "a.png", shapes(1), FPS)
    assert (read_media(tmp_path / "a.png").frames == shapes(1)).all()
    with pytest.raises(InvalidInput, match=r"output: 'b.png' holds one frame, not 9"):
        write_media(tmp_path / "b.png", shapes(), FPS)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("name", ["a.webm", "a", "mp4", "a.mp4.txt", ".png"])
def test_unknown_endings(tmp_path, name):
    with pytest.raises(InvalidInput, match=r"allowed: \.mp4, \.gif, \.png") as caught:
        write_media(tmp_path / name, shapes(1), FPS)
    assert caught.value.field == "output" and not list(tmp_path.iterdir())


def test_check_output(tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    for name in ("a.mp4", "a.GIF", "a.png"):
        check_output(tmp_path / name, 1)
    for name, frames in [("a.png", 2), ("folder.mp4", 1), ("none/a.mp4", 1), ("a.avi", 1)]:
        with pytest.raises(InvalidInput, match=r"^output: [^\n]*allowed: ") as caught:
            check_output(tmp_path / name, frames)
        assert str(tmp_path) not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(InvalidInput, match="read-only"):
        check_output(tmp_path / "a.mp4", 1)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 1000])
def test_a_rate_that_cannot_be(tmp_path, fps):
    with pytest.raises(InvalidInput, match=r"fps: .* allowed: 0\.1 to 240"):
        write_media(tmp_path / "a.mp4", shapes(), fps)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (RuntimeError("a bug"), RuntimeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), InvalidInput),
    ],
)
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failure, raised):
    (tmp_path / "a.mp4").write_bytes(b"old")
    whole, frames = write.rgb_to_yuv, []

    def failing(pixels: np.ndarray) -> av.VideoFrame:
        frames.append(pixels)
        if len(frames) == 5:
            raise failure
        return whole(pixels)

    monkeypatch.setattr(write, "rgb_to_yuv", failing)
    with pytest.raises(raised):
        write_media(tmp_path / "a.mp4", shapes(), FPS)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"] and (tmp_path / "a.mp4").read_bytes() == b"old"


def test_a_written_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    write_media(tmp_path / "a.mp4", shapes(1), FPS)
    assert (tmp_path / "a.mp4").stat().st_mode == (tmp_path / "usual").stat().st_mode


# ---------------------------------------------------------------- looking


def test_a_contact_sheet_shows_each_frame_enlarged():
    sheet = make_contact_sheet([shapes(), shapes(1), shapes(30)], ["a clip", "a still", "a longer clip"], scale=2)
    colours = np.asarray(sheet).reshape(-1, 3)
    discs = (np.abs(colours.astype(int) - (40, 80, 230)).sum(1) == 0).sum()
    assert discs == (9 + 1 + 9) * 14 * 14 * 2 * 2
    assert sheet.width > 9 * 128 and sheet.height > 3 * 128


def test_a_long_caption_is_broken_into_lines():
    short, long = (make_contact_sheet([shapes(2)], [text]) for text in ("word", "word " * 100))
    assert long.width == short.width and long.height > short.height
