"""The fault matrix of turns, batches and webhooks, and of an S3 server whose answers are wrong."""

import random
import time
from contextlib import ExitStack

import pytest

from benchmarks.cluster import ServiceCluster
from benchmarks.conversation_faults import (
    CONVERSATIONS,
    fail_turns_at_every_node,
    kill_batches,
    kill_turns_at_every_node,
    kill_webhooks,
)
from omnivideo.agent.graph import NODES, REFERENCE_NODE, SEARCH_NODE

STEPS = 30


def test_a_conversation_passes_through_every_node():
    assert set(CONVERSATIONS) == {*NODES, SEARCH_NODE, REFERENCE_NODE}


@pytest.mark.timeout(1800)
def test_turns_that_are_killed_at_every_node_end_once_with_the_same_result(tmp_path):
    result = kill_turns_at_every_node(tmp_path)
    assert result.runs == len(CONVERSATIONS)
    assert result.done_once == result.same_result == result.wanted, result


@pytest.mark.timeout(900)
def test_a_message_after_an_exception_in_any_node_returns_its_own_clip(tmp_path):
    result = fail_turns_at_every_node(tmp_path)
    assert result.runs == len(CONVERSATIONS)
    assert result.done_once == result.same_result == result.wanted, result


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kill", [kill_batches, kill_webhooks])
def test_batches_and_webhooks_of_a_killed_process_end_once(tmp_path, kill):
    result = kill(tmp_path, 4, random.Random(0))
    assert result.done_once == result.same_result == result.wanted, result
    assert result.repeated <= result.runs, result  # an event that was sent as its process died is sent again


@pytest.mark.timeout(900)
def test_wrong_answers_of_the_store_change_no_clip(tmp_path):
    with ExitStack() as stack:
        cluster = ServiceCluster(tmp_path, "", stack, workers=1, has_s3_proxy=True)
        seeds = range(4)
        ids = [cluster.submit(seed, STEPS) for seed in seeds]
        undisturbed = cluster.wait_for_jobs(ids)
        expected = [undisturbed[job_id][1] for job_id in ids]
        for mode in ("slow", "truncate", "corrupt"):
            ids = [cluster.submit(seed, STEPS) for seed in seeds]
            time.sleep(1.0)
            cluster.workers[0].kill()  # the states that it has saved are read while the answers are wrong
            cluster.workers[0].start()
            cluster.disturb_store(mode, 15.0)
            ends = cluster.wait_for_jobs(ids)
            assert [ends[job_id][:2] for job_id in ids] == [("done", key) for key in expected], mode
