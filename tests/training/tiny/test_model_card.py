"""The model card that is written after a training run."""

import json

import torch

from omnivideo.training.tiny.model_card import build_model_card


def test_the_card_says_what_ran_and_what_came_of_it(tmp_path):
    (tmp_path / "vae").mkdir()
    torch.save({"step": 1200, "seconds": 5400.0}, tmp_path / "vae" / "state.pt")
    lines = [{"step": at, "loss": 0.5, "kl": 2.0} for at in range(1, 201)]
    (tmp_path / "vae" / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    made = build_model_card(
        tmp_path, ("vae", "text"), "abc123", "x86_64", {"single": {"mean": 0.98, "count": 50}, "dB": 27.5}
    )
    assert "| `vae` | 1,200 | 1.5 | loss 0.5, kl 2 |" in made and "`text`" not in made
    later = build_model_card(
        tmp_path, ("vae", "text"), "abc123", "x86_64", {}, "| `text` | 7 | 0.1 | loss 1 |\n| `vae` | 1 | 0 | |"
    )
    assert "| `vae` | 1,200 |" in later and "| `text` | 7 | 0.1 | loss 1 |" in later
    assert "| single | 0.980 | 50 |" in made and "| dB | 27.500 |  |" in made and "abc123" in made
