"""What is stored grows linearly, memory and requests stay flat, and the sweep removes what has expired.

It is a short run of `python -m benchmarks.growth`.
"""

from itertools import pairwise

import pytest

from benchmarks.growth import measure_growth

pytestmark = pytest.mark.timeout(1200)
NUM_TURNS, NUM_JOBS, NUM_ROUNDS = 160, 160, 4
MAX_BYTES_PER_TURN = 30_000


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return measure_growth(tmp_path_factory.mktemp("home"), NUM_TURNS, NUM_JOBS, NUM_ROUNDS)


@pytest.mark.parametrize("name", ["service_mb", "threads_mb", "store_kb"])
def test_what_is_stored_grows_linearly(rows, name):
    sizes = [row[name] for row in rows[:-1]]
    increases = [later - earlier for earlier, later in pairwise(sizes)]
    assert 0 < max(increases) < 1.5 * min(increases), sizes


def test_a_turn_takes_few_bytes_of_checkpoints(rows):
    assert (rows[-2]["threads_mb"] - rows[0]["threads_mb"]) * 2**20 / (NUM_TURNS * 3 / 4) < MAX_BYTES_PER_TURN


@pytest.mark.parametrize(("name", "extra"), [("api_mb", 20.0), ("sweep_mb", 20.0), ("fork_ms", 100.0),
                                             ("thread_ms", 50.0), ("sweep_seconds", 5.0)])  # fmt: skip
def test_memory_and_requests_stay_flat(rows, name, extra):
    second, last = rows[1][name], rows[-2][name]
    assert last < 1.2 * second + extra, [row[name] for row in rows]


def test_the_sweep_removes_what_has_expired(rows):
    before, after = rows[-2], rows[-1]
    assert after["objects"] < before["objects"]
