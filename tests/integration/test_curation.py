"""Curation of a folder of made footage keeps exactly the right scenes, survives kill -9, and names what is broken."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import pytest

from omnivideo.training.curation.bounds import Bounds
from omnivideo.training.curation.pipeline import Settings, curate
from omnivideo.training.curation.report import write_report
from tests import footage

BOUNDS = Bounds(min_pixels=200, min_aesthetic=5)  # the footage is small, so that it is made and read quickly

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
    settings = Settings(bounds=BOUNDS, ocr=False)
    told = []
    curated = curate(folder, out, settings, tell=lambda *step: told.append(step))
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
    bounds = ["--bound", "min_pixels=200", "--bound", "min_aesthetic=5"]
    return [sys.executable, "-m", "omnivideo.cli", "data", "curate", str(folder), "-o", str(out), "--no-ocr", *bounds]


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
    curate(folder, out, Settings(bounds=BOUNDS, ocr=False))
    assert tree(out) == before and all((out / name).read_bytes() == held for name, held in journals.items())
    with pytest.raises(InvalidInput, match="output: it holds a run with other settings"):
        curate(folder, out, Settings(bounds=Bounds(min_pixels=100), ocr=False))


def test_ocr_reads_what_a_locked_camera_hides(tmp_path):
    """Words before a wall that stands still, too: only reading can tell them."""
    pytest.importorskip("rapidocr_onnxruntime", reason="OCR is optional: pip install rapidocr-onnxruntime")
    raw = tmp_path / "raw"
    footage.film(raw / "news.mp4", footage.written(footage.subject(19), "BREAKING NEWS", 28, (60, 240)))
    footage.film(raw / "plain.mp4", footage.subject(21))
    curated = curate(raw, tmp_path / "out", Settings(bounds=BOUNDS))
    assert [line["source"] for line in curated.kept] == ["plain.mp4"]
    (dropped,) = [clip["dropped"] for clip in curated.clips.values() if clip["dropped"]]
    assert dropped["stage"] == "text" and "NEWS" in dropped["words"] and "text" not in curated.absent


def test_the_aesthetic_predictor_is_the_published_arithmetic(tmp_path):
    """A tiny CLIP at random under a head of two layers; and a folder that holds none is said."""
    import numpy as np
    import torch
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    from omnivideo.errors import CheckpointError
    from omnivideo.training.curation.aesthetic import score

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
    assert score(str(tmp_path), looks) == pytest.approx(expected, abs=1e-6) and not np.isclose(expected, 0, atol=1e-4)
    with pytest.raises(CheckpointError, match="the aesthetic predictor needs clip/"):
        score(str(tmp_path / "nowhere"), looks)


def test_captions_come_from_the_language_model_server(omni, tmp_path):
    """Ours over HTTP, at random weights: what it says is what it says in this process, and is asked for once."""
    from omnivideo.backends.mllm.local import LocalMLLM
    from omnivideo.storage.memory import MemoryStore
    from omnivideo.training.curation.captions import ServedCaption
    from tests.integration.servers import free_port
    from tests.integration.test_remote_mllm import serving

    footage.film(tmp_path / "raw/pan.mp4", footage.pan(1))
    port, settings = free_port(), Settings(bounds=BOUNDS, ocr=False)
    with serving(LocalMLLM(omni, MemoryStore()), port):
        caption = ServedCaption(f"http://127.0.0.1:{port}", "what is this?")
        (line,) = curate(tmp_path / "raw", tmp_path / "out", settings, caption).kept
        assert line["caption"] and line["caption"] == caption(four(tmp_path / "raw/pan.mp4"))
    caption.close()
    (again,) = curate(tmp_path / "raw", tmp_path / "out", settings, caption).kept  # the server is gone by now
    assert again == line == lines(tmp_path / "out/clips.jsonl")[0]


def four(path: Path):
    """The frames that a caption is asked for: two a second."""
    from omnivideo.training.curation.reading import sample

    return sample(path, (0.0, footage.FRAMES / footage.FPS)).small[::4]


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
    from omnivideo.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["omnivideo", "data", "curate", *args])
    with pytest.raises(SystemExit) as caught:
        main()
    told = capsys.readouterr().err
    assert caught.value.code == 2 and said in told and "Traceback" not in told
    assert list(tmp_path.iterdir()) == []
