"""A backup that is taken under load by the documented commands, and restored on a machine that has nothing else."""

import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest

from tests.deploy.stack.compose import Stack, copy_checkout
from tests.deploy.stack.documented import read_commands
from tests.deploy.stack.requests import make_everything_old, wait_for_video
from tests.support.s3_server import rclone_program

CLIP = {"prompt": "a red ball", "num_inference_steps": 4, "size": "64x64"}
PAUSE = "sleep 6"  # between two commands, as with a large database; the load goes on meanwhile
DOCUMENTED_STORE = "http://127.0.0.1:3900"


def run_documented_commands(stack: Stack, environment: dict[str, str], number: int, pause: str = "true") -> None:
    """Run a block under "Backup and restore", with the address of this stack's store, and pauses between its lines."""
    commands = f"\n{pause}\n".join(read_commands("Backup and restore", number))
    path = f"export PATH={rclone_program().rpartition('/')[0]}:$PATH\n"
    stack.run(path + commands.replace(DOCUMENTED_STORE, environment["OMNIVIDEO_S3_PUBLIC"]))


@contextmanager
def repeat_in_threads(*actions: Callable[[], object]) -> Iterator[None]:
    """Repeat each action in a thread of its own until the block ends; re-raise the first error of any."""
    is_over, errors = threading.Event(), list[BaseException]()

    def repeat(action: Callable[[], object]) -> None:
        try:
            while not is_over.is_set():
                action()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=repeat, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    for error in errors:
        raise error


def list_videos(http: httpx.Client) -> list[dict]:
    videos, after = [], {}
    while True:
        page = http.get("/v1/videos", params={"limit": 100, "order": "asc", **after}).raise_for_status().json()
        videos += page["data"]
        if not page["has_more"]:
            return videos
        after = {"after": page["data"][-1]["id"]}


@pytest.mark.timeout(1800)
def test_a_backup_taken_under_load_serves_every_clip_elsewhere(stack, http, environment, report, tmp_path):
    """Clips and chats are made, clips are deleted and sweeps run, all during the backup."""
    made = [str(http.post("/v1/videos", json=CLIP | {"seed": seed}).json()["id"]) for seed in range(30)]
    for video_id in made:
        assert wait_for_video(http, video_id)["status"] == "completed"
    make_everything_old(stack, made)
    http.delete(f"/v1/videos/{made[-1]}").raise_for_status()
    deleted, added, swept = list[str](), list[str](), list[str]()

    def add_clip() -> None:
        added.append(http.post("/v1/videos", json=CLIP | {"seed": 1000 + len(added)}).raise_for_status().json()["id"])
        time.sleep(1.5)

    def chat() -> None:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "a picture of a green square"}]}
        http.post("/v1/chat/completions", json=body).raise_for_status()

    def delete_clip() -> None:
        if len(deleted) < len(made) - 2:
            video_id = made[len(deleted)]
            http.delete(f"/v1/videos/{video_id}").raise_for_status()
            deleted.append(video_id)
        time.sleep(4)

    def sweep() -> None:
        """Do at once what the sweep's container does every hour, as long as it runs."""
        command = ["/usr/bin/docker", "exec", stack.name("sweep"), "omnivideo", "sweep"]
        done = subprocess.run(command, env=stack.engine.environment, capture_output=True, text=True, check=False)
        swept.extend([done.stdout] if done.returncode == 0 else [])
        time.sleep(1)

    began_at = time.monotonic()
    with repeat_in_threads(add_clip, chat, delete_clip, sweep):
        time.sleep(10)
        run_documented_commands(stack, environment, 0, PAUSE)
        report["a backup under load"] = f"{time.monotonic() - began_at:.0f} s, {len(added)} clips added meanwhile"
        num_swept = len(swept)
        time.sleep(20)
    assert num_swept and len(swept) > num_swept  # before the dump, and after the copy
    assert any(not text.startswith("0 ") for text in swept), swept

    moved = tmp_path / "elsewhere"
    copy_checkout(moved)
    shutil.move(stack.checkout / "backup", moved / "backup")
    stack.down()
    elsewhere, began_at = Stack(stack.engine, moved), time.monotonic()
    run_documented_commands(elsewhere, environment, 1)
    report["its restore on an empty stack"] = f"{time.monotonic() - began_at:.0f} s"

    shown = {video["id"] for video in list_videos(http)}
    assert made[-1] not in shown and made[-2] in shown
    assert shown & set(deleted)  # they were deleted during the backup, after the dump
    for video_id in shown:
        assert wait_for_video(http, video_id)["status"] == "completed"
        content = http.get(f"/v1/videos/{video_id}/content")
        assert content.status_code == 200 and content.content[4:8] == b"ftyp", video_id
    threads = http.get("/v1/threads").raise_for_status().json()["data"]
    pictures = []
    for thread in threads:
        artifacts = http.get(f"/v1/threads/{thread['id']}").raise_for_status().json()["artifacts"]
        pictures += [(thread["id"], artifact["key"]) for artifact in artifacts]
    assert pictures
    for thread_id, artifact_key in pictures:
        assert http.get(f"/v1/threads/{thread_id}/artifacts/{artifact_key}").status_code == 200
    report["clips and pictures served after the restore"] = f"{len(shown)} and {len(pictures)}, all that are listed"
    another = http.post("/v1/videos", json=CLIP | {"seed": 77}).raise_for_status().json()["id"]
    assert wait_for_video(http, another)["status"] == "completed"
