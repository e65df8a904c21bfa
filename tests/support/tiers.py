"""The tiers of the tests: tests/conftest.py adds them as marks, and the Makefile selects by them.

    long     soak tests, fault matrices, vLLM servers, training on several processes: everything over 20 s
    slow     left out of `make test-fast`, which runs for at most three minutes
    gpu      tests/gpu, which need an NVIDIA GPU
    clients  tests/clients, which run other programs in separate environments
    deploy   tests/deploy/stack, which build the images and run the whole stack on a container engine

A pattern, in the syntax of fnmatch, is a test's id without parameters, or a file.
"""

import re
from collections.abc import Iterable
from fnmatch import fnmatch

import pytest

LONG = (
    # Training on several processes, each of which imports torch.
    "training/engine/test_distributed.py::test_a_run_resumes_on_two_processes*",
    "training/engine/test_distributed.py::test_two_processes_have_the_losses_of_one",
    "training/engine/test_distributed.py::test_sequence_parallelism*",
    "training/engine/test_distributed.py::test_a_run_with_a_killed_process*",
    "training/engine/test_distributed.py::test_stages_have_the_same_losses*",
    "training/engine/test_distributed.py::test_two_groups_of_two*",
    "training/engine/test_distributed.py::test_two_processes_generate_samples*",
    "training/engine/test_distributed.py::test_gradients_of_micro_batches*",
    "training/engine/test_distributed.py::test_shards_on_two_processes*",
    "training/engine/test_distributed.py::test_bf16_keeps_fp32_weights",
    "training/engine/test_distributed.py::test_a_gradient_that_is_not_finite*",
    # vLLM servers. One chat of test_published_service.py stays in `make test`.
    "backends/mllm/test_vllm_lora.py",
    "backends/mllm/test_vllm.py",
    "backends/mllm/test_vllm_conversations.py",
    "backends/mllm/test_vllm_instruct.py",
    "backends/mllm/test_vllm_vila.py",
    "backends/test_published_service.py::test_a_chat_with_the_mllm_on_vllm*",
    "backends/test_published_service.py::test_a_chat_with_two_experts*",
    # Fault matrices, in which brokers, workers and runs are killed.
    "backends/decoder/test_rollout.py::test_weights_are_replaced_under_load*",
    "backends/queue/test_celery.py::test_killed_workers_lose_no_job*",
    "backends/queue/test_celery.py::test_a_killed_workers_extension*",
    "backends/queue/test_celery.py::test_a_terminated_worker*",
    "backends/queue/test_celery.py::test_a_child_that_loads_slowly*",
    "backends/queue/test_celery.py::test_a_clip_may_take_longer*",
    "backends/queue/test_celery.py::test_a_missing_broker*",
    "backends/queue/test_celery.py::test_services_that_share_a_broker*",
    "backends/queue/test_notifier.py::test_the_certificate_of_rabbitmq*",
    "storage/test_starts.py::test_many_first_starts*",
    # Two PostgreSQL servers with a failover, and 150 conversations behind PgBouncer.
    "storage/test_failover.py",
    "storage/test_pgbouncer.py",
    "training/curation/*::test_a_killed_run_resumes*",
    # Golden tests on changed data, once for each of some eighty tensors.
    "test_golden_coverage.py::test_a_changed_tensor*",
    # Curating the whole folder of footage: 26 s.
    "training/curation/test_curation.py",
    # 25 generated requests for each route; three of each are in `make test`.
    "api/test_openapi.py::test_many_requests*",
    "test_golden_variant.py",
    # The whole evaluation: 98 s.
    "cli/test_cli.py::test_evaluate_scores_every_category",
    # All faults of all files of the published layouts; `make test` has a third of them.
    "models/weights/test_import.py::test_every_other_fault_is_named",
    # The commands of docs/weights.md, from downloads to clips.
    "docs/test_docs_weights.py",
    # Weights of the released 1.3B model at full size.
    "models/weights/test_convert.py::test_version_1_in_full_size*",
    # As many busy processes as CPUs, for three CPU seconds of the reader: they take the CPU from all other tests.
    "media/test_sandbox.py::test_a_busy_machine*",
    # Processes with models, which are killed in every kind of turn: 25 s; tests/api/test_turn_process.py has one kill.
    "backends/queue/test_kill.py::test_killed_conversations*",
    # Gradio's page in a browser: 40 s.
    "api/test_gradio.py::test_gradios_page*",
    # A browser, nginx in a network namespace, and a service with the shipped weights: 40 s.
    "api/test_behind_nginx.py",
    # A service with hundreds of turns and jobs: a minute.
    "benchmarks/test_growth.py",
    # Outages of up to a minute. In `make test`, an answer continues after one, and a missing MLLM is an error.
    "api/test_chat_outages.py::test_an_outage_ends_with_an_error*",
    # Bodies of chat programs before a model that plans; `make test` sends them to tiny.
    "api/test_chat_programs.py::test_a_planning_model_reads_every_shape_of_messages",
    "api/test_chat_programs.py::test_a_planning_model_reads_wrappers_as_background",
    # Three edits; `make test` has the remix of one that was delivered in another shape.
    "api/test_shapes.py::test_an_edit_lasts_as_long_as_its_source",
    # Real terminals, fresh clones, notebooks: each loads the shipped weights in processes of its own.
    "usability/test_terminal.py::test_answers*",
    "usability/test_terminal.py::test_ctrl_c*",
    "usability/test_terminal.py::test_a_paste*",
    "usability/test_fresh_clone.py",
    # mypy over the package and its libraries, without a cache: minutes.
    "usability/test_types.py",
    "usability/test_notebook.py",
    # The released wheel, in an empty environment.
    "deploy/test_release.py::test_the_wheel_generates_a_clip*",
    # Processes that are killed at every node of a turn, and in batches and webhooks.
    "benchmarks/test_faults.py::test_turns*",
    "benchmarks/test_faults.py::test_a_message*",
    "benchmarks/test_faults.py::test_batches*",
    "benchmarks/test_faults.py::test_wrong_answers*",
    # 1,000 jobs and 200 turns under restarts: minutes.
    "api/test_restarts.py",
    "api/test_full_disk.py",
    # Wheels of earlier versions, built and run beside this one.
    "deploy/test_versions.py",
)
SLOW = (
    "agent/test_more_phrases.py::test_what_people_say_is_planned_as_they_expect",
    "agent/test_turn_checks.py::test_what_was_written*",
    "agent/test_linear_patterns.py",
    "agent/test_conversations.py::test_the_planner_evaluation*",
    "agent/test_tracing.py",
    "api/attacks/*.py",
    "api/test_access.py",
    "api/test_deletion.py",
    "api/test_delivery.py",
    "api/test_operations.py::test_a_browser*",
    "api/test_chat_*.py",
    "api/test_fields.py",
    "api/test_gradio.py",
    "api/test_image_fields.py",
    "api/test_shapes.py",
    "api/test_text_limits.py",
    "api/test_idempotency.py",
    "api/test_messages.py",
    "api/test_openai*.py",
    "api/test_other_servers.py",
    "api/test_openapi.py",
    "api/test_public_links.py",
    "api/test_responses.py",
    "api/test_threads*.py",
    "api/test_turn_process.py",
    "api/test_turn_runner.py",
    "backends/decoder/test_rollout.py",
    "backends/decoder/test_worker*.py",
    "benchmarks/*.py",
    "backends/mllm/test_remote.py",
    "backends/mllm/test_vllm*.py",
    "backends/queue/test_celery*.py",
    "backends/queue/test_kill.py",
    "backends/test_published_service.py",
    "backends/test_tracing.py",
    "cli/test_cli*.py",
    "evaluation/test_phrase_runner.py",
    "docs/test_docs.py",
    "evaluation/test_sample_sheet*.py",
    "models/test_*.py::test_the_ends_of_the_flow_shifts_range*",
    "models/weights/*.py",
    "sdk/test_batch.py",
    "sdk/test_client*.py",
    "sdk/test_parity.py",
    "sdk/test_progress.py",
    "storage/test_objects*.py",
    "storage/test_starts.py",
    "synthetic/*.py::test_captions_describe_the_rendered_scene",
    "synthetic/*.py::test_the_scorer_reads_the_ground_truth",
    "test_cpu_threads.py::test_entry_points*",
    "test_startup.py::test_generating*",
    "usability/*.py",
    "test_examples.py",
    "training/curation/*.py",
    "training/data/test_batch.py",
    "training/data/test_dataset*.py",
    "training/engine/test_distributed*.py",
    "training/engine/test_optim.py",
    "training/engine/test_placement*.py",
    "training/engine/test_trainer.py",
    "training/planning/*.py::test_parameters_agree_with_the_released_model",
    "training/recipes/*.py",
    "training/tiny/*.py",
    "storage/test_compact_checkpoints.py",
)
FOLDERS = {"gpu": "gpu/*", "clients": "clients/*", "deploy": "deploy/stack/*"}


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
