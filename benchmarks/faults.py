"""The fault matrix: kill one process after another and check that every job still ends once, with the same bytes.

python -m benchmarks.faults [--runs 20] [--only redis,worker] [--weights FOLDER]

It runs Redis, PostgreSQL, an S3 server (rclone), two Celery workers and the API as separate processes. In each run ten
clips are in flight when one of these processes is killed with SIGKILL at a random time and then restarted.
"""

import argparse
import platform
import random
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.cluster import ServiceCluster

JOBS, STEPS = 10, 60
TARGETS = ("worker child", "worker", "api", "redis", "postgresql", "s3")


def run_once(
    cluster: ServiceCluster, target: str, rng: random.Random, expected: list[str]
) -> tuple[int, int, int, int, float]:
    """Kill a target while jobs run.

    Return the jobs done, the jobs with the right bytes, further attempts, messages in the queue, and the seconds.
    """
    start = time.perf_counter()
    ids = [cluster.submit(seed, STEPS) for seed in range(JOBS)]
    time.sleep(rng.uniform(0, 4))
    cluster.kill_target(target)
    ends = cluster.wait_for_jobs(ids)
    done = sum(state == "done" for state, _, _ in ends.values())
    same_bytes = sum(ends[job_id][1] == key for job_id, key in zip(ids, expected, strict=True))
    retries = sum(attempt - 1 for _, _, attempt in ends.values())
    return done, same_bytes, retries, cluster.count_queue_messages(), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--only", default=",".join(TARGETS))
    parser.add_argument("--weights", default="")
    arguments = parser.parse_args()
    console, rng = Console(width=120), random.Random(0)
    table = Table(title=f"{JOBS} clips of {STEPS} steps in flight, 2 workers, {platform.machine()}")
    for column in ("killed", "runs", "jobs", "done once", "same bytes", "taken over", "in queue", "s per run"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        cluster = ServiceCluster(Path(folder), arguments.weights, stack)
        ids = [cluster.submit(seed, STEPS) for seed in range(JOBS)]
        ends = cluster.wait_for_jobs(ids)
        expected = [ends[job_id][1] for job_id in ids]
        assert all(expected), ends
        for target in arguments.only.split(","):
            sums = [0, 0, 0, 0, 0.0]
            for run in range(arguments.runs):
                result = run_once(cluster, target, rng, expected)
                sums = [total + value for total, value in zip(sums, result, strict=True)]
                console.print(f"[dim]{target} {run + 1}/{arguments.runs}: {sums}[/dim]")
            done, same_bytes, retries, queued, seconds = sums
            jobs = arguments.runs * JOBS
            table.add_row(target, str(arguments.runs), str(jobs), str(done), str(same_bytes), str(retries), str(queued),
                          f"{seconds / arguments.runs:.1f}")  # fmt: skip
        orphans = cluster.count_orphans()
    console.print(table)
    console.print(f"unreferenced objects after a sweep: {orphans}")


if __name__ == "__main__":
    main()
