"""A full disk refuses what needs space, says so, loses nothing, and is left behind without a restart."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.conversation_faults import EmbeddedService
from tests.support.openai_service import make_png, wait_until

DISK_BYTES = 24 * 2**20
MOUNT = 'mount -t tmpfs -o size=$1 tmpfs "$2"; shift 2; exec "$@"'
CLIP = {"prompt": "a red ball", "num_inference_steps": 2, "num_frames": 5, "size": "64x64"}


class SmallDisk(EmbeddedService):
    """A service whose folder is a file system of DISK_BYTES in a mount namespace of its own."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.command = ["unshare", "-m", "sh", "-c", MOUNT, "sh", str(DISK_BYTES), str(folder), *self.command]

    @property
    def disk(self) -> Path:
        """The folder as the process sees it."""
        return Path(f"/proc/{self.process.pid}/root{self.folder}")

    def fill(self) -> None:
        with (self.disk / "filler").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    def free(self) -> None:
        (self.disk / "filler").unlink()


@pytest.fixture
def service(tmp_path) -> Iterator[SmallDisk]:
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("a mount namespace needs root: the full disk was not tested")
    service = SmallDisk(tmp_path / "home")
    service.start()
    yield service
    service.kill()
    service.http.close()


def is_refused_with_a_reason(response) -> bool:
    message = response.json()["error"]["message"]
    says_why = "disk is full" in message or "No space left on device" in message
    return response.status_code == 503 and says_why and "Retry-After" in response.headers


@pytest.mark.timeout(300)
def test_a_full_disk_refuses_loses_nothing_and_needs_no_restart(service):
    def post(path: str, **options):
        return service.http.post(path, **options)

    done = post("/v1/videos", json=CLIP).json()["id"]
    wait_until(lambda: service.http.get(f"/v1/videos/{done}").json()["status"] == "completed", 60)
    thread = post("/v1/threads").json()["id"]
    long_clip = post("/v1/videos", json=CLIP | {"num_inference_steps": 200}).json()["id"]
    wait_until(lambda: service.http.get(f"/v1/videos/{long_clip}").json()["status"] == "in_progress", 60)
    service.fill()
    wait_until(lambda: service.http.get("/ready").status_code == 503, 30)
    assert service.http.get("/health").status_code == 200
    picture = {"file": ("a.png", make_png() + bytes(2**20))}
    answers = {
        "ready": service.http.get("/ready"),
        "upload": post("/v1/files", files=picture, data={"purpose": "vision"}),
        "thread": post("/v1/threads"),
        "turn": post(f"/v1/threads/{thread}/turns", json={"text": "a picture of a red circle", "steps": 1}),
    }
    # The database's log may have room that it reuses; what it takes must be completed later.
    clips = [post("/v1/videos", json=CLIP | {"seed": seed}) for seed in range(20)]
    answers |= {f"clip {seed}": clip for seed, clip in enumerate(clips)}
    refused = {name: answer for name, answer in answers.items() if answer.is_error}
    assert {"ready", "upload"} <= set(refused)
    assert all(map(is_refused_with_a_reason, refused.values())), {name: a.text for name, a in refused.items()}
    assert service.http.get(f"/v1/videos/{done}/content").content[4:8] == b"ftyp", "what is stored can be read"
    service.free()
    wait_until(lambda: service.http.get("/ready").status_code == 200, 30)
    if "turn" in refused:
        answers["turn"] = post(f"/v1/threads/{thread}/turns", json={"text": "a picture of a red circle", "steps": 1})
    turn = answers["turn"].json()
    path = f"/v1/threads/{thread}/turns/{turn['id']}"
    wait_until(lambda: service.http.get(path).json()["state"] == "done", 90)
    assert post("/v1/files", files={"file": ("a.png", make_png())}, data={"purpose": "vision"}).status_code == 200
    for clip_id in [long_clip, *(clip.json()["id"] for clip in clips if not clip.is_error)]:
        path = f"/v1/videos/{clip_id}"
        wait_until(lambda path=path: service.http.get(path).json()["status"] == "completed", 90)
    assert "Traceback" not in (service.folder / "api.log").read_text()
