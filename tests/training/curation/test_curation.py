"""Curating a folder keeps exactly the expected scenes, and resumes after SIGKILL."""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import pytest

from omnivideo.training.curation.bounds import CurationBounds
from omnivideo.training.curation.pipeline import CurationConfig, curate
from omnivideo.training.curation.report import write_report
from tests.support import footage
from tests.support.curation_runs import BOUNDS, build_command, read_jsonl

# The stage that drops each scene of each file; None is a scene that is kept.
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


def make_footage(folder: Path) -> None:
    """Write the files of EXPECTED."""
    f, parts = (
        footage,
        (
            footage.pan_camera(5, 36),
            footage.move_ball(6, 36),
            footage.pan_camera(7, 10),
            footage.pan_camera(8, 36, speed=-1),
        ),
    )
    reels = {
        "good/pan.mp4": f.pan_camera(1),
        "good/subject.mp4": f.move_ball(3),
        "good/night.mp4": f.make_night(4),
        "good/cuts.mp4": itertools.chain(*parts),
        "bars/letterbox.mp4": f.add_bars(f.pan_camera(9), rows=36),
        "bars/pillar.mp4": f.add_bars(f.pan_camera(10), columns=30),
        "words/caption.mp4": f.add_text(f.pan_camera(11), "and then she said", 26, (70, 240)),
        "words/mark.mkv": f.add_text(f.pan_camera(12), "SampleTV", 20, (280, 12), alpha=150),
        "still/grain.mp4": f.make_still(13),
        "still/shaky.mp4": f.pan_camera(14, jitter=3),
        "twins/small-copy.mp4": f.resize(f.pan_camera(1), 288, 216),
        "size/small.mp4": f.resize(f.pan_camera(15), 160, 120),
        "size/wide.mp4": f.resize(f.pan_camera(16), 640, 208),
        "broken/cut.mp4": f.pan_camera(17),
    }
    for name, frames in reels.items():
        f.write_film(folder / name, frames)
    f.write_film(folder / "twins/coarse-copy.mkv", f.pan_camera(1), crf=36)
    cut = folder / "broken/cut.mp4"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 6 // 10])
    (folder / "broken/words.mp4").write_text("these are words")
    (folder / "notes.txt").write_text("no video")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    make_footage(folder)
    return folder


@pytest.fixture(scope="module")
def out(folder, tmp_path_factory) -> Path:
    """Return the output of an uninterrupted curation with the classical stages."""
    out = tmp_path_factory.mktemp("out")
    settings = CurationConfig(bounds=BOUNDS, ocr=False)
    told = []
    curated = curate(folder, out, settings, on_progress=lambda *step: told.append(step))
    write_report(curated, BOUNDS, out)
    phases = {phase: (done, of) for phase, done, of in told}
    assert list(phases) == ["files", "clips", "duplicates", "written"] and all(a == b for a, b in phases.values())
    return out


def list_verdicts(out: Path) -> dict:
    """Return the result of each file in the form of EXPECTED; the journal does not list duplicates."""
    kept = {(line["source"], line["start"]) for line in read_jsonl(out / "clips.jsonl")}
    found: dict = {}
    for file in read_jsonl(out / "files.jsonl"):
        found[file["key"]] = file["dropped"]["stage"] if file["dropped"] else []
    for clip in sorted(read_jsonl(out / "measured.jsonl"), key=lambda clip: clip["span"]):
        dropped = clip["dropped"]["stage"] if clip["dropped"] else "duplicates"
        found[clip["source"]].append(None if (clip["source"], clip["span"][0]) in kept else dropped)
    return found


def test_exactly_the_expected_scenes_are_kept(out):
    assert list_verdicts(out) == EXPECTED


def test_the_clips_agree_with_their_records(out):
    samples = read_jsonl(out / "clips.jsonl")
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


def test_the_report_lists_dropped_scenes_with_their_reasons(out):
    page = (out / "report.html").read_text()
    assert re.search(r"6 clips kept of \d+ scenes in 16 files", page)
    assert "broken/cut.mp4" in page and "is cut short" in page and "broken/words.mp4" in page
    assert "0.25 of the frame; allowed: at most 0.01" in page
    assert "not checked: switched off" in page and "no model given" in page and "no MLLM server given" in page
    assert page.count("data:image/jpeg;base64,") == len(read_jsonl(out / "measured.jsonl"))
    assert "http://" not in page and "https://" not in page and 'src="/' not in page


def read_outputs(out: Path) -> dict[str, bytes]:
    names = ("clips.jsonl", "report.html")
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in [*(out / "clips").iterdir(), *map(out.joinpath, names)]
    }


@pytest.mark.slow
def test_a_killed_run_resumes_with_the_same_results(folder, out, tmp_path):
    """Kill the run while scenes are measured, and again while clips are written."""
    again = tmp_path / "again"
    for journal, at in (("measured.jsonl", 3), ("written.jsonl", 2)):
        running = subprocess.Popen(
            [*build_command(folder, again), "--workers", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
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
    done = subprocess.run([*build_command(folder, again), "--workers", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "broken/cut.mp4 is cut short" in done.stderr and "not checked" not in done.stdout
    assert (again / "measured.jsonl").read_bytes() == measured  # no scene was measured twice
    assert read_outputs(again) == read_outputs(out)


def list_group_members(group: int) -> list[str]:
    """Return the command lines of the processes of a group that still run."""
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
def test_ctrl_c_prints_one_line_and_leaves_no_process(folder, tmp_path):
    """Send SIGINT to the whole process group, as a terminal does for Ctrl-C."""
    running = subprocess.Popen(
        [*build_command(folder, tmp_path), "--workers", "1"], stderr=subprocess.PIPE, text=True, start_new_session=True,
        # A shell's background job ignores SIGINT, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    until = time.monotonic() + 240
    while not ((tmp_path / "files.jsonl").exists() and (tmp_path / "files.jsonl").stat().st_size):
        assert time.monotonic() < until and running.poll() is None
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGINT)
    told, ended = running.communicate(timeout=60)[1], time.monotonic()
    assert running.returncode == 130 and "cancelled" in told and "Traceback" not in told
    while left := list_group_members(running.pid):
        assert time.monotonic() < ended + 10, left
        time.sleep(0.05)


def test_a_second_run_changes_nothing_and_other_settings_are_refused(folder, out):
    from omnivideo.errors import InvalidInput

    before, journals = (
        read_outputs(out),
        {name: (out / name).read_bytes() for name in ("files.jsonl", "measured.jsonl")},
    )
    curate(folder, out, CurationConfig(bounds=BOUNDS, ocr=False))
    assert read_outputs(out) == before and all((out / name).read_bytes() == held for name, held in journals.items())
    with pytest.raises(InvalidInput, match="output: it contains a run with other settings"):
        curate(folder, out, CurationConfig(bounds=CurationBounds(min_short_side=100), ocr=False))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("nowhere", "-o", "out"), "folder: it does not exist"),
        ((".", "-o", "out"), "folder: it contains no video"),
        ((".", "-o", "out", "--bound", "max_bars=2"), "max_bars: allowed: 0 to 1"),
        ((".", "-o", "out", "--bound", "colour=2"), "bound: 'colour=2' is not NAME=VALUE"),
    ],
)
def test_invalid_input_is_refused_in_one_line_with_exit_code_2(tmp_path, monkeypatch, capsys, args, said):
    from omnivideo.cli.main import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["omnivideo", "data", "curate", *args])
    with pytest.raises(SystemExit) as caught:
        main()
    told = capsys.readouterr().err
    assert caught.value.code == 2 and said in told and "Traceback" not in told
    assert list(tmp_path.iterdir()) == []
