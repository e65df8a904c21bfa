"""Which tests belong to which tier: the marks that tests/conftest.py adds, and the Makefile selects by.

    long     soak tests, fault matrices, vLLM servers, training on several processes: everything over 20 s
    slow     left out of `make test-fast`, which runs for at most three minutes
    gpu      tests/gpu; they need an NVIDIA GPU
    clients  tests/clients; other programs, in environments of their own

A pattern is a test's id without parameters, or a file, as fnmatch reads them.
"""

import re
from collections.abc import Iterable
from fnmatch import fnmatch

import pytest

LONG = (
    # Training on several processes, each with its own torch.
    "training/engine/test_distributed.py::test_a_run_goes_on_with_two_processes*",
    "training/engine/test_distributed.py::test_two_processes_have_the_losses_of_one",
    "training/engine/test_distributed.py::test_a_sequence_in_two_parts*",
    "training/engine/test_distributed.py::test_a_killed_process*",
    "training/engine/test_distributed.py::test_stages_have_the_same_losses*",
    "training/engine/test_distributed.py::test_two_groups_of_two*",
    "training/engine/test_distributed.py::test_samples_of_two_processes*",
    "training/engine/test_distributed.py::test_gradients_of_many_passes*",
    "training/engine/test_distributed.py::test_shards_on_two_processes*",
    "training/engine/test_distributed.py::test_bf16_keeps_fp32_weights",
    "training/engine/test_distributed.py::test_a_gradient_that_is_not_finite*",
    # vLLM servers. test_vllm_lora.py, with two short-lived ones, stays in `make test`.
    "backends/mllm/test_vllm.py",
    "backends/mllm/test_vllm_conversations.py",
    # Fault matrices: brokers, workers and runs that are killed.
    "backends/queue/test_celery.py::test_workers_draw_are_killed*",
    "backends/queue/test_celery.py::test_a_worker_that_is_told_to_end*",
    "backends/queue/test_celery.py::test_a_broker_that_is_away*",
    "training/curation/*::test_kill_and_go_on*",
    # Weights of the released 1.3B model, in full size.
    "models/weights/test_convert.py::test_version_1_in_full_size*",
    # The released wheel, in an empty environment.
    "deploy/test_release.py::test_the_wheel_generates_a_clip*",
)
SLOW = (
    "agent/test_conversations.py::test_the_planner_evaluation*",
    "api/attacks/*.py",
    "api/test_openai*.py",
    "api/test_openapi.py",
    "api/test_threads*.py",
    "backends/decoder/test_worker*.py",
    "backends/mllm/test_remote.py",
    "backends/mllm/test_vllm*.py",
    "backends/queue/test_celery*.py",
    "backends/queue/test_kill.py",
    "cli/test_cli*.py",
    "docs/test_docs.py",
    "evaluation/test_sample_sheet*.py",
    "models/test_*.py::test_the_ends_of_the_flow_shifts_range*",
    "models/weights/*.py",
    "sdk/test_client*.py",
    "storage/test_objects*.py",
    "synthetic/*.py::test_captions_state_what_is_seen",
    "synthetic/*.py::test_scorer_reads_ground_truth",
    "test_cpu_threads.py::test_entry_points*",
    "test_examples.py",
    "training/curation/*.py",
    "training/data/test_batch.py",
    "training/data/test_dataset*.py",
    "training/engine/test_distributed*.py",
    "training/engine/test_optim.py",
    "training/engine/test_placement*.py",
    "training/engine/test_trainer.py",
    "training/planning/*.py::test_parameters_are_those_of_the_released_model",
    "training/recipes/*.py",
    "training/tiny/*.py",
)
FOLDERS = {"gpu": "gpu/*", "clients": "clients/*"}


def matches(node_id: str, pattern: str) -> bool:
    """Return whether a test's id matches; a pattern without `::` covers every test of its files."""
    name = re.sub(r"\[.*", "", node_id.removeprefix("tests/"), flags=re.S)
    return fnmatch(name, pattern if "::" in pattern else f"{pattern}::*")


def list_tiers(node_id: str) -> list[str]:
    """Return the marks of a test."""
    tiers = [tier for tier, pattern in FOLDERS.items() if matches(node_id, pattern)]
    is_long = any(matches(node_id, pattern) for pattern in LONG)
    is_slow = is_long or any(matches(node_id, pattern) for pattern in SLOW)
    return tiers + ["long"] * is_long + ["slow"] * is_slow


def mark_tiers(items: Iterable[pytest.Item]) -> None:
    """Add the marks of their tiers to the tests that pytest has collected."""
    for item in items:
        for tier in list_tiers(item.nodeid):
            item.add_marker(getattr(pytest.mark, tier))


def find_unused_patterns(node_ids: Iterable[str]) -> set[str]:
    """Return the patterns that no test matches."""
    names = list(node_ids)
    return {pattern for pattern in (*LONG, *SLOW) if not any(matches(name, pattern) for name in names)}
