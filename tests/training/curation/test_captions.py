"""Captions come from the MLLM server over HTTP."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from omnivideo.training.curation.pipeline import CurationConfig, curate
from tests.support import footage
from tests.support.caption_server import serve_captions
from tests.support.curation_runs import BOUNDS, read_jsonl


def test_captions_are_requested_from_the_mllm_server(omni, tmp_path):
    """Our server with random weights gives the same captions as the model in this process; each is requested once."""
    from omnivideo.backends.mllm.local import LocalMLLM
    from omnivideo.storage.objects.memory import MemoryObjectStore
    from omnivideo.training.curation.captions import RemoteCaptioner
    from tests.support.api_server import run_mllm_server
    from tests.support.servers import free_port

    footage.write_film(tmp_path / "raw/pan.mp4", footage.pan_camera(1))
    port, settings = free_port(), CurationConfig(bounds=BOUNDS, ocr=False)
    with run_mllm_server(LocalMLLM(omni, MemoryObjectStore()), port):
        caption = RemoteCaptioner(f"http://127.0.0.1:{port}", "what is this?")
        (line,) = curate(tmp_path / "raw", tmp_path / "out", settings, caption).kept_clips
        assert line["caption"] and line["caption"] == caption(read_caption_frames(tmp_path / "raw/pan.mp4"))
    caption.close()
    (again,) = curate(tmp_path / "raw", tmp_path / "out", settings, caption).kept_clips  # the server has stopped by now
    assert again == line == read_jsonl(tmp_path / "out/clips.jsonl")[0]


def read_caption_frames(path: Path):
    """Return the frames that the captioning server receives: two per second."""
    from omnivideo.training.curation.reading import sample_clip

    return sample_clip(path, (0.0, footage.FRAMES / footage.FPS)).small_frames[::4]


@pytest.mark.parametrize(
    ("status", "error", "said", "asked"),
    [
        (400, "UnreadableMedia", "captions: the server refuses the clip: what it says", 1),
        (413, "UnreadableMedia", "captions: the server refuses the clip: what it says", 1),
        (401, "InvalidInput", "captions: the server responds with 401 Unauthorized", 1),
        (403, "InvalidInput", "captions: the server responds with 403 Forbidden", 1),
        (404, "InvalidInput", "captions: the server responds with 404 Not Found", 1),
        (429, "ModelUnavailable", "does not respond", 4),
        (503, "ModelUnavailable", "does not respond", 4),
    ],
)
def test_errors_of_the_captioning_server(monkeypatch, status, error, said, asked):
    """Raise UnreadableMedia for a fault of one clip, and other errors, which end the run."""
    from omnivideo.errors import OmniVideoError
    from omnivideo.training.curation import captions

    monkeypatch.setattr(captions.time, "sleep", lambda seconds: None)
    with (
        serve_captions(lambda mp4: (status, "what\nit says")) as (address, shown),
        closing(captions.RemoteCaptioner(address)) as caption,
        pytest.raises(OmniVideoError, match=said) as raised,
    ):
        caption(np.stack(list(footage.pan_camera(1, 4))))
    assert type(raised.value).__name__ == error and len(shown) == asked
