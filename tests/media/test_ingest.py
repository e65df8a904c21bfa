"""Media of users are stored as they are read later; each test of an attack is named after it."""

import io
import os
import pickle
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import pytest

from omnivideo.errors import UnreadableMedia
from omnivideo.media import ingest
from omnivideo.media.artifacts import load_frames
from omnivideo.media.ingest import ingest_media
from omnivideo.media.limits import MediaLimits
from omnivideo.media.read import MediaInfo
from omnivideo.media.sandbox import ProcessLimits
from omnivideo.storage.objects.memory import MemoryObjectStore
from tests.support.foreign_media import encode_animation, encode_clip, encode_still, ingest_refusal


@pytest.mark.parametrize(
    ("data", "suffix", "medium", "frames"),
    [
        (encode_still("PNG"), "png", "image", 1),
        (encode_still("JPEG"), "jpg", "image", 1),
        (encode_still("WEBP"), "webp", "image", 1),
        (encode_animation("GIF"), "gif", "video", 9),
        (encode_clip(), "mp4", "video", 9),
        (encode_clip("mov", "mpeg4"), "mov", "video", 9),
        (encode_clip("webm", "libvpx"), "webm", "video", 9),
        (encode_clip("matroska"), "mkv", "video", 9),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_media_are_stored_by_their_content_and_read_back(data, suffix, medium, frames):
    store = MemoryObjectStore()
    made = ingest_media(store, data, "turn 3", "My_holiday-film.exe")
    assert made.key.endswith(f".{suffix}") and store.get(made.key) == data
    assert (made.medium, made.width, made.height, made.frames) == (medium, 48, 64, frames)
    assert (made.caption, made.created_by) == ("My holiday film", "turn 3")
    assert load_frames(store, made).shape == (frames, 64, 48, 3)
    assert made.fps == pytest.approx(1 if medium == "image" else 10 if suffix == "gif" else 8)


def test_several_files_are_ingested_at_once(noise_mp4):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: ingest_media(MemoryObjectStore(), noise_mp4, "user").key, range(4)))
    assert len(set(found)) == 1


def test_importing_loads_no_model_library():
    code = "import sys, omnivideo.media.ingest; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert not {"torch", "transformers", "diffusers"} & set(done.stdout.split()) and done.returncode == 0


def test_the_service_can_lower_the_limits(noise_mp4):
    assert "has 9 frames; allowed: 1 to 8" in ingest_refusal(noise_mp4, limits=MediaLimits(max_frames=8))
    with pytest.raises(AssertionError):
        ingest_media(MemoryObjectStore(), noise_mp4, "user", limits=MediaLimits(max_frames=10**6))


def test_the_caller_names_the_field_of_the_error(noise_mp4):
    with pytest.raises(UnreadableMedia, match=r"^input_reference: the file is empty; allowed: 1 to") as caught:
        ingest_media(MemoryObjectStore(), b"", "user", field="input_reference")
    assert caught.value.field == "input_reference"


@pytest.mark.parametrize(
    ("name", "about"),
    [
        ("../../etc/passwd.png", "passwd"),
        ("..\\..\\windows\\win.ini", "win"),
        ("/etc/cron.d/x", "x"),
        ("a\0b/../c\r\nSet-Cookie: d.png", "c Set Cookie d"),
        ("....//....//", "image"),
        ("\u202egnp.exe", "gnp"),
        ("\ud800.png", "image"),
        ("n" * 10_000, "n" * 100),
    ],
)
def test_attack_traversal_in_a_name(name, about, monkeypatch):
    text = ingest_refusal(b"no media", name)
    assert "/" not in text and "\\" not in text and text.isprintable() and len(text) < 300
    monkeypatch.setattr(ingest, "measure_in_sandbox", lambda *_: MediaInfo(48, 64, 1, None, "image"))
    made = ingest_media(MemoryObjectStore(), encode_still("PNG"), "user", name)
    assert made.caption == about and made.key[64:] == ".png" and len(made.key) == 68


def test_attack_playlist_named_mp4(no_child_process):
    script = b"#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
    assert "is not an image or video; allowed: mp4" in ingest_refusal(script)


def test_attack_concat_script_named_mp4(no_child_process):
    assert "is not an image or video" in ingest_refusal(b"ffconcat version 1.0\nfile /etc/passwd\n")


@pytest.mark.parametrize("script", [b"#EXTM3U\n#EXTINF:1,\nFILE\n", b"ffconcat version 1.0\nfile FILE\n"])
def test_attack_script_behind_the_head_of_an_mp4(script, tmp_path, noise_mp4):
    (tmp_path / "secret.mp4").write_bytes(noise_mp4)
    script = script.replace(b"FILE", bytes(tmp_path / "secret.mp4"))
    for head in (b"\0\0\0\x18ftypisom\0\0\0\0isommp41", b"\x1a\x45\xdf\xa3"):
        text = ingest_refusal(head + script)
        assert "damaged" in text or "cut short" in text


def test_attack_svg_with_an_external_entity(no_child_process):
    svg = b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg><text>&x;</text></svg>'
    assert "is not an image or video" in ingest_refusal(svg, "a.png")


def test_attack_pickle(tmp_path, no_child_process):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    assert "is not an image or video" in ingest_refusal(pickle.dumps(Bomb()), "a.mp4")
    assert not list(tmp_path.iterdir())


def test_attack_empty_file(no_child_process):
    assert "is empty; allowed: 1 to" in ingest_refusal(b"")


def test_attack_old_container(no_child_process):
    assert "is not an image or video" in ingest_refusal(b"RIFF\x10\0\0\0AVI " + bytes(64), "a.avi")


def test_attack_rare_codec():
    assert "is coded as ffv1; allowed: h264" in ingest_refusal(encode_clip("matroska", "ffv1"))


def test_attack_bytes_above_the_cap(noise_mp4, no_child_process):
    text = ingest_refusal(noise_mp4, limits=MediaLimits(max_bytes=100))
    assert f"has {len(noise_mp4)} bytes; allowed: 1 to 100" in text


@pytest.mark.parametrize("side", [4_000, 50_000])
def test_attack_png_decompression_bomb(side):
    def chunk(name: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")

    rows = zlib.compress(bytes(side * 3 * 100), 9)
    header = chunk(b"IHDR", side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0]))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    assert "pixels per frame; allowed: 1 to 9437184" in ingest_refusal(data)


def test_attack_webp_canvas_of_a_gigabyte():
    data = bytearray(encode_animation("WEBP"))
    at = data.index(b"VP8X") + 12  # 24 bits each of width - 1 and height - 1
    data[at : at + 6] = (16_382).to_bytes(3, "little") * 2
    ingest_refusal(bytes(data), process_limits=ProcessLimits(max_memory_bytes=2**28))


def test_attack_gif_of_many_frames():
    head = b"GIF89a\x01\0\x01\0\x80\0\0" + bytes(6)
    frame = b"\x21\xf9\x04\0\x02\0\0\0" + b"\x2c\0\0\0\0\x01\0\x01\0\0" + b"\x02\x02\x44\x01\0"
    assert "has 2001 frames; allowed: 1 to 2000" in ingest_refusal(head + frame * 50_000 + b";")


def test_attack_mp4_of_many_frames():
    assert "has 300 frames; allowed: 1 to 200" in ingest_refusal(
        encode_clip(times=range(300)), limits=MediaLimits(max_frames=200)
    )


def test_attack_absurd_duration():
    assert "seconds; allowed: 1 to 120" in ingest_refusal(encode_clip(times=(0, 10**6)))


def test_attack_absurd_rate():
    assert "frames per second; allowed: 1 to 240" in ingest_refusal(encode_clip(unit=Fraction(1, 10_000)))


def test_attack_rate_that_fills_the_memory_with_repeats():
    text = ingest_refusal(encode_clip(times=(0, 1, 2, 3, 100_000_000), unit=Fraction(1, 1_000_000)))
    assert "frames; allowed: 1 to 2000" in text


def test_attack_mp4_decompression_bomb():
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8, options={"preset": "ultrafast"})
        stream.width, stream.height = 8192, 4096
        container.mux(stream.encode(av.VideoFrame(8192, 4096, "yuv420p")))
        container.mux(stream.encode())
    assert "has 33554432 pixels per frame; allowed: 1 to 9437184" in ingest_refusal(out.getvalue())


def test_attack_size_that_the_container_lies_about(noise_mp4):
    data, at = bytearray(noise_mp4), noise_mp4.index(b"avc1", noise_mp4.index(b"stsd")) + 28
    assert data[at : at + 4] == b"\x00\x30\x00\x40"
    data[at : at + 4] = b"\xff\xff\xff\xff"
    made = ingest_media(MemoryObjectStore(), bytes(data), "user")
    assert (made.width, made.height) == (48, 64)


def test_attack_many_streams():
    assert "streams; allowed: 1 to 4" in ingest_refusal(
        encode_clip("matroska", streams=5), limits=MediaLimits(max_streams=4)
    )
    ingest_refusal(encode_clip("matroska", streams=40))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_attack_truncated_mp4(noise_mp4, share):
    assert "cut short" in ingest_refusal(noise_mp4[: int(len(noise_mp4) * share)])
