"""The data of the tiny MLLM's recipe."""

from omnivideo.training.tiny import mllm


def test_worker_processes_give_the_same_batches(mllm_tokenizer):
    in_process, in_workers = (
        mllm.build_mllm_recipe(mllm_tokenizer, steps=4, batch_size=2, workers=workers) for workers in (0, 2)
    )
    expected = [float(in_process.compute_losses(step)["loss"].detach()) for step in (1, 2, 5)]
    assert [float(in_workers.compute_losses(step)["loss"].detach()) for step in (1, 2, 5)] == expected
