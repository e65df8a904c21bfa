"""`omnivideo doctor` reports settings that the service refuses, and still reports everything else."""

import sys

import pytest

from omnivideo.cli import doctor
from omnivideo.cli.main import main
from omnivideo.settings import RENAMED_SETTINGS


def run_doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command and return what it prints, in one line."""
    monkeypatch.setattr(sys, "argv", ["omnivideo", "doctor"])
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
