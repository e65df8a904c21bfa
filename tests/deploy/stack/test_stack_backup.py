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


class Load:
    """What users do, and what the sweep does every hour, at once; `made` are the clips that are deleted one by one."""

    def __init__(self, stack: Stack, http: httpx.Client, made: list[str]):
        self.stack, self.http, self.made = stack, http, made
        self.deleted, self.added, self.swept = list[str](), list[str](), list[str]()

    def add_clip(self) -> None:
        answer = self.http.post("/v1/videos", json=CLIP | {"seed": 1000 + len(self.added)}).raise_for_status()
        self.added.append(answer.json()["id"])
        time.sleep(1.5)

    def chat(self) -> None:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "a picture of a green square"}]}
        self.http.post("/v1/chat/completions", json=body).raise_for_status()

    def delete_clip(self) -> None:
        if len(self.deleted) < len(self.made) - 2:
            video_id = self.made[len(self.deleted)]
            self.http.delete(f"/v1/videos/{video_id}").raise_for_status()
            self.deleted.append(video_id)
        time.sleep(4)

    def sweep(self) -> None:
        """Sweep in the sweep's container, as long as it runs."""
        command = ["/usr/bin/docker", "exec", self.stack.name("sweep"), "omnivideo", "sweep"]
        done = subprocess.run(command, env=self.stack.engine.environment, capture_output=True, text=True, check=False)
        self.swept.extend([done.stdout] if done.returncode == 0 else [])
        time.sleep(1)


def check_that_everything_listed_is_served(http: httpx.Client) -> tuple[set[str], int]:
    """Wait for what still ran; return the ids of the listed clips, and the number of pictures in threads."""
    shown = {video["id"] for video in list_videos(http)}
    for video_id in shown:
        assert wait_for_video(http, video_id)["status"] == "completed"
        content = http.get(f"/v1/videos/{video_id}/content")
        assert content.status_code == 200 and content.content[4:8] == b"ftyp", video_id
    pictures = []
    for thread in http.get("/v1/threads").raise_for_status().json()["data"]:
        artifacts = http.get(f"/v1/threads/{thread['id']}").raise_for_status().json()["artifacts"]
        pictures += [(thread["id"], artifact["key"]) for artifact in artifacts]
    for thread_id, artifact_key in pictures:
        assert http.get(f"/v1/threads/{thread_id}/artifacts/{artifact_key}").status_code == 200
    return shown, len(pictures)


@pytest.mark.timeout(1800, func_only=True)
def test_a_backup_taken_under_load_serves_every_clip_elsewhere(stack, http, environment, report, tmp_path):
    """Clips and chats are made, clips are deleted and sweeps run, all during the backup."""
    made = [str(http.post("/v1/videos", json=CLIP | {"seed": seed}).json()["id"]) for seed in range(30)]
    for video_id in made:
        assert wait_for_video(http, video_id)["status"] == "completed"
    make_everything_old(stack, made)
    http.delete(f"/v1/videos/{made[-1]}").raise_for_status()
    load, began_at = Load(stack, http, made), time.monotonic()
    with repeat_in_threads(load.add_clip, load.chat, load.delete_clip, load.sweep):
        time.sleep(10)
        run_documented_commands(stack, environment, 0, PAUSE)
        seconds, num_swept = time.monotonic() - began_at, len(load.swept)
        report["a backup under load"] = f"{seconds:.0f} s, {len(load.added)} clips added meanwhile"
        time.sleep(20)
    assert num_swept and len(load.swept) > num_swept  # before the dump, and after the copy
    assert any(not text.startswith("0 ") for text in load.swept), load.swept

    moved = tmp_path / "elsewhere"
    copy_checkout(moved)
    shutil.move(stack.checkout / "backup", moved / "backup")
    stack.down()
    began_at = time.monotonic()
    run_documented_commands(Stack(stack.engine, moved), environment, 1)
    report["its restore on an empty stack"] = f"{time.monotonic() - began_at:.0f} s"

    shown, num_pictures = check_that_everything_listed_is_served(http)
    assert made[-1] not in shown and made[-2] in shown and num_pictures
    assert shown & set(load.deleted)  # they were deleted during the backup, after the dump
    report["clips and pictures served after the restore"] = f"{len(shown)} and {num_pictures}, all that are listed"
    another = http.post("/v1/videos", json=CLIP | {"seed": 77}).raise_for_status().json()["id"]
    assert wait_for_video(http, another)["status"] == "completed"
