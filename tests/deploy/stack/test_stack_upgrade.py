"""An upgrade to the next version and the way back, by the documented commands, while clips are submitted."""

import subprocess
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.deploy.stack.documented import read_blocks
from tests.deploy.stack.requests import run_sql, wait_for_video
from tests.support.compose_files import ROOT

CLIP = {"prompt": "a red ball", "num_inference_steps": 20, "size": "64x64"}
VERSIONS = ROOT / "omnivideo/storage/database/migrations/versions"
NEW_MIGRATION = '''"""A column that a later version adds."""

from alembic import op

revision, down_revision = "9999", "{head}"


def upgrade() -> None:
    op.execute("ALTER TABLE jobs ADD COLUMN of_a_later_version INTEGER")
'''
SUBMIT_SECONDS = 4.0  # slower than a clip is rendered beside a build, which can take a quarter of an hour


def commit(checkout: Path, version: str) -> None:
    """Record the checkout's files as a version, as a clone of the repository has it."""
    identity = ["-c", "user.name=operator", "-c", "user.email=operator@example.com"]
    for command in (["init", "--quiet"], ["add", "--all"], [*identity, "commit", "--quiet", "--message", version],
                    ["tag", f"v{version}"]):  # fmt: skip
        subprocess.run(["git", *command], cwd=checkout, check=True, capture_output=True)


def make_next_version(checkout: Path) -> None:
    """Change the version in every file that has it, and add a migration."""
    for path in (checkout / "deploy/compose.yaml", checkout / "pyproject.toml"):
        text = path.read_text()
        assert "0.2.0" in text
        path.write_text(text.replace("0.2.0", "0.3.0"))
    head = max(path.name.partition("_")[0].removeprefix("v") for path in VERSIONS.glob("v*.py"))
    folder = checkout / VERSIONS.relative_to(ROOT)
    (folder / "v9999_later.py").write_text(NEW_MIGRATION.format(head=head))


def list_versions(stack) -> set[str]:
    images = [stack.engine.inspect(stack.name(service))["Config"]["Image"] for service in ("api", "worker", "sweep")]
    return {image.partition(":")[2].removesuffix("-cpu") for image in images}


@pytest.mark.timeout(1800, func_only=True)
def test_an_upgrade_and_a_rollback_lose_no_clip(stack, http, report):
    commit(stack.checkout, "0.2.0")
    make_next_version(stack.checkout)
    commit(stack.checkout, "0.3.0")
    clone = stack.checkout / ".git"
    subprocess.run(["git", "remote", "add", "origin", str(clone)], cwd=stack.checkout, check=True)
    subprocess.run(["git", "checkout", "--quiet", "v0.2.0"], cwd=stack.checkout, check=True)
    submitted, refused_at, is_over = list[str](), list[float](), threading.Event()

    def submit() -> None:
        while not is_over.is_set():
            try:
                answer = http.post("/v1/videos", json=CLIP | {"seed": len(submitted)}, timeout=30)
                assert answer.status_code in (200, 503), answer.text
                submitted.extend([str(answer.json()["id"])] if answer.status_code == 200 else [])
                refused_at.extend([time.monotonic()] if answer.status_code == 503 else [])
            except httpx.HTTPError:
                refused_at.append(time.monotonic())
            time.sleep(SUBMIT_SECONDS)

    client = threading.Thread(target=submit)
    client.start()
    upgrade, rollback = read_blocks("Upgrade")
    try:
        stack.run(upgrade)
        assert list_versions(stack) == {"0.3.0"}
        assert run_sql(stack, "SELECT version_num FROM alembic_version") == "9999"
        seconds = refused_at[-1] - refused_at[0] if refused_at else 0
        report["an upgrade of the whole stack"] = f"submits are refused for {seconds:.0f} s"
        refused_at.clear()
        stack.run(rollback)
        assert list_versions(stack) == {"0.2.0"}
        seconds = refused_at[-1] - refused_at[0] if refused_at else 0
        report["its rollback"] = f"submits are refused for {seconds:.0f} s"
        time.sleep(5)
    finally:
        is_over.set()
        client.join()
    assert run_sql(stack, "SELECT version_num FROM alembic_version") == "9999"  # migrations only add
    assert len(submitted) > 10
    for video_id in submitted:
        assert wait_for_video(http, video_id)["status"] == "completed"
    names = ", ".join(f"'{video_id}'" for video_id in submitted)  # other tests have killed workers
    losses = run_sql(stack, f"SELECT max(worker_losses) FROM jobs WHERE id IN ({names})")
    report["its rollback"] += f"; {len(submitted)} clips submitted meanwhile, all done, {losses} lost workers"
    assert losses == "0"
    for service in ("api", "worker", "mllm"):  # the versions that no other test uses
        stack.engine("DELETE", f"/images/{stack.services[service]['image'].replace('0.2.0', '0.3.0')}", missing_ok=True)
