"""The commands `omnivideo data pack` and `omnivideo data inspect`."""

import json

import pytest
from typer.testing import CliRunner

from omnivideo.cli.main import app
from omnivideo.errors import InvalidInput
from omnivideo.training.data.batch_sampler import MixConfig
from omnivideo.training.data.readers import read_samples
from omnivideo.training.data.sample import SkipReport
from tests.support.training_samples import make_mp4, write_files


def test_pack_reports_skipped_records_and_inspect_counts_the_others(tmp_path):
    whole = make_mp4(24)
    write_files(tmp_path, {"in/1.mp4": whole, "in/2.mp4": whole[: len(whole) // 2]})
    rows = [{"video_path": f"{at}.mp4", "captions": [{"idx": "-1", "content": "a ball"}]} for at in (1, 2)]
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report, to = tmp_path / "report.jsonl", str(tmp_path / "out")
    given = ["data", "pack", "sharegpt4video", str(tmp_path / "in" / "a.jsonl"), "-o", to, "--report", str(report)]
    ran = CliRunner().invoke(app, given, catch_exceptions=False)
    assert ran.exit_code == 0
    assert "1 samples written" in ran.output
    (line,) = [json.loads(line) for line in report.read_text().splitlines()]
    assert line["kind"] == "unreadable media" and line["where"] == "sharegpt4video a.jsonl:2"
    looked = CliRunner().invoke(app, ["data", "inspect", to, "--frames", "9"], catch_exceptions=False)
    assert "64x64x9" in looked.output
    looked = CliRunner().invoke(
        app, ["data", "inspect", to, "--frames", "9", "--world-size", "4"], catch_exceptions=False
    )
    assert "1 samples in 1 steps, 75.00% of the work of 4 ranks wasted" in looked.output
    with pytest.raises(InvalidInput, match="group-weight"):
        CliRunner().invoke(app, ["data", "inspect", to, "--group-weight", "image=1"], catch_exceptions=False)
    with pytest.raises(InvalidInput, match="already"):
        CliRunner().invoke(app, given, catch_exceptions=False)


def test_an_unknown_layout_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(InvalidInput, match="layout"):
        list(read_samples("coco", tmp_path / "a.json", tmp_path, SkipReport()))
    assert MixConfig().task_ratio is not None
