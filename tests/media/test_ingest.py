"""A stranger's media on their way in: each attack by its name, and what is let in comes out as it is read later."""

import base64
import io
import json
import os
import pickle
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from omnivideo.errors import InvalidInput, ServiceBusy, UnreadableMedia
from omnivideo.media import fetch, ingest, sandbox
from omnivideo.media.artifacts import load_frames
from omnivideo.media.ingest import decode_data_url, fetch_media, ingest_media
from omnivideo.media.limits import MediaLimits
from omnivideo.media.read import MediaInfo
from omnivideo.media.sandbox import ProcessLimits
from omnivideo.media.write import write_media
from omnivideo.storage.objects.memory import MemoryObjectStore

NOISE = np.random.default_rng(0).integers(0, 256, (9, 64, 48, 3), np.uint8)


def still(kind: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(NOISE[0]).save(out, kind)
    return out.getvalue()


def animation(kind: str) -> bytes:
    out = io.BytesIO()
    images = [Image.fromarray(pixels) for pixels in NOISE]
    images[0].save(out, kind, save_all=True, append_images=images[1:], duration=100)
    return out.getvalue()


def clip(kind: str = "mp4", codec: str = "libx264", *, times=range(9), unit=Fraction(1, 8), streams: int = 1) -> bytes:
    """Frames at `times`, in `unit` seconds."""
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        made = []
        for _ in range(streams):
            stream = container.add_stream(codec, rate=8)
            stream.height, stream.width, stream.pix_fmt = *NOISE.shape[1:3], "yuv420p"
            stream.codec_context.time_base, stream.codec_context.max_b_frames = unit, 0
            made.append(stream)
        for index, time in enumerate(times):
            for stream in made:
                frame = av.VideoFrame.from_ndarray(NOISE[index % 9], format="rgb24")
                frame.pts, frame.time_base = time, unit
                container.mux(stream.encode(frame))
        for stream in made:
            container.mux(stream.encode())
    return out.getvalue()


@pytest.fixture(scope="module")
def mp4(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_media(path, NOISE, 8)
    return path.read_bytes()


def refusal(data: bytes, name: str = "clip.mp4", **options: object) -> str:
    """The refusal's text: one line, with the field and the name, and nothing is stored."""
    store = MemoryObjectStore()
    with pytest.raises(UnreadableMedia) as caught:
        ingest_media(store, data, "user", name, **options)
    text = str(caught.value)
    assert not store.objects and caught.value.field == "source"
    assert text.startswith("source: ") and "\n" not in text and "0x" not in text and "/proc" not in text
    return text


@pytest.fixture
def unread(monkeypatch):
    """No process may be started: the refusal comes before."""
    monkeypatch.setattr(subprocess, "Popen", None)


@pytest.fixture
def child_that(monkeypatch):
    """The child's own program with another reader in it, given as an expression."""

    def replaced(reader: str) -> None:
        program = sandbox.CHILD_PROGRAM.replace(
            "sandbox.run_in_child()", f"sandbox.build_report = lambda limits: {reader}; "
        )
        monkeypatch.setattr(sandbox, "CHILD_PROGRAM", program + "sandbox.run_in_child()")

    return replaced


# ---------------------------------------------------------------- what is let in


@pytest.mark.parametrize(
    ("data", "suffix", "medium", "frames"),
    [
        (still("PNG"), "png", "image", 1),
        (still("JPEG"), "jpg", "image", 1),
        (still("WEBP"), "webp", "image", 1),
        (animation("GIF"), "gif", "video", 9),
        (clip(), "mp4", "video", 9),
        (clip("mov", "mpeg4"), "mov", "video", 9),
        (clip("webm", "libvpx"), "webm", "video", 9),
        (clip("matroska"), "mkv", "video", 9),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_media_are_stored_as_what_they_are_and_read_back(data, suffix, medium, frames):
    store = MemoryObjectStore()
    made = ingest_media(store, data, "turn 3", "My_holiday-film.exe")
    assert made.key.endswith(f".{suffix}") and store.get(made.key) == data
    assert (made.medium, made.width, made.height, made.frames) == (medium, 48, 64, frames)
    assert (made.caption, made.created_by) == ("My holiday film", "turn 3")
    assert load_frames(store, made).shape == (frames, 64, 48, 3)
    assert made.fps == pytest.approx(1 if medium == "image" else 10 if suffix == "gif" else 8)


def test_several_at_once(mp4):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: ingest_media(MemoryObjectStore(), mp4, "user").key, range(4)))
    assert len(set(found)) == 1


def test_importing_loads_no_model_library():
    code = "import sys, omnivideo.media.ingest; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert not {"torch", "transformers", "diffusers"} & set(done.stdout.split()) and done.returncode == 0


def test_lower_limits_are_the_services_to_choose(mp4):
    assert "has 9 frames; allowed: 1 to 8" in refusal(mp4, limits=MediaLimits(max_frames=8))
    with pytest.raises(AssertionError):
        ingest_media(MemoryObjectStore(), mp4, "user", limits=MediaLimits(max_frames=10**6))


def test_a_field_of_the_callers(mp4):
    with pytest.raises(UnreadableMedia, match=r"^input_reference: the file is empty; allowed: 1 to") as caught:
        ingest_media(MemoryObjectStore(), b"", "user", field="input_reference")
    assert caught.value.field == "input_reference"


# ---------------------------------------------------------------- names and types


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
    text = refusal(b"no media", name)
    assert "/" not in text and "\\" not in text and text.isprintable() and len(text) < 300
    monkeypatch.setattr(ingest, "measure_in_sandbox", lambda *_: MediaInfo(48, 64, 1, None, "image"))
    made = ingest_media(MemoryObjectStore(), still("PNG"), "user", name)
    assert made.caption == about and made.key[64:] == ".png" and len(made.key) == 68


def test_attack_playlist_named_mp4(unread):
    script = b"#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
    assert "is no image or video; allowed: mp4" in refusal(script)


def test_attack_concat_script_named_mp4(unread):
    assert "is no image or video" in refusal(b"ffconcat version 1.0\nfile /etc/passwd\n")


@pytest.mark.parametrize("script", [b"#EXTM3U\n#EXTINF:1,\nFILE\n", b"ffconcat version 1.0\nfile FILE\n"])
def test_attack_script_behind_the_head_of_an_mp4(script, tmp_path, mp4):
    (tmp_path / "secret.mp4").write_bytes(mp4)
    script = script.replace(b"FILE", bytes(tmp_path / "secret.mp4"))
    for head in (b"\0\0\0\x18ftypisom\0\0\0\0isommp41", b"\x1a\x45\xdf\xa3"):
        text = refusal(head + script)
        assert "damaged" in text or "cut short" in text


def test_attack_svg_with_an_external_entity(unread):
    svg = b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg><text>&x;</text></svg>'
    assert "is no image or video" in refusal(svg, "a.png")


def test_attack_pickle(tmp_path, unread):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    assert "is no image or video" in refusal(pickle.dumps(Bomb()), "a.mp4")
    assert not list(tmp_path.iterdir())


def test_attack_empty_file(unread):
    assert "is empty; allowed: 1 to" in refusal(b"")


def test_attack_old_container(unread):
    assert "is no image or video" in refusal(b"RIFF\x10\0\0\0AVI " + bytes(64), "a.avi")


def test_attack_rare_codec():
    assert "is coded as ffv1; allowed: h264" in refusal(clip("matroska", "ffv1"))


# ---------------------------------------------------------------- sizes


def test_attack_bytes_above_the_cap(mp4, unread):
    assert f"has {len(mp4)} bytes; allowed: 1 to 100" in refusal(mp4, limits=MediaLimits(max_bytes=100))


@pytest.mark.parametrize("side", [4_000, 50_000])
def test_attack_png_decompression_bomb(side):
    def chunk(name: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")

    rows = zlib.compress(bytes(side * 3 * 100), 9)
    header = chunk(b"IHDR", side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0]))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    assert "pixels a frame; allowed: 1 to 9437184" in refusal(data)


def test_attack_webp_canvas_of_a_gigabyte():
    data = bytearray(animation("WEBP"))
    at = data.index(b"VP8X") + 12  # 24 bits each of width - 1 and height - 1
    data[at : at + 6] = (16_382).to_bytes(3, "little") * 2
    refusal(bytes(data), process_limits=ProcessLimits(max_memory_bytes=2**28))


def test_attack_gif_of_many_frames():
    head = b"GIF89a\x01\0\x01\0\x80\0\0" + bytes(6)
    frame = b"\x21\xf9\x04\0\x02\0\0\0" + b"\x2c\0\0\0\0\x01\0\x01\0\0" + b"\x02\x02\x44\x01\0"
    assert "has 2001 frames; allowed: 1 to 2000" in refusal(head + frame * 50_000 + b";")


def test_attack_mp4_of_many_frames():
    assert "has 300 frames; allowed: 1 to 200" in refusal(clip(times=range(300)), limits=MediaLimits(max_frames=200))


def test_attack_absurd_duration():
    assert "seconds; allowed: 1 to 120" in refusal(clip(times=(0, 10**6)))


def test_attack_absurd_rate():
    assert "frames a second; allowed: 1 to 240" in refusal(clip(unit=Fraction(1, 10_000)))


def test_attack_rate_that_fills_the_memory_with_repeats():
    text = refusal(clip(times=(0, 1, 2, 3, 100_000_000), unit=Fraction(1, 1_000_000)))
    assert "frames; allowed: 1 to 2000" in text


def test_attack_mp4_decompression_bomb():
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8, options={"preset": "ultrafast"})
        stream.width, stream.height = 8192, 4096
        container.mux(stream.encode(av.VideoFrame(8192, 4096, "yuv420p")))
        container.mux(stream.encode())
    assert "has 33554432 pixels a frame; allowed: 1 to 9437184" in refusal(out.getvalue())


def test_attack_size_that_the_container_lies_about(mp4):
    data, at = bytearray(mp4), mp4.index(b"avc1", mp4.index(b"stsd")) + 28
    assert data[at : at + 4] == b"\x00\x30\x00\x40"
    data[at : at + 4] = b"\xff\xff\xff\xff"
    made = ingest_media(MemoryObjectStore(), bytes(data), "user")
    assert (made.width, made.height) == (48, 64)


def test_attack_many_streams():
    assert "streams; allowed: 1 to 4" in refusal(clip("matroska", streams=5), limits=MediaLimits(max_streams=4))
    refusal(clip("matroska", streams=40))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_attack_truncated_mp4(mp4, share):
    assert "cut short" in refusal(mp4[: int(len(mp4) * share)])


# ---------------------------------------------------------------- the process

TRUE = {"width": 48, "height": 64, "frames": 9, "fps": 8.0, "kind": "video"}


def test_attack_child_that_eats_memory(child_that, mp4):
    child_that(f"(bytearray(2**30), {TRUE})[1]")
    assert (
        ingest_media(MemoryObjectStore(), mp4, "user", process_limits=ProcessLimits(max_memory_bytes=2**31)).frames == 9
    )
    assert "needs more memory than there is" in refusal(mp4, process_limits=ProcessLimits(max_memory_bytes=2**26))


@pytest.mark.parametrize("reader", ["__import__('time').sleep(60)", "[None for _ in iter(int, 1)]"])
def test_attack_child_that_hangs(child_that, mp4, reader):
    child_that(reader)
    assert "takes more than 0.6 seconds to read" in refusal(mp4, process_limits=ProcessLimits(timeout_seconds=0.6))


def test_attack_child_that_ends_by_itself_when_its_parent_is_gone(mp4, monkeypatch, child_that):
    child_that("__import__('time').sleep(60)")
    monkeypatch.setattr(sandbox, "read_report", lambda process, deadline: process.stdout.read())
    assert "takes more than 0.3 seconds" in refusal(mp4, process_limits=ProcessLimits(timeout_seconds=0.3))


@pytest.mark.parametrize("signal", [6, 9, 11])
def test_attack_child_that_crashes(child_that, mp4, signal):
    child_that(f"sandbox.os.kill(sandbox.os.getpid(), {signal})")
    assert "is damaged" in refusal(mp4)


def test_attack_child_that_floods(child_that, mp4):
    child_that("[sandbox.os.write(1, bytes(65536)) for _ in iter(int, 1)]")
    assert "is damaged" in refusal(mp4)


def test_attack_child_that_lies(child_that, mp4):
    child_that(repr(TRUE))
    assert ingest_media(MemoryObjectStore(), mp4, "user").frames == 9
    for lie in (
        {"width": -1}, {"height": "64"}, {"frames": True}, {"fps": float("nan")}, {"fps": float("inf")}, {"fps": None},
        {"kind": "../x"}, {"kind": "image"}, {"frames": 10**9}, {"width": 10**9}, {"more": 1},
    ):  # fmt: skip
        said = json.dumps(TRUE | lie).encode()
        with pytest.raises(UnreadableMedia):
            sandbox.parse_report(said, 0, MediaLimits(), ProcessLimits())


@pytest.mark.parametrize(
    "said", [b"", b"[]", b"[" * 4000, b"null", b"\xff", pickle.dumps({"width": 1}), b'{"refused": 1}']
)
def test_attack_report_that_is_none(said):
    with pytest.raises(UnreadableMedia, match="is damaged"):
        sandbox.parse_report(said, 0, MediaLimits(), ProcessLimits())


def test_a_refusal_cannot_break_the_line():
    with pytest.raises(UnreadableMedia) as caught:
        sandbox.parse_report(json.dumps({"refused": "a\nb" + "c" * 9000}).encode(), 0, MediaLimits(), ProcessLimits())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_attack_child_that_looks_for_secrets_files_and_descriptors(child_that, mp4, monkeypatch, tmp_path):
    monkeypatch.setenv("OMNIVIDEO_DATABASE", "postgresql://secret")
    with (tmp_path / "secret").open("wb") as held:
        os.set_inheritable(held.fileno(), True)
        child_that(
            "{'refused': ' '.join([*sorted(sandbox.os.environ), *sandbox.os.listdir('/proc/self/fd'), "
            "*(str(sandbox.resource.getrlimit(what)[1]) for what in (1, 4, 7))])}"
        )
        told = refusal(mp4).removeprefix("source: 'clip.mp4' ").split()
    assert set(told) <= {"LC_CTYPE", "LD_LIBRARY_PATH", *sandbox.build_child_environment(), *"01236", "16"}
    assert told[-3:] == ["0", "0", "16"]  # bytes of a file, of a core dump; open files


def test_attack_child_that_writes_a_file(child_that, mp4, tmp_path):
    child_that(f"sandbox.Path({str(tmp_path / 'a')!r}).write_bytes(b'owned')")
    refusal(mp4)
    assert (tmp_path / "a").read_bytes() == b""


def test_no_process_to_be_had(mp4, monkeypatch):
    monkeypatch.setattr(sandbox.sys, "executable", "/none/python")
    with pytest.raises(ServiceBusy, match="no process can be started"):
        sandbox.measure_in_sandbox(mp4)


def test_too_many_at_once(mp4, monkeypatch):
    monkeypatch.setattr(sandbox, "PROCESS_SLOTS", threading.BoundedSemaphore(1))
    with sandbox.acquire_process_slot(1), pytest.raises(ServiceBusy, match="too many are being read at once"):
        sandbox.measure_in_sandbox(mp4, process_limits=ProcessLimits(timeout_seconds=0.05))
    assert sandbox.measure_in_sandbox(mp4).frames == 9


# ---------------------------------------------------------------- data URLs


@pytest.mark.parametrize("head", ["data:image/png;base64,", "data:video/mp4;base64,", "DATA:image/svg+xml;BASE64,"])
def test_a_data_url(head):
    for data in (b"a", b"ab", b"abc", bytes(range(256))):
        assert decode_data_url(head + base64.b64encode(data).decode(), max_bytes=len(data)) == data


@pytest.mark.parametrize(
    "text",
    [
        "", "data:", "data:,abcd", "data:image/png,abcd", "data:text/html;base64,YWJj", "data:image;base64,YWJj",
        "data:image/png;charset=utf-8;base64,YWJj", " data:image/png;base64,YWJj", "data:image/png;base64,",
        "data:image/png;base64,YWJ", "data:image/png;base64,YW Jj", "data:image/png;base64,YWJj\n",
        "data:image/png;base64,YWJj====", "data:image/png;base64,YQ==YQ==", "data:image/png;base64,YW%4aj",
        "data:image/png;base64,YWJ\u0130", "data:image/../../etc;base64,YWJj", "file:///etc/passwd",
        "data:image/png;base64;base64,YWJj", f"data:image/{'a' * 300};base64,YWJj",
    ],
)  # fmt: skip
def test_attack_data_url_that_is_none(text):
    with pytest.raises(InvalidInput, match=r"^image_url: [^\n]*allowed: ") as caught:
        decode_data_url(text, field="image_url")
    assert caught.value.field == "image_url" and "passwd" not in str(caught.value)


def test_attack_data_url_above_the_cap_is_not_decoded(monkeypatch):
    text = "data:image/png;base64," + base64.b64encode(bytes(1000)).decode()
    with pytest.raises(InvalidInput, match="holds 1000 bytes; allowed: 1 to 999"):
        decode_data_url(text, 999)
    monkeypatch.setattr("omnivideo.media.ingest.binascii", None)
    with pytest.raises(InvalidInput, match="holds 1000 bytes; allowed: 1 to 900"):
        decode_data_url(text, 900)


# ---------------------------------------------------------------- URLs, without a network

HOSTS = ("media.test", ".cdn.test")
UNREACHED = "url: the host cannot be reached; allowed: a public address that answers"


def told(url: str, allowed=HOSTS, **options: object) -> str:
    with pytest.raises(InvalidInput) as caught:
        fetch_media(url, allowed, 1000, 2, **options)
    assert caught.value.field == "url" and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def offline(monkeypatch):
    """No connection may be tried."""

    def tried(*_: object) -> None:
        pytest.fail("a connection was tried")

    monkeypatch.setattr(fetch.httpcore2.SyncBackend, "connect_tcp", tried)


INNER = """127.0.0.1 127.8.8.8 0.0.0.0 10.0.0.1 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 100.100.100.200
    192.0.0.192 192.0.2.1 198.18.0.1 192.88.99.1 224.0.0.1 240.0.0.1 255.255.255.255 168.63.129.16
    :: ::1 ::ffff:10.0.0.1 ::ffff:8.8.8.8 ::10.0.0.1 64:ff9b::a00:1 64:ff9b::808:808 64:ff9b:1::1 2002:a00:1::1
    2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:db8::1 fc00::1 fd00:ec2::254 fe80::1 fe80::1%eth0 fec0::1 ff02::1
    3fff::1 100::1"""


@pytest.mark.parametrize("address", INNER.split())
def test_attack_ssrf_by_name(address, offline):
    assert told("https://media.test/a.png", resolve=lambda host: [address]) == UNREACHED


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "2a00:1450:4001:80b::200e"])
def test_public_addresses_pass(address):
    assert fetch.is_public_address(fetch.ipaddress.ip_address(address))


def test_attack_ssrf_by_one_address_among_public_ones(offline):
    assert told("http://media.test/", resolve=lambda host: ["8.8.8.8", "10.0.0.1", "1.1.1.1"]) == UNREACHED


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001", "0", "[::1]",
     "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:ffff:a00:1]", "169.254.169.254", "localhost"],
)  # fmt: skip
def test_attack_ssrf_by_a_number_even_where_it_is_listed(host, offline):
    assert "host that media may not be fetched from" in told(f"http://{host}/a.png")
    assert told(f"http://{host}/a.png", allowed=[host.strip("[]")]) == UNREACHED


@pytest.mark.parametrize("failure", [OSError("no such name: 10.1.2.3"), UnicodeError("label too long")])
def test_attack_port_scan_a_refused_address_reads_as_a_missing_host(failure):
    def resolve(host: str) -> list[str]:
        raise failure

    assert told("http://media.test/", resolve=resolve) == UNREACHED
    assert told("http://media.test/", resolve=lambda host: []) == UNREACHED


@pytest.mark.parametrize(
    "url",
    ["http://evil.test/", "http://media.test.evil.test/", "http://xmedia.test/", "http://xcdn.test/", "http:///a.png",
     "http://media.test./", "http://evil.test#media.test", "http://evil.test?media.test", "http://[::1%25media.test]/",
     "http://evil.test/media.test", "http://media%2etest/", "http://a..cdn.test/", "http://.cdn.test/"],
)  # fmt: skip
def test_attack_host_that_only_looks_allowed(url, offline):
    assert "host that media may not be fetched from" in told(url)


@pytest.mark.parametrize(
    "url", ["http://user:password@media.test/", "http://media.test@evil.test/", "http://@media.test/"]
)
def test_attack_userinfo(url, offline):
    text = told(url)
    assert "user name or a password; allowed: none" in text and "password@" not in text


@pytest.mark.parametrize(
    "url",
    ["http://media.test\\@evil.test/", "http://media.test/ HTTP/1.1\r\nX: y", "http://media.test/\tx", " http://media.test",
     "http://media.test/\0", "http://m\u00e9dia.test/", "http://media\u3002test/", "http://[media.test/",
     "http://media.test:99999/", "http://media.test:x/", "", "http://media.test/" + "a" * 5000],
)  # fmt: skip
def test_attack_url_that_parsers_read_differently(url, offline):
    assert "is no URL; allowed: " in told(url)


@pytest.mark.parametrize("scheme", ["file", "ftp", "gopher", "javascript", "data", "unix", "httpx", ""])
def test_attack_scheme(scheme, offline):
    assert "has another scheme; allowed: http, https" in told(f"{scheme}://media.test/etc/passwd")


@pytest.mark.parametrize("url", ["http://media.test:22/", "https://media.test:80/", "http://media.test:0/"])
def test_attack_port(url, offline):
    assert "names another port; allowed: " in told(url)


def test_fetching_is_off_where_no_host_is_listed(offline):
    assert told("http://media.test/", allowed=()) == (
        "url: fetching by URL is off here; allowed: an upload, or a data: URL"
    )


@pytest.mark.parametrize("host", ["MEDIA.test", "cdn.test", "a.cdn.test", "a.b.cdn.test"])
def test_a_host_that_is_listed(host):
    asked: list[str] = []
    assert told(f"https://{host}/", resolve=lambda name: asked.append(name) or []) == UNREACHED
    assert asked == [host.lower()]
