"""Earlier versions of this package, built from their commits and run as processes of their own."""

import io
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from omnivideo import __version__
from tests.support.servers import free_port

ROOT = Path(__file__).parents[2]
KEY = "a-key-for-two-versions"
START_SECONDS = 300.0  # a busy machine may need two minutes
VERSION_0_1 = "806a3b5"  # its last commit
# Where the tag 0.2.0 is to stand. It is used as long as the repository has no tag of an older version.
VERSION_0_2 = "241c71f"


def parse_version(tag: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", tag)))


def find_newest_older_tag() -> str:
    """Return the newest tag of a version that is not newer than this tree and is an ancestor of it."""
    command = ["git", "tag", "--list", "--merged", "HEAD", "--no-contains", "HEAD"]
    tags = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    versions = [tag for tag in tags if re.fullmatch(r"v?\d+\.\d+\.\d+", tag)]
    older = [tag for tag in versions if parse_version(tag) <= parse_version(__version__)]
    return max(older, key=parse_version, default=VERSION_0_2)


def install_wheel(commit: str, folder: Path) -> Path:
    """Build the wheel of a commit, and return the folder in which it is installed; skip the test without the commit."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        pytest.skip(f"this clone has no commit {commit}: two versions on one database were not tested")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder / "source", filter="data")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--wheel-dir", str(folder / "dist"), str(folder / "source")]
    built = subprocess.run(build, capture_output=True, text=True, timeout=600, check=False)
    if built.returncode:
        pytest.skip(f"the wheel cannot be built here: {built.stderr.strip().splitlines()[-1:]}")
    (wheel,) = (folder / "dist").glob("omnivideo-*.whl")
    install = [*pip, "install", "--no-deps", "--target", str(folder / "installed"), str(wheel)]
    subprocess.run(install, check=True, timeout=600)
    return folder / "installed"


class ReleasedVersion:
    """The commands of a version whose package is in a folder, with the settings of one service."""

    def __init__(self, package: Path, home: Path, database: str):
        self.home, self.log = home, home / f"{package.parent.name}-{package.name}.log"
        self.environment = {
            "PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive", "OMNIVIDEO_HOME": str(home), "OMNIVIDEO_ADMIN_KEY": KEY,
        }  # fmt: skip
        self.environment |= {"OMNIVIDEO_DATABASE": database} if database else {}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "omnivideo.cli", *arguments]
        return subprocess.run(
            command, env=self.environment, cwd=self.home, capture_output=True, text=True, timeout=120, check=False
        )

    @contextmanager
    def serve(self) -> Iterator[httpx.Client]:
        """Run the service with a worker in its process, and yield a client once it is ready."""
        port = free_port()
        command = [sys.executable, "-m", "omnivideo.cli", "serve", "--port", str(port), "--device", "cpu"]
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command, env=self.environment, cwd=self.home, stdout=log, stderr=log, start_new_session=True
            )
        headers = {"Authorization": f"Bearer {KEY}"}
        try:
            with httpx.Client(
                base_url=f"http://127.0.0.1:{port}", headers=headers, trust_env=False, timeout=60
            ) as client:
                self.wait_until_ready(client, process)
                yield client
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def wait_until_ready(self, client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if client.get("/health").status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.2)
        raise AssertionError(f"the service did not start:\n{self.log.read_text()[-3000:]}")


ADDED_FIELD = "added_by_a_later_version"
# The fields of these are columns of tables, which migrations add, or arguments of functions.
UNCHANGED_MESSAGES = ("ModelIdentity", "WorkerRecord", "KeyLimits", "TextSampling", "WriteRequest")
LATER_MESSAGES = f'''
from pydantic import model_serializer

class FrozenModel(FrozenModel):
    @model_serializer(mode="wrap")
    def add_field(self, serialize):
        return serialize(self) | ({{}} if type(self).__name__ in {UNCHANGED_MESSAGES} else {{"{ADDED_FIELD}": "1"}})

    @model_validator(mode="before")
    @classmethod
    def read_field(cls, fields):
        return {{name: fields[name] for name in fields if name != "{ADDED_FIELD}"}} if type(fields) is dict else fields
'''


def build_later_version(folder: Path) -> Path:
    """Return a folder with this package as a later version: each message that it writes has one more field."""
    package = folder / "omnivideo"
    package.mkdir(parents=True)
    for path in (ROOT / "omnivideo").iterdir():
        if path.name not in ("contracts.py", "__pycache__"):
            (package / path.name).symlink_to(path)
    contracts = (ROOT / "omnivideo" / "contracts.py").read_text()
    before, marker, after = contracts.partition("\n\nclass RequestModel(")
    params = "    params: SamplingParams\n"  # of a job; the later version's workers know the field
    assert "class FrozenModel(" in before and marker and after.count(params) == 1
    after = after.replace(params, f'{params}    {ADDED_FIELD}: str = "1"\n')
    (package / "contracts.py").write_text(before + LATER_MESSAGES + marker + after)
    return folder
