"""`omnivideo doctor` reports settings that the service refuses, and still reports everything else."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from omnivideo.cli import doctor, expectations
from omnivideo.cli.app import open_studio
from omnivideo.cli.main import main
from omnivideo.errors import CheckpointError, InvalidInput
from omnivideo.models.device import pick_device
from omnivideo.models.placement import Machine
from omnivideo.models.weights import checkpoint
from omnivideo.presets import TINY
from omnivideo.settings import RENAMED_SETTINGS


def run_doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Run the command and return what it prints, in one line."""
    monkeypatch.setattr(sys, "argv", ["omnivideo", "doctor", *options])
    monkeypatch.setattr(doctor, "describe_weights", lambda preset_name: "shipped, intact")
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    return " ".join(capsys.readouterr().out.split())


def test_renamed_settings_are_reported_with_their_new_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for old_name in RENAMED_SETTINGS:
        monkeypatch.setenv(old_name, "1")
    text = run_doctor(monkeypatch, capsys)
    for old_name, new_name in RENAMED_SETTINGS.items():
        assert f"settings {old_name}: it has been called {new_name} since version 0.2; rename it" in text
    assert "weights of tiny shipped, intact" in text


def test_a_malformed_setting_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OMNIVIDEO_S3_BUCKET", "No Bucket")
    text = run_doctor(monkeypatch, capsys)
    allowed = "give the name of a bucket: 3 to 63 lower-case letters, digits, dots or dashes"
    assert f"settings OMNIVIDEO_S3_BUCKET: {allowed}" in text


def test_valid_settings_are_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "settings valid" in run_doctor(monkeypatch, capsys)


# ---------------------------------------------------------------- a folder of weights


def test_what_a_machine_can_do_with_weights(weights, monkeypatch, capsys):
    text = run_doctor(monkeypatch, capsys, "--weights", str(weights), "--device", "cpu")
    assert re.search(r"placement CPU \([\d.]+ [MG]B of memory free, no GPU\)", text)
    for part in ("mllm", "decoder", "vision_head", "adapter", "text_encoder", "vae"):
        assert re.search(rf"{part} CPU \([\d.]+ [MG]B float32\), up to [\d.]+ [MG]B more while it computes", text)
    for task, size in TINY.sampling.items():
        assert re.search(rf"{task} at least [\d.,]+ s for {size.width}x{size.height}x{size.frames}", text)
    assert re.search(r"matrix products measured now \([\d,]+ GFLOP/s on CPU float32\); no run", text)


def read_seconds(rows: dict[str, str]) -> dict[str, float]:
    return {task: float(rows[task].split()[2].replace(",", "")) for task in TINY.sampling}


def test_the_expected_seconds_follow_from_the_measured_rates(weights, monkeypatch):
    """At a tenth of the rate everything takes ten times as long."""
    seconds = []
    for rate in (1e9, 1e8):
        monkeypatch.setattr(expectations, "measure_matmul_rate", lambda device, dtype, rate=rate: rate)
        rows = dict(expectations.describe_folder(Path(weights), torch.device("cpu")))
        seconds.append(read_seconds(rows))
    assert all(abs(slow / seconds[0][task] - 10) < 0.1 for task, slow in seconds[1].items())
    assert seconds[0]["text-to-video"] > seconds[0]["text-to-image"]


def test_parts_that_are_copied_to_a_gpu_take_at_least_that_long(weights, monkeypatch):
    """The decoder of the tiny preset comes in blocks, twice for each of its steps, at a very slow rate."""
    monkeypatch.setattr("omnivideo.models.placement.RESERVED_BYTES", 0)
    monkeypatch.setattr("omnivideo.models.weights.part_sizes.estimate_working_bytes", lambda preset, name: 0)
    monkeypatch.setattr(expectations, "measure_machine", lambda device: Machine(10**9, 9_000_000))
    monkeypatch.setattr(expectations, "measure_copy_rate", lambda device: 1e6)
    rows = dict(expectations.describe_folder(Path(weights), torch.device("cpu")))
    assert rows["placement"].startswith("decoder in blocks on the GPU")
    megabytes = float(re.search(r"GPU in blocks \(([\d.]+) MB", rows["decoder"])[1])
    expected = 2 * TINY.sampling["text-to-video"].steps * megabytes
    assert read_seconds(rows)["text-to-video"] > 0.9 * expected
    assert "GB/s of copies to the GPU" in rows["model of the times"]


@pytest.mark.parametrize("gpu_bytes", [None, 0])
def test_commands_say_when_not_all_fits_on_the_gpu(gpu_bytes, weights, tmp_path, monkeypatch, capsys):
    """A machine without a GPU has nothing to say: everybody who uses it knows."""
    monkeypatch.setattr(checkpoint, "measure_machine", lambda device: Machine(10**10, gpu_bytes))
    open_studio("tiny", weights, "cpu", tmp_path)
    text = capsys.readouterr().err
    expected = "not all fits on the GPU: CPU (10.0 GB of memory and 0 MB of the GPU's free): "
    assert (expected in text and "decoder CPU (" in text) if gpu_bytes is not None else not text


def test_a_folder_that_is_not_ours_is_refused_in_one_line(tmp_path):
    with pytest.raises(CheckpointError, match=r"no model_index\.json"):
        list(expectations.describe_folder(tmp_path, torch.device("cpu")))


def test_a_folder_without_a_part_is_described_without_it(weights, monkeypatch, capsys, tmp_path):
    """As after `weights import --allow-missing`, for a worker beside a server of the MLLM."""
    folder = shutil.copytree(weights, tmp_path / "weights", ignore=shutil.ignore_patterns("mllm", "vae"))
    text = run_doctor(monkeypatch, capsys, "--weights", str(folder), "--device", "cpu")
    assert "missing mllm, vae; what follows is without them" in text and "video-editing at least" in text


@pytest.mark.parametrize("name", ["meta", "hpu"])
def test_a_device_that_placements_do_not_know_is_refused(name):
    text = f"device: '{name}' is not available on this machine; use auto, cpu or cuda:N"
    with pytest.raises(InvalidInput, match=text):
        pick_device(name)
