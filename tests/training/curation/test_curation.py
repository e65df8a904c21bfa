"""Curation of a folder of made footage keeps exactly the right scenes, survives kill -9, and names what is broken."""

import base64
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
from typer.testing import CliRunner

from omnivideo.training.curation.bounds import CurationBounds
from omnivideo.training.curation.pipeline import CurationConfig, curate
from omnivideo.training.curation.report import write_report
from tests.support import footage

BOUNDS = CurationBounds(
    min_short_side=200, min_aesthetic=5
)  # the footage is small, so that it is made and read quickly

# What each file is dropped by, scene by scene; None is kept.
EXPECTED = {
    "good/pan.mp4": [None],
    "good/subject.mp4": [None],
    "good/night.mp4": [None],
    "good/cuts.mp4": [None, None, "length", None],
    "bars/letterbox.mp4": ["bars"],
    "bars/pillar.mp4": ["bars"],
    "words/caption.mp4": ["overlay"],
    "words/mark.mkv": ["overlay"],
    "still/grain.mp4": ["motion"],
    "still/shaky.mp4": ["shake"],
    "twins/small-copy.mp4": ["duplicates"],
    "twins/coarse-copy.mkv": ["duplicates"],
    "size/small.mp4": "resolution",
    "size/wide.mp4": "aspect",
    "broken/cut.mp4": "unreadable",
    "broken/words.mp4": "unreadable",
}


def make(folder: Path) -> None:
    """The world of EXPECTED."""
    f, parts = footage, (footage.pan(5, 36), footage.subject(6, 36), footage.pan(7, 10), footage.pan(8, 36, speed=-1))
    reels = {
        "good/pan.mp4": f.pan(1),
        "good/subject.mp4": f.subject(3),
        "good/night.mp4": f.night(4),
        "good/cuts.mp4": itertools.chain(*parts),
        "bars/letterbox.mp4": f.barred(f.pan(9), rows=36),
        "bars/pillar.mp4": f.barred(f.pan(10), columns=30),
        "words/caption.mp4": f.written(f.pan(11), "and then she said", 26, (70, 240)),
        "words/mark.mkv": f.written(f.pan(12), "SampleTV", 20, (280, 12), alpha=150),
        "still/grain.mp4": f.still(13),
        "still/shaky.mp4": f.pan(14, jitter=3),
        "twins/small-copy.mp4": f.resized(f.pan(1), 288, 216),
        "size/small.mp4": f.resized(f.pan(15), 160, 120),
        "size/wide.mp4": f.resized(f.pan(16), 640, 208),
        "broken/cut.mp4": f.pan(17),
    }
    for name, frames in reels.items():
        f.film(folder / name, frames)
    f.film(folder / "twins/coarse-copy.mkv", f.pan(1), crf=36)
    cut = folder / "broken/cut.mp4"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 6 // 10])
    (folder / "broken/words.mp4").write_text("these are words")
    (folder / "notes.txt").write_text("no video")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    make(folder)
    return folder


@pytest.fixture(scope="module")
def out(folder, tmp_path_factory) -> Path:
    """The folder, curated in one go by the classical stages."""
    out = tmp_path_factory.mktemp("out")
    settings = CurationConfig(bounds=BOUNDS, ocr=False)
    told = []
    curated = curate(folder, out, settings, on_progress=lambda *step: told.append(step))
    write_report(curated, BOUNDS, out)
    phases = {phase: (done, of) for phase, done, of in told}
    assert list(phases) == ["files", "clips", "duplicates", "written"] and all(a == b for a, b in phases.values())
    return out


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def verdicts(out: Path) -> dict:
    """What became of each file, in the shape of EXPECTED; of duplicates the journal knows nothing: they are lines."""
    kept = {(line["source"], line["start"]) for line in lines(out / "clips.jsonl")}
    found: dict = {}
    for file in lines(out / "files.jsonl"):
        found[file["key"]] = file["dropped"]["stage"] if file["dropped"] else []
    for clip in sorted(lines(out / "measured.jsonl"), key=lambda clip: clip["span"]):
        dropped = clip["dropped"]["stage"] if clip["dropped"] else "duplicates"
        found[clip["source"]].append(None if (clip["source"], clip["span"][0]) in kept else dropped)
    return found


def test_exactly_the_right_scenes_are_kept(out):
    assert verdicts(out) == EXPECTED


def test_the_samples_are_what_their_lines_say(out):
    samples = lines(out / "clips.jsonl")
    assert {path.name for path in (out / "clips").iterdir()} == {Path(one["file"]).name for one in samples}
    for one in samples:
        assert set(one) == {
            "file", "caption", "width", "height", "fps", "frames", "source", "start", "stop", "scores"
        }  # fmt: skip
        with av.open(str(out / one["file"])) as container:
            stream = container.streams.video[0]
            assert (stream.width, stream.height, float(stream.average_rate)) == (
                one["width"],
                one["height"],
                one["fps"],
            )
            assert sum(1 for _ in container.decode(video=0)) == one["frames"]
    cuts = [one for one in samples if one["source"] == "good/cuts.mp4"]
    assert [(one["start"], one["frames"]) for one in cuts] == [(0.0, 36), (1.5, 36), (3.4167, 36)]


def test_the_report_says_what_was_dropped_and_why(out):
    page = (out / "report.html").read_text()
    assert re.search(r"6 clips kept of \d+ scenes in 16 files", page)
    assert "broken/cut.mp4" in page and "is cut short" in page and "broken/words.mp4" in page
    assert "0.25 of the frame; allowed: at most 0.01" in page
    assert "not asked: switched off" in page and "no model given" in page and "no language model given" in page
    assert page.count("data:image/jpeg;base64,") == len(lines(out / "measured.jsonl"))
    assert "http://" not in page and "https://" not in page and 'src="/' not in page


def tree(out: Path) -> dict[str, bytes]:
    names = ("clips.jsonl", "report.html")
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in [*(out / "clips").iterdir(), *map(out.joinpath, names)]
    }


def command(folder: Path, out: Path) -> list[str]:
    bounds = ["--bound", "min_short_side=200", "--bound", "min_aesthetic=5"]
    return [
        sys.executable,
        "-m",
        "omnivideo.cli",
        "data",
        "curate",
        str(folder),
        "-o",
        str(out),
        "--no-ocr",
        *bounds,
    ]


@pytest.mark.slow
def test_kill_and_go_on_gives_the_same(folder, out, tmp_path):
    """Killed while scenes are measured, and once more while clips are written."""
    again = tmp_path / "again"
    for journal, at in (("measured.jsonl", 3), ("written.jsonl", 2)):
        running = subprocess.Popen(
            [*command(folder, again), "--workers", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + 240
        while not ((again / journal).exists() and len((again / journal).read_bytes().splitlines()) >= at):
            assert time.monotonic() < until and running.poll() is None
            time.sleep(0.005)
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
        assert not (again / "clips.jsonl").exists()
    measured = (again / "measured.jsonl").read_bytes()
    with (again / "measured.jsonl").open("a") as file:
        file.write('{"key": "half a li')
    done = subprocess.run([*command(folder, again), "--workers", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "broken/cut.mp4 is cut short" in done.stderr and "not asked" not in done.stdout
    assert (again / "measured.jsonl").read_bytes() == measured  # nothing was measured twice
    assert tree(again) == tree(out)


def members(group: int) -> list[str]:
    """The command lines of a process group that still run."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = status.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(status.with_name("cmdline").read_text())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@pytest.mark.slow
def test_cancel_is_one_word_and_leaves_nobody_behind(folder, tmp_path):
    """Ctrl-C, sent to the whole group as a terminal does."""
    running = subprocess.Popen(
        [*command(folder, tmp_path), "--workers", "1"], stderr=subprocess.PIPE, text=True, start_new_session=True,
        # A run in a shell's background would not hear Ctrl-C, nor would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    until = time.monotonic() + 240
    while not ((tmp_path / "files.jsonl").exists() and (tmp_path / "files.jsonl").stat().st_size):
        assert time.monotonic() < until and running.poll() is None
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGINT)
    told, ended = running.communicate(timeout=60)[1], time.monotonic()
    assert running.returncode == 130 and "cancelled" in told and "Traceback" not in told
    while left := members(running.pid):
        assert time.monotonic() < ended + 10, left
        time.sleep(0.05)


def test_a_second_run_changes_nothing_and_other_settings_are_refused(folder, out):
    from omnivideo.errors import InvalidInput

    before, journals = tree(out), {name: (out / name).read_bytes() for name in ("files.jsonl", "measured.jsonl")}
    curate(folder, out, CurationConfig(bounds=BOUNDS, ocr=False))
    assert tree(out) == before and all((out / name).read_bytes() == held for name, held in journals.items())
    with pytest.raises(InvalidInput, match="output: it holds a run with other settings"):
        curate(folder, out, CurationConfig(bounds=CurationBounds(min_short_side=100), ocr=False))


def test_ocr_reads_what_a_locked_camera_hides(tmp_path):
    """Words before a wall that stands still, too: only reading can tell them."""
    pytest.importorskip("rapidocr_onnxruntime", reason="OCR is optional: pip install rapidocr-onnxruntime")
    raw = tmp_path / "raw"
    footage.film(raw / "news.mp4", footage.written(footage.subject(19), "BREAKING NEWS", 28, (60, 240)))
    footage.film(raw / "plain.mp4", footage.subject(21))
    curated = curate(raw, tmp_path / "out", CurationConfig(bounds=BOUNDS))
    assert [line["source"] for line in curated.kept_clips] == ["plain.mp4"]
    (dropped,) = [clip["dropped"] for clip in curated.clips.values() if clip["dropped"]]
    assert dropped["stage"] == "text" and "NEWS" in dropped["words"] and "text" not in curated.missing_stages


def test_the_aesthetic_predictor_is_the_published_arithmetic(tmp_path):
    """A tiny CLIP at random under a head of two layers; and a folder that holds none is said."""
    import numpy as np
    import torch
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    from omnivideo.errors import CheckpointError
    from omnivideo.training.curation.aesthetic import score_frames

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPVisionModelWithProjection(
        CLIPVisionConfig(image_size=32, patch_size=8, projection_dim=16, **shape)
    ).eval()
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    clip.save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    layers = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1)).eval()
    torch.save({f"layers.{name}": value for name, value in layers.state_dict().items()}, tmp_path / "head.pth")
    looks = list(footage.pan(1, 3))
    with torch.no_grad():
        embedded = clip(**processor(images=looks, return_tensors="pt")).image_embeds
        expected = float(layers(embedded / embedded.norm(dim=-1, keepdim=True)).mean())
    assert score_frames(str(tmp_path), looks) == pytest.approx(expected, abs=1e-6) and not np.isclose(
        expected, 0, atol=1e-4
    )
    with pytest.raises(CheckpointError, match="the aesthetic predictor needs clip/"):
        score_frames(str(tmp_path / "nowhere"), looks)


def test_captions_come_from_the_language_model_server(omni, tmp_path):
    """Ours over HTTP, at random weights: what it says is what it says in this process, and is asked for once."""
    from omnivideo.backends.mllm.local import LocalMLLM
    from omnivideo.storage.objects.memory import MemoryObjectStore
    from omnivideo.training.curation.captions import RemoteCaptioner
    from tests.backends.mllm.test_remote import serving
    from tests.support.servers import free_port

    footage.film(tmp_path / "raw/pan.mp4", footage.pan(1))
    port, settings = free_port(), CurationConfig(bounds=BOUNDS, ocr=False)
    with serving(LocalMLLM(omni, MemoryObjectStore()), port):
        caption = RemoteCaptioner(f"http://127.0.0.1:{port}", "what is this?")
        (line,) = curate(tmp_path / "raw", tmp_path / "out", settings, caption).kept_clips
        assert line["caption"] and line["caption"] == caption(four(tmp_path / "raw/pan.mp4"))
    caption.close()
    (again,) = curate(tmp_path / "raw", tmp_path / "out", settings, caption).kept_clips  # the server is gone by now
    assert again == line == lines(tmp_path / "out/clips.jsonl")[0]


@contextmanager
def captioning(answer: Callable[[bytes], tuple[int, str]]) -> Iterator[tuple[str, list[bytes]]]:
    """A server that gives every clip (an mp4) this status and body: its address, and the clips that it was shown."""
    shown: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            shown.append(base64.b64decode(body["payload"]["media"][0]["data"]))
            status, text = answer(shown[-1])
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        running = threading.Thread(target=server.serve_forever)
        running.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", shown
        finally:
            server.shutdown()
            running.join()


SAID = (200, '"A texture "\n"moves."\nnull\n')


def no_tall_ones(mp4: bytes) -> tuple[int, str]:
    with av.open(io.BytesIO(mp4)) as container:
        stream = container.streams.video[0]
        return (400, '{"field": "shown", "message": "too <tall>"}') if stream.height > stream.width else SAID


def make_rough(folder: Path) -> None:
    """Two clips for the shards, of which the server refuses one, and three that a task cannot be done with."""
    f, whole = footage, list(footage.pan(3))
    f.film(folder / "pan.mp4", f.pan(1))
    f.film(folder / "tall.mp4", f.resized(f.pan(2), 216, 288))
    f.film(folder / "gap.mp4", f.pan(5, 48), gap=(24, 60))  # cut evenly, the second and third quarter are empty
    f.film(folder / "gone.mp4", f.pan(8))  # is there no more when it is to be written
    halves = [f.film(folder / "half.h264", half).read_bytes() for half in (whole[:20], f.resized(whole[20:], 320, 240))]
    (folder / "sizes.mp4").write_bytes(b"".join(halves))  # its frames cannot be compared


EMPTY = ("15.81 to 31.62 s", "31.62 to 47.44 s")  # of gap.mp4


def test_one_clip_does_not_end_the_run(tmp_path):
    """What cannot be read, measured, captioned or written is named; all else is curated, and packs into shards."""
    from omnivideo.cli.main import app
    from omnivideo.training.curation.captions import RemoteCaptioner
    from omnivideo.training.data.file_store import open_file_store
    from omnivideo.training.data.sample import SkipReport
    from omnivideo.training.data.webdataset import ShardDataset

    raw, out, settings = tmp_path / "raw", tmp_path / "out", CurationConfig(bounds=BOUNDS, ocr=False)
    make_rough(raw)

    def tell(phase: str, done: int, of: int) -> None:
        if phase == "duplicates" and done == of:
            (raw / "gone.mp4").unlink()

    with captioning(no_tall_ones) as (address, _), closing(RemoteCaptioner(address)) as caption:
        curated = curate(raw, out, settings, caption, on_progress=tell)
    why = {}
    for clip in curated.clips.values():
        if clip["dropped"] and clip["dropped"]["stage"] == "unreadable":
            why.setdefault(clip["source"], []).append(clip["dropped"]["why"])
    assert why.pop("gap.mp4") == [f"has no frame from {at}; allowed: one or more" for at in EMPTY]
    assert why.pop("gone.mp4") == ["is damaged or cut short (No such file or directory); allowed: a whole file"]
    assert "ValueError" in why["sizes.mp4"][0] and "/" not in why.pop("sizes.mp4")[0]
    assert not why
    captions = {line["source"]: line["caption"] for line in lines(out / "clips.jsonl")}
    assert captions["pan.mp4"] == "A texture moves." and captions["tall.mp4"] is None and "gone.mp4" not in captions
    assert len(list((out / "clips").iterdir())) == len(curated.kept_clips)
    page = write_report(curated, BOUNDS, out).read_text()
    assert "1 clip without one" in page and "no caption: the server refuses the clip" in page
    assert "too &lt;tall&gt;" in page and "has no frame from 15.81 to 31.62 s" in page

    given = ["data", "pack", "curated", str(out), "-o", str(tmp_path / "set")]
    packed = CliRunner().invoke(app, given, catch_exceptions=False)
    assert packed.exit_code == 0 and f"{len(captions) - 1} samples written" in packed.output
    assert "skipped, wrong record: 1" in packed.output and "caption: there is none" in packed.output
    entries = ShardDataset(open_file_store(str(tmp_path / "set")), SkipReport()).entries
    assert {entry.task for entry in entries} == {"text-to-video"} and len(entries) == len(captions) - 1

    measured = (out / "measured.jsonl").read_bytes()
    with captioning(lambda mp4: SAID) as (address, shown):
        again = CliRunner().invoke(app, [*command(raw, out)[3:], "--captions", address], catch_exceptions=False)
    told = " ".join(again.output.split())
    assert again.exit_code == 0 and re.search(r"gap-\w+-0001 has no frame from 15.81 to 31.62 s", told), told
    assert len(shown) == 1 and {line["caption"] for line in lines(out / "clips.jsonl")} == {"A texture moves."}
    assert (out / "measured.jsonl").read_bytes() == measured  # what failed is not tried again


def test_a_clip_of_uneven_times_keeps_them_and_is_seen_by_them(tmp_path):
    """A second of a pan at 24 frames a second, a pause of two, and another second: 12 a second on average."""
    from omnivideo.training.curation.reading import write_clip
    from omnivideo.training.data.sample import decode_media, resample_media

    path, kept = footage.film(tmp_path / "pause.mp4", footage.pan(5, 48), gap=(24, 2)), tmp_path / "kept.mp4"
    assert write_clip(path, (0.0, 4.0), kept)["frames"] == 48
    for one in (path, kept):
        frames, _, times = zip(*decode_media(one.read_bytes()), strict=True)
        assert times == pytest.approx([at / 24 + 2 * (at >= 24) for at in range(48)], abs=1e-3)
        seen = resample_media(one.read_bytes(), footage.WIDTH, footage.HEIGHT, 9, 2)
        shown = [next(at for at, frame in enumerate(frames) if np.array_equal(frame, one)) for one in seen]
        assert shown == [0, 12, 23, 23, 23, 23, 24, 36, 47]


def test_a_frame_just_before_an_empty_span_stands_for_it(tmp_path):
    from omnivideo.training.curation.reading import sample_clip

    path = footage.film(tmp_path / "gap.mp4", footage.pan(5, 48), gap=(24, 60))
    shown = sample_clip(
        path, (1.2, 20.0)
    )  # the last frame before the gap is at 0.96 s, nearer than a quarter of 1 / 0.77
    assert len(shown.small_frames) == len(shown.full_frames) == 1


def test_what_concerns_all_clips_ends_the_run():
    """And what concerns one says so without a path."""
    from omnivideo.errors import CheckpointError, StoreError
    from omnivideo.training.curation.pipeline import run_safely

    def failing(error: Exception) -> Callable[[dict], dict]:
        def task(item: dict) -> dict:
            raise error

        return task

    why = run_safely(failing(RuntimeError("(-215) /io/opencv/a.cpp C:\\clips\\b.mp4 is odd")), {})["dropped"]["why"]
    assert why == "cannot be used (RuntimeError: (-215) is odd); allowed: a whole file"
    with pytest.raises(CheckpointError):
        run_safely(failing(CheckpointError("no predictor")), {})
    with pytest.raises(ImportError):
        run_safely(failing(ImportError("libGL")), {})
    with pytest.raises(StoreError, match="cannot be written: No space left"):
        run_safely(failing(OSError(28, "No space left on device", "/data/out/clips/a.part")), {})


@pytest.mark.parametrize(
    ("status", "error", "said", "asked"),
    [
        (400, "UnreadableMedia", "captions: the server refuses the clip: what it says", 1),
        (413, "UnreadableMedia", "captions: the server refuses the clip: what it says", 1),
        (401, "InvalidInput", "captions: the server answers 401 Unauthorized", 1),
        (403, "InvalidInput", "captions: the server answers 403 Forbidden", 1),
        (404, "InvalidInput", "captions: the server answers 404 Not Found", 1),
        (429, "ModelUnavailable", "does not answer", 4),
        (503, "ModelUnavailable", "does not answer", 4),
    ],
)
def test_what_the_captioning_server_refuses(monkeypatch, status, error, said, asked):
    """UnreadableMedia is one clip's; the others end the run."""
    from omnivideo.errors import OmniVideoError
    from omnivideo.training.curation import captions

    monkeypatch.setattr(captions.time, "sleep", lambda seconds: None)
    with (
        captioning(lambda mp4: (status, "what\nit says")) as (address, shown),
        closing(captions.RemoteCaptioner(address)) as caption,
        pytest.raises(OmniVideoError, match=said) as raised,
    ):
        caption(np.stack(list(footage.pan(1, 4))))
    assert type(raised.value).__name__ == error and len(shown) == asked


def four(path: Path):
    """The frames that a caption is asked for: two a second."""
    from omnivideo.training.curation.reading import sample_clip

    return sample_clip(path, (0.0, footage.FRAMES / footage.FPS)).small_frames[::4]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("nowhere", "-o", "out"), "folder: there is no such folder"),
        ((".", "-o", "out"), "folder: no video is in it"),
        ((".", "-o", "out", "--bound", "max_bars=2"), "max_bars: input should be less than or equal to 1"),
        ((".", "-o", "out", "--bound", "colour=2"), "bound: 'colour=2' is not NAME=VALUE"),
    ],
)
def test_bad_input_is_one_line_and_code_2(tmp_path, monkeypatch, capsys, args, said):
    from omnivideo.cli.main import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["omnivideo", "data", "curate", *args])
    with pytest.raises(SystemExit) as caught:
        main()
    told = capsys.readouterr().err
    assert caught.value.code == 2 and said in told and "Traceback" not in told
    assert list(tmp_path.iterdir()) == []
