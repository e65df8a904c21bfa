"""The data of the tiny MLLM's recipe."""

from omnivideo.training.tiny import mllm


def test_batches_made_ahead_are_those_of_one_process(mllm_tokenizer):
    one, several = (
        mllm.build_mllm_recipe(mllm_tokenizer, steps=4, batch_size=2, workers=workers) for workers in (0, 2)
    )
    losses = [float(one.compute_losses(step)["loss"].detach()) for step in (1, 2, 5)]
    assert [float(several.compute_losses(step)["loss"].detach()) for step in (1, 2, 5)] == losses
