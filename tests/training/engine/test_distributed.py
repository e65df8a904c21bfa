"""Two processes over gloo: the losses of one, checkpoints for any number of them, and sequences in parts.

OMNIVIDEO_TEST_STEPS=50 runs the comparison of losses over 50 steps instead of 4.  Two orders of summation are 1e-7
apart in single precision, and at the tiny recipes' rates training makes that a hundred times larger within some ten
steps, as it does for one process with one thread against two.  So the comparison is made in double precision, or, as
DeepSpeed has none, over many steps at a rate at which the losses fall by a tenth or so but that does not happen.
"""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from omnivideo.errors import CheckpointError
from omnivideo.training.data.latent_cache import FrozenEncoders, encode_shards
from omnivideo.training.engine.checkpoint import list_complete_shard_folders
from omnivideo.training.engine.distributed.launcher import launch_processes
from omnivideo.training.engine.distributed.processes import ProcessContext
from omnivideo.training.engine.trainer import Trainer
from tests.support.shards import ASSIGNER as FIT
from tests.support.shards import SAMPLES
from tests.support.shards import damage_target as damage
from tests.support.shards import write_dataset as library
from tests.support.training_worker import FOUNDATIONS, STAGES, Recipes, train

deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: pip install omnivideo[train]",
)
LOOKS = [pytest.param("adamw", sequence, marks=deepspeed) for sequence in (1, 2)]
STEPS = int(os.environ.get("OMNIVIDEO_TEST_STEPS", 4))
CALM = {"adam_lr": 1e-5, "warmup": 5} if STEPS > 4 else {}  # over few steps the recipes' own rates


@pytest.fixture
def together(tmp_path, weights):
    """Runs jobs on two processes (or on one of their own); returns the exit code and what the first process found."""

    def run(*jobs, sequence=1, double=False, processes=2, launcher=()):
        results = tmp_path / "results.json"
        results.unlink(missing_ok=True)
        given = {
            "jobs": [filled(job, tmp_path, weights) for job in jobs],
            "sequence": sequence,
            "double": double,
            "results": str(results),
        }
        (tmp_path / "jobs.json").write_text(json.dumps(given))
        command = ["-m", "tests.support.training_worker", str(tmp_path / "jobs.json")]
        command = [*(launcher or [sys.executable]), *command]
        if processes > 1 and not launcher:
            code = launch_processes(processes, command)
        else:
            code = subprocess.run(command, check=False).returncode
        return code, json.loads(results.read_text()) if results.exists() else None

    return run


def filled(job, tmp_path, weights):
    return job if "task" in job else {"weights": str(weights), "scratch": str(tmp_path / "cache"), "steps": STEPS} | job


@pytest.fixture
def alone(tmp_path, weights):
    """Runs jobs on this process."""

    def run(*jobs):
        for job in jobs:
            train(ProcessContext(), filled(job, tmp_path, weights))

    return run


def logged(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def moments(run: Path) -> list[torch.Tensor]:
    """AdamW's first moments: of what the gradients were."""
    states = torch.load(run / "state.pt", weights_only=True)["optimizers"][0]["state"]
    return [states[at]["exp_avg"] for at in sorted(states)]


def pairs(tmp_path, recipes, **changes):
    """The same jobs for one process and for two."""
    label = "-".join(map(str, changes.values()))
    jobs = [{"recipe": name} | changes for name in recipes]
    return [
        [job | {"run": str(tmp_path / side / f"{job['recipe']}-{label}")} for job in jobs] for side in ("one", "two")
    ]


def assert_same_losses(one, two, far=1e-5):
    for first, second in zip(one, two, strict=True):
        expected = logged(Path(first["run"]))
        assert logged(Path(second["run"])) == pytest.approx(expected, abs=far), first["recipe"]
        assert len(expected) == first.get("steps", STEPS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("recipes", "double", "changes"),
    [
        (FOUNDATIONS + STAGES, True, {"optimizer": "muon"}),
        pytest.param(STAGES, False, {"optimizer": "adamw"} | CALM, marks=deepspeed),
    ],
    ids=["muon", "zero"],
)
def test_two_processes_have_the_losses_of_one(recipes, double, changes, together, tmp_path):
    one, two = pairs(tmp_path, recipes, **changes)
    assert together(*one, double=double, processes=1)[0] == 0  # first: it fills the cache
    assert together(*two, double=double)[0] == 0
    assert_same_losses(one, two)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("optimizer", ["muon", pytest.param("adamw", marks=deepspeed)])
def test_a_run_goes_on_with_two_processes_one_and_two_again(optimizer, together, alone, tmp_path):
    """stage2b has averages, and parameters that some batches do not touch."""
    [whole], [job] = pairs(tmp_path, ["stage2b"], optimizer=optimizer, steps=9)
    alone(whole)
    assert together(job | {"until": 3})[0] == 0
    (Path(job["run"]) / "state.pt").unlink()  # the shards alone are enough
    alone(job | {"until": 6})
    assert together(job)[0] == 0
    assert_same_losses([whole], [job])
    one, two = (torch.load(Path(run["run"]) / "state.pt", weights_only=True) for run in (whole, job))
    assert one.keys() == two.keys() and one["names"] == two["names"] and two["step"] == 9
    for part in ("model", "average"):
        assert one[part].keys() == two[part].keys()
        assert all(torch.allclose(value, two[part][key], atol=1e-4) for key, value in one[part].items())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("optimizer", ["muon", pytest.param("adamw", marks=deepspeed)])
def test_a_killed_process_ends_the_run_which_goes_on_to_the_same_losses(optimizer, together, alone, tmp_path):
    [whole], [job] = pairs(tmp_path, ["stage2a"], optimizer=optimizer, steps=12)
    alone(whole)
    codes = []
    running = threading.Thread(target=lambda: codes.append(together(job | {"every": 0.0})[0]))
    running.start()
    step, rank = random.randint(1, 9), random.randrange(2)
    print(f"kill rank {rank} after step {step}")
    while not any(int(path.name) >= step for path in list_complete_shard_folders(Path(job["run"]))):
        assert running.is_alive()
        time.sleep(0.005)
    os.kill(int((tmp_path / f"results.json.pid{rank}").read_text()), signal.SIGKILL)
    running.join(60)
    assert codes == [128 + signal.SIGKILL]
    kept = int(list_complete_shard_folders(Path(job["run"]))[-1].name)
    assert step <= kept < 12
    assert together(job)[0] == 0
    assert_same_losses([whole], [job])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon", pytest.param("adamw", marks=deepspeed)])
def test_a_gradient_that_is_not_finite_leaves_the_checkpoint(optimizer, together, tmp_path):
    job = {"recipe": "stage2a", "optimizer": optimizer, "run": str(tmp_path / "run")}
    code, _ = together(job | {"until": 2}, job | {"spoiled": True, "every": 0.0})
    assert code == 1
    assert [path.name for path in list_complete_shard_folders(tmp_path / "run")] == ["00000002"]


@deepspeed
@pytest.mark.slow
def test_bf16_keeps_fp32_weights(together, tmp_path, weights):
    job = {"recipe": "stage2a", "optimizer": "adamw", "precision": "bf16", "run": str(tmp_path / "run")}
    assert together(job)[0] == 0
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    trained = [state["model"][name] for name in state["names"]]
    assert all(value.dtype == torch.float32 for value in trained)
    assert any(not torch.equal(value, value.bfloat16().float()) for value in trained)


@deepspeed
@pytest.mark.slow
def test_gradients_of_many_passes_in_bf16_add_up_in_fp32(together, tmp_path):
    """A sixteenth of the gradient is exact in bf16, the sums of some of them are not."""
    about = {"recipe": "stage2a", "optimizer": "adamw", "precision": "bf16", "until": 1}
    jobs = [about | {"run": str(tmp_path / str(passes)), "passes": passes} for passes in (1, 16)]
    assert together(*jobs)[0] == 0
    one, many = (moments(Path(job["run"])) for job in jobs)
    assert all(torch.equal(moment, other) for moment, other in zip(one, many, strict=True))
    assert any(moment.any() for moment in one)


@deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_sequence_in_two_parts_has_the_loss_and_gradients_of_one(checkpointing, together):
    jobs = [{"task": task, "checkpointing": checkpointing} for task in ("generation", "editing")]
    code, found = together(*jobs, sequence=2)
    assert code == 0
    for job, one in zip(jobs, found, strict=True):
        print(job, one)
        assert one["loss"] < 1e-5 and one["gradients"] < 1e-5 * max(1.0, one["of"])
        assert 0 < one["peak"] < 0.65 * one["alone"]


@deepspeed
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_stages_have_the_same_losses_over_sequences_in_parts(together, alone, tmp_path):
    """Generation and editing, with Eq. 1, which does not pass through the decoder; checkpointing on."""
    one, two = pairs(tmp_path, ["stage2b", "stage3"], checkpointing=True, steps=4)
    alone(*one)
    assert together(*two, sequence=2)[0] == 0
    assert_same_losses(one, two)


@deepspeed
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_groups_of_two_have_the_losses_of_one_process(together, alone, tmp_path):
    """Data and sequence parallel at once, started by torchrun."""
    [one], [four] = pairs(tmp_path, ["stage2b"], checkpointing=True, steps=4)
    alone(one)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4"]
    assert together(four, sequence=2, processes=4, launcher=torchrun)[0] == 0
    assert_same_losses([one], [four])


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "sequence"), [("muon", 1), *LOOKS])
def test_samples_of_two_processes_are_drawn_with_the_average(optimizer, sequence, together, alone, tmp_path):
    """Of which each holds a part; and training goes on as without."""
    [plain], [job] = pairs(tmp_path, ["stage2b"], optimizer=optimizer, steps=4)
    alone(plain)
    assert together(job | {"look": 2}, sequence=sequence)[0] == 0
    assert_same_losses([plain], [job])
    run = Path(job["run"])
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["00000002.png", "00000004.png"]
    last, state = torch.load(run / "samples" / "00000004.png"), torch.load(run / "state.pt")
    for name, value in (state["model"] | state["average"]).items():
        assert torch.allclose(last["weights"][name], value, atol=1e-6), name
    assert state["average"] and last["still"].shape == (1, 1, 64, 64, 3)


def test_a_checkpoint_of_the_other_optimizer_is_refused(tmp_path, weights):
    made = Recipes(weights, tmp_path / "cache", 2)
    Trainer(made.make("stage2a"), tmp_path / "run").run(stop_at_step=1)
    with pytest.raises(CheckpointError, match="a different optimizer"):
        Trainer(made.make("stage2a", optimizer="adamw"), tmp_path / "run")


@deepspeed
def test_shards_on_two_processes_have_the_losses_of_one(weights, tmp_path):
    """By the command, with ZeRO-1 by DeepSpeed, on two in passes of one sample; also over one that cannot be read."""
    there = library(tmp_path / "shards", SAMPLES)
    encode_shards(there, FrozenEncoders.load(weights, "cpu"), FIT, lambda done, count: None)
    named = damage(there, 7)
    found = []
    for processes in (1, 2):
        given = ["train", "stage2b", "--data", tmp_path / "shards", "--weights", weights, "--size", "64x64",
                 "--frames", "5", "--steps", "3", "--processes", processes,
                 "--runs", tmp_path / str(processes), "--report", tmp_path / "report",
                 *(("--micro-batch-size", 1) if processes > 1 else ())]  # fmt: skip
        command = [sys.executable, "-m", "omnivideo.cli", *map(str, given)]
        subprocess.run(command, check=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"})
        found.append(logged(tmp_path / str(processes) / "stage2b"))
        assert [json.loads(line)["where"] for line in (tmp_path / "report").read_text().splitlines()] == [named]
    assert len(found[0]) == 3 and found[1] == pytest.approx(found[0], abs=1e-5)
    one, two = (torch.cat([moment.flatten() for moment in moments(tmp_path / side / "stage2b")]) for side in "12")
    assert float((two - one).abs().max()) < 1e-5 * float(one.abs().max())
