"""Fixtures of the media tests."""

import subprocess

import pytest

from omnivideo.media.write import write_media
from tests.support.foreign_media import NOISE


@pytest.fixture(scope="module")
def noise_mp4(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_media(path, NOISE, 8)
    return path.read_bytes()


@pytest.fixture
def no_child_process(monkeypatch):
    """Fail the test if a process is started, because the refusal must come before."""
    monkeypatch.setattr(subprocess, "Popen", None)
