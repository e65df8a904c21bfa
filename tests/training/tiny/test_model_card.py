"""The model card that is written after a training run."""

import json

import torch

from omnivideo.training.tiny.model_card import build_model_card


def test_the_card_lists_runs_and_scores(tmp_path):
    (tmp_path / "vae").mkdir()
    torch.save({"step": 1200, "seconds": 5400.0}, tmp_path / "vae" / "state.pt")
    lines = [{"step": step, "loss": 0.5, "kl": 2.0} for step in range(1, 201)]
    (tmp_path / "vae" / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    card = build_model_card(
        tmp_path, ("vae", "text"), "abc123", "x86_64", {"single": {"mean": 0.98, "count": 50}, "dB": 27.5}
    )
    assert "| `vae` | 1,200 | 1.5 | loss 0.5, kl 2 |" in card and "`text`" not in card
    updated = build_model_card(
        tmp_path, ("vae", "text"), "abc123", "x86_64", {}, "| `text` | 7 | 0.1 | loss 1 |\n| `vae` | 1 | 0 | |"
    )
    assert "| `vae` | 1,200 |" in updated and "| `text` | 7 | 0.1 | loss 1 |" in updated
    assert "| single | 0.980 | 50 |" in card and "| dB | 27.500 |  |" in card and "abc123" in card
