"""The weights that the tiny pipeline starts from, and those that it exports."""

import pytest
import torch

from omnivideo.errors import CheckpointError
from omnivideo.models.weights import checkpoint
from omnivideo.training.config import TrainingConfig
from omnivideo.training.engine.checkpoint import STATE_FILE_NAME
from omnivideo.training.engine.run import RunContext
from omnivideo.training.engine.trainer import Trainer
from omnivideo.training.recipes.parts import TrainableParts
from omnivideo.training.tiny import text_encoder
from omnivideo.training.tiny.pipeline import TinyPipeline


def make_run_context(folder, **options) -> RunContext:
    return RunContext(TrainingConfig(recipe="tiny", runs=folder, **options))


def test_shipped_weights_replace_missing_runs(omni, weights, tmp_path):
    tiny = TinyPipeline(make_run_context(tmp_path / "runs"), shipped_weights=weights)
    shipped = tiny.load_vae().state_dict()
    assert all(torch.allclose(value.half().float(), shipped[key]) for key, value in omni.vae.state_dict().items())
    foundation = tiny.load_foundation()
    x = torch.zeros(1, 16, 1, 8, 8)
    with torch.no_grad():
        outputs = [model(x, torch.tensor([500.0]), torch.zeros(1, 8, 192), return_dict=False)[0]
               for model in (foundation.decoder, omni.decoder)]  # fmt: skip
    assert torch.allclose(*outputs, atol=1e-2)
    with pytest.raises(CheckpointError, match="omnivideo train mllm"):
        tiny.load_omni("mllm")


def test_foundations_are_exported_in_the_shipped_layout(weights, tmp_path):
    original = TinyPipeline(make_run_context(tmp_path / "runs"), shipped_weights=weights)
    original.export_foundations(tmp_path / "out")
    exported = TinyPipeline(make_run_context(tmp_path / "runs"), shipped_weights=tmp_path / "out")
    for one, two in (
        (original.load_vae(), exported.load_vae()),
        (original.load_text_encoder(), exported.load_text_encoder()),
    ):
        assert all(torch.equal(value, two.state_dict()[key]) for key, value in one.state_dict().items())


def test_a_stage_without_a_run_leaves_its_parts_as_the_stage_before(weights, tmp_path):
    run = make_run_context(tmp_path, weights=weights)
    parts = TrainableParts(TinyPipeline(run).load_omni("mllm"))
    head = {name: value + 1 for name, value in parts.state_dict().items() if name.startswith("bridge.vision_head")}
    run.get_folder("stage1").mkdir()
    torch.save({"model": parts.state_dict(), "average": head}, run.get_folder("stage1") / STATE_FILE_NAME)
    loaded, stored = TrainableParts(TinyPipeline(run).load_omni("stage3")).state_dict(), parts.state_dict()
    assert all(torch.equal(value, head.get(name, stored[name])) for name, value in loaded.items())


def test_the_decoder_continues_with_a_newly_trained_text_encoder(weights, tmp_path):
    run = make_run_context(tmp_path, weights=weights)
    recipe = TinyPipeline(run).build_text_recipe()
    trained = recipe.model.get_submodule("encoder")
    with torch.no_grad():
        trained.get_submodule("encoder.final_layer_norm").weight.add_(1)
    Trainer(recipe, run.get_folder("text")).run(stop_at_step=0)
    loaded = TinyPipeline(run).load_omni("stage3").text_encoder.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in trained.state_dict().items())


def test_the_text_encoder_keeps_the_embeddings_that_a_decoder_has_learned(weights, tmp_path):
    stored = checkpoint.load(weights)
    tokens = stored.tokenizer(["a large red circle left of a blue star", "two squares move up"], padding=True)
    ids, mask = torch.tensor(tokens.input_ids), torch.tensor(tokens.attention_mask)

    def measure_drift_after_training(known_encoder):
        recipe = text_encoder.build_text_recipe(stored.tokenizer, 40, 8, 4, known_encoder)
        trained = recipe.model.get_submodule("encoder")
        trained.load_state_dict(stored.text_encoder.state_dict())
        Trainer(recipe, tmp_path / str(known_encoder is None)).run()
        with torch.no_grad():
            new, known = (model(ids, attention_mask=mask)[0] for model in (trained, stored.text_encoder))
            return text_encoder.measure_drift(new, known, mask).item()

    assert measure_drift_after_training(stored.text_encoder) < 0.5 * measure_drift_after_training(None)


def test_training_starts_from_a_folder_of_weights(weights, tmp_path):
    stored, tiny = checkpoint.load(weights), TinyPipeline(make_run_context(tmp_path, weights=weights))
    loaded = tiny.load_omni("stage2b")
    for name in ("mllm", "bridge", "decoder", "text_encoder", "vae"):
        expected = getattr(stored, name).state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in getattr(loaded, name).state_dict().items()), name
    assert torch.equal(tiny.build_mllm_recipe().model.lm_head.weight, stored.mllm.lm_head.weight)
    head = tiny.load_omni("mllm").bridge.vision_head.state_dict()  # with which stage 1 starts
    assert all(torch.equal(value, head[key]) for key, value in stored.bridge.vision_head.state_dict().items())
    text = tiny.build_text_recipe().model.get_submodule("encoder").state_dict()
    assert all(torch.equal(value, text[key]) for key, value in stored.text_encoder.state_dict().items())
    with pytest.raises(CheckpointError, match="mllm has not been trained"):
        TinyPipeline(make_run_context(tmp_path), shipped_weights=weights).load_omni("stage2b")
