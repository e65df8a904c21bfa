"""The number of CPU threads and how idle ones wait: quotas are read, and a user's own values are kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from omnivideo import cpu_threads
from omnivideo.cpu_threads import COMPUTING_NICENESS

ROOT = Path(__file__).parents[1]
PRINT_ENVIRONMENT = """
import json, os, sys
print(json.dumps({
    "variables": {name: os.environ[name] for name in os.environ if name.startswith(("OMP_", "GOMP_", "MKL_"))},
    "threads": sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None,
}))
"""


def write_files(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def run_script(script: str, **environment: str) -> dict:
    """Run a script and then PRINT_ENVIRONMENT, with no thread variables but those of `environment`."""
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, "-c", f"{script}\n{PRINT_ENVIRONMENT}"]
    completed = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=True)
    return json.loads(completed.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("membership", "files", "quotas"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, [1.5]),
        ("0::/\n", {"cpu.max": "max 100000\n"}, []),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "400000 100000\n", "cpu.max": "max 100000\n"}, [4]),
        ("0::/path/of/the/host\n", {"cpu.max": "50000 100000\n"}, [0.5]),
        (
            "4:cpu,cpuacct:/pod\n3:memory:/pod\n",
            {"cpu,cpuacct/pod/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/pod/cpu.cfs_period_us": "100000\n"},
            [3],
        ),
        (
            "4:cpu,cpuacct:/pod\n",
            {"cpu,cpuacct/pod/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/pod/cpu.cfs_period_us": "100000\n"},
            [],
        ),
        ("", {}, []),
    ],
    ids=["v2", "v2 no limit", "v2 parent", "v2 in a container", "v1", "v1 no limit", "no cgroup"],
)
def test_quotas_of_cgroups(tmp_path, membership, files, quotas):
    write_files(tmp_path, files)
    write_files(tmp_path, {"membership": membership})
    assert list(cpu_threads.read_cpu_quotas(tmp_path, tmp_path / "membership")) == quotas


def test_malformed_quota_is_no_limit(tmp_path):
    write_files(tmp_path, {"cpu.max": "nonsense"})
    assert cpu_threads.read_quota(tmp_path) is None
    assert cpu_threads.read_quota(tmp_path / "missing") is None


@pytest.mark.parametrize(("quota", "cpus"), [("250000 100000", 2), ("10000 100000", 1), ("9999900000 100000", 8)])
def test_available_cpus_are_limited_by_cpuset_and_quota(tmp_path, monkeypatch, quota, cpus):
    write_files(tmp_path, {"cpu.max": quota, "membership": "0::/\n"})
    monkeypatch.setattr(cpu_threads, "CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(cpu_threads, "CGROUP_MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert cpu_threads.count_available_cpus() == cpus


CONFIGURE = "from omnivideo import cpu_threads\ncpu_threads.count_available_cpus = lambda: 8\n"


@pytest.mark.parametrize(
    ("call", "own", "variables"),
    [
        ("()", {}, {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "OMP_NUM_THREADS": "8"}),
        ("(3)", {}, {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "OMP_NUM_THREADS": "2"}),
        ("(20)", {}, {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "OMP_NUM_THREADS": "1"}),
        ("()", {"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active", "OMP_NUM_THREADS": "8"}),
        (
            "(4)",
            {"OMP_NUM_THREADS": "5"},
            {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "OMP_NUM_THREADS": "5"},
        ),
        (
            "(4)",
            {"MKL_NUM_THREADS": "5"},
            {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "MKL_NUM_THREADS": "5"},
        ),
    ],
)
def test_environment_of_a_process(call, own, variables):
    report = run_script(f"{CONFIGURE}cpu_threads.configure_cpu_threads{call}", **own)
    assert report == {"variables": variables, "threads": None}


def test_a_second_call_may_divide_further():
    report = run_script(f"{CONFIGURE}cpu_threads.configure_cpu_threads()\ncpu_threads.configure_cpu_threads(4)")
    assert report["variables"]["OMP_NUM_THREADS"] == "2"


def test_children_share_the_cpus():
    script = f"{CONFIGURE}import os\ncpu_threads.configure_cpu_threads()\n"
    script += "os.environ.update(cpu_threads.build_child_environment(4))"
    assert run_script(script)["variables"]["OMP_NUM_THREADS"] == "2"
    assert run_script(script, OMP_NUM_THREADS="7")["variables"]["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(("threads", "expected"), [(6, 4), (3, 3)])
def test_with_torch_loaded_the_number_of_threads_is_only_lowered(threads, expected):
    script = f"import torch\ntorch.set_num_threads({threads})\n{CONFIGURE}cpu_threads.configure_cpu_threads(2)"
    assert run_script(script)["threads"] == expected


ENTRY_POINTS = {
    "command line": """
import sys
from omnivideo.cli.main import main
sys.argv = ["omnivideo", "--help"]
try:
    main()
except SystemExit:
    pass
""",
    "Studio": "from omnivideo import Studio",
    "demo": """
import omnivideo, sys
from omnivideo.cli import demo
from omnivideo.errors import CheckpointError
def stop(*arguments, **options):
    raise CheckpointError("stop here")
sys.argv = ["demo"]
demo.tempfile.TemporaryDirectory = stop
try:
    demo.main()
except SystemExit:
    pass
""",
}


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_entry_points_configure_before_torch_is_loaded(name):
    """An import hook notes the wait policy at the moment at which torch is loaded, if it is."""
    watch = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            assert os.environ["OMP_WAIT_POLICY"] == "passive", "torch is loaded too early"
sys.meta_path.insert(0, Watch())
"""
    report = run_script(watch + ENTRY_POINTS[name])
    assert report["variables"]["OMP_WAIT_POLICY"] == "passive"


def test_all_threads_of_a_process_that_computes_give_way():
    """On Linux a priority belongs to a thread: those that wait already must follow as well."""
    code = (
        "import os, threading\n"
        "from omnivideo.cpu_threads import lower_cpu_priority\n"
        "is_over, before = threading.Event(), os.getpriority(os.PRIO_PROCESS, 0)\n"
        "thread = threading.Thread(target=is_over.wait)\n"
        "thread.start()\n"
        "lower_cpu_priority()\n"
        "values = [os.getpriority(os.PRIO_PROCESS, int(name)) for name in os.listdir('/proc/self/task')]\n"
        "is_over.set()\n"
        "print(before, *values)\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, *values = map(int, output.split())
    assert len(values) == 2 and min(values) == max(before, COMPUTING_NICENESS)
