"""The fault matrix: kill one process after another and check that everything ends once, with the same result.

python -m benchmarks.faults [--runs 20] [--broker redis|rabbitmq] [--only broker,worker] [--weights FOLDER]

It runs a broker, PostgreSQL, an S3 server (rclone), two Celery workers and the API as separate processes. In each run
ten clips are in flight when one of these processes is killed with SIGKILL at a random time and then restarted, or when
the S3 server's answers are late, cut short or have a wrong bit for some seconds. `turns`, `exceptions`, `batches` and
`webhooks` use an embedded service: turns are killed, or fail unexpectedly, once in every node of the graph, the others
are killed at random times.
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
from benchmarks.conversation_faults import (
    FaultResult,
    fail_turns_at_every_node,
    kill_batches,
    kill_turns_at_every_node,
    kill_webhooks,
)
from tests.support.s3_faults import Mode

JOBS, STEPS = 10, 60
TARGETS = (
    "worker child", "worker", "api", "broker", "postgresql", "s3", "s3 slow", "s3 truncate", "s3 corrupt", "turns",
    "exceptions", "batches", "webhooks",
)  # fmt: skip
CONVERSATION_TARGETS = TARGETS[-4:]
DISTURBANCE_SECONDS = 6.0
MODES: dict[str, Mode] = {"s3 slow": "slow", "s3 truncate": "truncate", "s3 corrupt": "corrupt"}


def run_once(
    cluster: ServiceCluster, target: str, rng: random.Random, expected: list[str]
) -> tuple[int, int, int, int, float]:
    """Kill a target while jobs run.

    Return the jobs done, the jobs with the right bytes, further attempts, messages in the queue, and the seconds.
    """
    start = time.perf_counter()
    ids = [cluster.submit(seed, STEPS) for seed in range(JOBS)]
    time.sleep(rng.uniform(0, 4))
    if target in MODES:
        cluster.disturb_store(MODES[target], DISTURBANCE_SECONDS)
    else:
        cluster.kill_target(target)
    ends = cluster.wait_for_jobs(ids)
    done = sum(state == "done" for state, _, _ in ends.values())
    same_bytes = sum(ends[job_id][1] == key for job_id, key in zip(ids, expected, strict=True))
    retries = sum(attempt - 1 for _, _, attempt in ends.values())
    return done, same_bytes, retries, cluster.count_queue_messages(), time.perf_counter() - start


def run_cluster_targets(
    folder: Path, targets: list[str], arguments: argparse.Namespace, rng: random.Random, console: Console
) -> list[FaultResult]:
    """Kill or disturb each target of a whole service, some times each."""
    results: list[FaultResult] = []
    with ExitStack() as stack:
        cluster = ServiceCluster(folder, arguments.weights, stack, broker=arguments.broker, has_s3_proxy=True)
        ids = [cluster.submit(seed, STEPS) for seed in range(JOBS)]
        ends = cluster.wait_for_jobs(ids)
        expected = [ends[job_id][1] for job_id in ids]
        assert all(expected), ends
        for target in targets:
            result = FaultResult(arguments.broker if target == "broker" else target)
            for run in range(arguments.runs):
                done, same_bytes, retries, queued, seconds = run_once(cluster, target, rng, expected)
                result.runs, result.wanted = run + 1, result.wanted + JOBS
                result.done_once, result.same_result = result.done_once + done, result.same_result + same_bytes
                result.repeated, result.seconds = result.repeated + retries, result.seconds + seconds
                console.print(f"[dim]{result}, {queued} in the queue[/dim]")
            result.seconds /= max(1, result.runs)
            results.append(result)
        if targets:
            console.print(f"unreferenced objects after a sweep: {cluster.count_orphans()}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--broker", choices=("redis", "rabbitmq"), default="redis")
    parser.add_argument("--only", default=",".join(TARGETS))
    parser.add_argument("--weights", default="")
    arguments = parser.parse_args()
    console, rng, targets = Console(width=120), random.Random(0), arguments.only.split(",")
    with tempfile.TemporaryDirectory() as folder:
        home, results = Path(folder), list[FaultResult]()
        if cluster_targets := [target for target in targets if target not in CONVERSATION_TARGETS]:
            results += run_cluster_targets(home / "cluster", cluster_targets, arguments, rng, console)
        if "turns" in targets:
            results.append(kill_turns_at_every_node(home / "turns"))
        if "exceptions" in targets:
            results.append(fail_turns_at_every_node(home / "exceptions"))
        if "batches" in targets:
            results.append(kill_batches(home / "batches", arguments.runs, rng))
        if "webhooks" in targets:
            results.append(kill_webhooks(home / "webhooks", arguments.runs, rng))
    table = Table(title=f"{JOBS} clips of {STEPS} steps in flight, 2 workers, {platform.machine()}")
    for column in ("fault", "runs", "wanted", "done once", "same result", "repeated", "s per run"):
        table.add_column(column, justify="left" if column == "fault" else "right")
    for result in results:
        counts = (result.runs, result.wanted, result.done_once, result.same_result, result.repeated)
        table.add_row(result.name, *map(str, counts), f"{result.seconds:.1f}")
    console.print(table)


if __name__ == "__main__":
    main()
