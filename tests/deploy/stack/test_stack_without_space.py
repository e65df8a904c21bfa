"""The disk of the store, and that of the database, are full for a while."""

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest

from tests.deploy.stack.compose import Stack
from tests.deploy.stack.documented import read_blocks
from tests.deploy.stack.requests import begin_clip, make_everything_old, read_job, wait_for_video
from tests.support.openai_service import wait_until

CLIP = {"prompt": "a red ball", "num_inference_steps": 4, "size": "64x64"}
FOLDERS = {"s3": "/var/lib/garage/data", "postgres": "/var/lib/postgresql/data"}
VOLUMES = {"s3": "omnivideo_s3-data", "postgres": "omnivideo_postgres"}


@contextmanager
def run_on_small_volume(stack: Stack, service: str, size: str) -> Iterator[Callable[[bool], None]]:
    """Run the stack with a volume of this size; yield a function that fills it, or frees what it has filled."""
    stack.down()
    options = ["type=tmpfs", "device=tmpfs", f"o=size={size},mode=0777"]
    names = [word for option in options for word in ("--opt", option)]
    stack.engine.run_docker("volume", "create", "--driver", "local", *names, VOLUMES[service])
    image, folder = stack.services["redis"]["image"], FOLDERS[service]
    # It keeps the memory mounted while the server restarts.
    run = ["run", "--detach", "--name", "holder", "--volume", f"{VOLUMES[service]}:{folder}", image]
    stack.engine.run_docker(*run, "sleep", "infinity")
    if service == "postgres":
        stack.engine.execute("holder", "chown", "postgres", folder)

    def fill(is_full: bool) -> None:
        command = f"dd if=/dev/zero of={folder}/filler bs=4k || true" if is_full else f"rm {folder}/filler"
        stack.engine.execute("holder", "sh", "-c", command)

    try:
        stack.up()
        yield fill
    finally:
        stack.engine("DELETE", "/containers/holder?force=1", missing_ok=True)
        stack.down()


def check_refusal(answer: httpx.Response) -> None:
    """Check that a request was refused in one line, with when to send it again."""
    message = answer.json()["error"]["message"]
    assert answer.status_code == 503 and int(answer.headers["Retry-After"]) > 0 and "\n" not in message, answer.text


def submit_until_refused(http: httpx.Client) -> list[str]:
    """Submit clips until one is refused; return the ids of the others."""
    accepted = list[str]()
    while (answer := http.post("/v1/videos", json=CLIP | {"seed": 1000 + len(accepted)})).status_code == 200:
        accepted.append(str(answer.json()["id"]))
        assert len(accepted) < 200
    check_refusal(answer)
    return accepted


def upload_file(http: httpx.Client) -> httpx.Response:
    file = ("notes.txt", secrets.token_bytes(2**20))
    return http.post("/v1/files", data={"purpose": "user_data"}, files={"file": file})


@pytest.mark.timeout(900, func_only=True)  # not for building the images
def test_a_full_store_loses_no_clip(stack, http, report):
    """Uploads are refused; what can be read is served; a sweep removes objects; with space again, all clips go on."""
    (sweep,) = read_blocks("Troubleshooting")
    with run_on_small_volume(stack, "s3", "64m") as fill:
        made = [str(http.post("/v1/videos", json=CLIP | {"seed": seed}).json()["id"]) for seed in range(4)]
        for video_id in made:
            assert wait_for_video(http, video_id)["status"] == "completed"
        make_everything_old(stack, made)
        video_id = begin_clip(http)
        fill(True)
        check_refusal(upload_file(http))
        wait_until(lambda: http.get("/ready").status_code == 503, 60)
        # Clips are accepted: only their results need the store.
        accepted = [str(http.post("/v1/videos", json=CLIP | {"seed": seed}).json()["id"]) for seed in (1000, 1001)]
        assert http.get(f"/v1/videos/{made[0]}/content").content[4:8] == b"ftyp"
        for name in made[1:]:
            assert http.delete(f"/v1/videos/{name}").status_code == 200
        # As documented: Garage needs a little space to record deletions.
        stack.engine.execute("holder", "truncate", "--size=-1M", f"{FOLDERS['s3']}/filler")
        text = stack.run(sweep)
        assert int(text.split()[0]) >= 3, text
        report["a full store"] = (
            f"uploads get 503 with Retry-After, clips wait; a sweep still removes objects ({text.strip()})"
        )
        assert wait_for_video(http, video_id, ("in_progress", "queued", "completed"))
        fill(False)
        for name in (video_id, *accepted):
            assert wait_for_video(http, name)["status"] == "completed"
            assert read_job(stack, name)[2] == 0
        wait_until(lambda: http.get("/ready").status_code == 200, 60)


@pytest.mark.timeout(900, func_only=True)  # not for building the images
def test_a_full_disk_of_the_database_loses_no_clip(stack, http, report):
    """PostgreSQL cannot write: requests are refused, and once there is space everything goes on by itself."""
    with run_on_small_volume(stack, "postgres", "256m") as fill:
        done = str(http.post("/v1/videos", json=CLIP).json()["id"])
        assert wait_for_video(http, done)["status"] == "completed"
        video_id = begin_clip(http)
        fill(True)
        accepted = submit_until_refused(http)
        fill(False)
        stack.wait(stack.name("postgres"), "service_healthy")
        for name in (done, video_id, *accepted):
            assert wait_for_video(http, name)["status"] == "completed"
            assert read_job(stack, name)[2] == 0
        report["a full disk of the database"] = f"503 with Retry-After; {len(accepted) + 2} clips are done afterwards"
