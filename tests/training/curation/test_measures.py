"""The optional stages: OCR and the aesthetic predictor."""

import numpy as np
import pytest

from omnivideo.training.curation.pipeline import CurationConfig, curate
from tests.support import footage
from tests.support.curation_runs import BOUNDS


def test_ocr_finds_text_in_front_of_a_fixed_camera(tmp_path):
    """Text in front of a static background cannot be found without OCR."""
    pytest.importorskip("rapidocr_onnxruntime", reason="OCR is optional: pip install rapidocr-onnxruntime")
    raw = tmp_path / "raw"
    footage.write_film(raw / "news.mp4", footage.add_text(footage.move_ball(19), "BREAKING NEWS", 28, (60, 240)))
    footage.write_film(raw / "plain.mp4", footage.move_ball(21))
    curated = curate(raw, tmp_path / "out", CurationConfig(bounds=BOUNDS))
    assert [line["source"] for line in curated.kept_clips] == ["plain.mp4"]
    (dropped,) = [clip["dropped"] for clip in curated.clips.values() if clip["dropped"]]
    assert dropped["stage"] == "text" and "NEWS" in dropped["words"] and "text" not in curated.missing_stages


def test_the_aesthetic_predictor_computes_the_published_formula(tmp_path):
    """Use a tiny CLIP with random weights and a head of two layers; a folder without one is reported."""
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
    looks = list(footage.pan_camera(1, 3))
    with torch.no_grad():
        embedded = clip(**processor(images=looks, return_tensors="pt")).image_embeds
        expected = float(layers(embedded / embedded.norm(dim=-1, keepdim=True)).mean())
    assert score_frames(str(tmp_path), looks) == pytest.approx(expected, abs=1e-6) and not np.isclose(
        expected, 0, atol=1e-4
    )
    with pytest.raises(CheckpointError, match="the aesthetic predictor needs clip/"):
        score_frames(str(tmp_path / "nowhere"), looks)
