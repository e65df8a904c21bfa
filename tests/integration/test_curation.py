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


def test_a_second_run_changes_nothing_and_other_settings_are_refused(folder, out):
    from omnivideo.errors import InvalidInput

    before, journals = tree(out), {name: (out / name).read_bytes() for name in ("files.jsonl", "measured.jsonl")}
    curate(folder, out, Settings(bounds=BOUNDS, ocr=False))
    assert tree(out) == before and all((out / name).read_bytes() == held for name, held in journals.items())
    with pytest.raises(InvalidInput, match="output: it holds a run with other settings"):
        curate(folder, out, Settings(bounds=Bounds(min_pixels=100), ocr=False))
