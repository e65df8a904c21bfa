"""Many long texts at once delay no other thread: one of them is read at a time."""

import statistics
import threading
import time

import pytest

from omnivideo.agent.planner_prompts import load_prompts
from omnivideo.agent.turn_plan import LONG_TEXT_LOCK, pause_reading, plan_turn, wait_to_read
from omnivideo.presets import get_preset
from tests.support.twins import ScriptedMLLM

NUM_READERS, NUM_TIMERS = 12, 40
LONG_TEXT = "a" + "and " * 999 + "b"
PRESET = get_preset("tiny")


def read_long_text() -> list:
    state = {"attachments": [], "artifacts": [], "turns": [], "options": {}}
    return plan_turn(ScriptedMLLM(), PRESET, load_prompts(PRESET), state, LONG_TEXT, {})


@pytest.fixture
def measure_waits():
    """Return a function that lets threads read long texts, and returns how late a timer fires meanwhile, in s."""
    stop, threads = threading.Event(), []

    def read_until_stopped() -> None:
        while not stop.is_set():
            read_long_text()

    def measure(num_readers: int) -> float:
        while len(threads) < num_readers:
            threads.append(threading.Thread(target=read_until_stopped))
            threads[-1].start()
        waits = []
        for _ in range(NUM_TIMERS):
            started_at = time.perf_counter()
            time.sleep(0.001)
            waits.append(time.perf_counter() - started_at)
        return statistics.median(waits)

    yield measure
    stop.set()
    for thread in threads:
        thread.join()


def test_many_long_texts_delay_others_no_more_than_one_does(measure_waits):
    """With twelve threads that read at once, each wait took twelve times Python's interval for switching threads."""
    with_one = measure_waits(1)
    assert measure_waits(NUM_READERS) < 3 * with_one + 0.01


def test_others_may_read_while_a_reader_waits_for_the_mllm():
    with wait_to_read(LONG_TEXT):
        assert LONG_TEXT_LOCK.locked()
        with pause_reading(LONG_TEXT):
            assert not LONG_TEXT_LOCK.locked()
        assert LONG_TEXT_LOCK.locked()
    with wait_to_read("a red ball"), pause_reading("a red ball"):
        assert not LONG_TEXT_LOCK.locked()
