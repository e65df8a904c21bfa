"""After a user has deleted everything, no byte of the user's words or clips is left: database, store, logs."""

import json
import logging
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from omnivideo.cli.logs import JSONLogFormatter
from omnivideo.models.omni import OmniVideoModel
from omnivideo.wiring import ServiceWiring
from tests.support.api_server import build_scripted_wiring, run_api_server
from tests.support.elapsed_time import pass_time
from tests.support.openai_service import make_mp4, make_png, wait_until
from tests.support.servers import postgres, postgres_programs
from tests.support.twins import ScriptedMLLM

MARKER = "zyxquark"  # in every word of the user
KEY = "an-admin-key-for-tests"
QUICK = {"num_inference_steps": 1, "num_frames": 5, "size": "32x32"}
TWO_HOURS = 7200.0


class FailingMLLM(ScriptedMLLM):
    """Raises an unexpected exception that quotes a user if it is told to fail."""

    fails = False

    def stream_text(self, request):
        if self.fails:
            raise RuntimeError(f"cannot read {MARKER}")
        return super().stream_text(request)


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Write the log of everything into a file, as a service does."""
    handler, root = logging.FileHandler(path), logging.getLogger()
    handler.setFormatter(JSONLogFormatter())
    handler.addFilter(lambda record: not record.name.startswith("http"))  # the client of this test
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()


class Home:
    """A service over a folder and a database, with everything that it writes."""

    def __init__(self, folder: Path, omni: OmniVideoModel, database: str):
        self.folder, self.database = folder, database
        self.wiring: ServiceWiring = build_scripted_wiring(
            folder / "home", omni, admin_key=KEY, database=database, public_url="http://video.test"
        )
        self.wiring.mllm.script = FailingMLLM()  # type: ignore[attr-defined]
        context = self.wiring.start_background_services(self.wiring.build_service_context())
        context.check_webhook_url = lambda url: None
        self.wiring.build_service_context = lambda: context  # type: ignore[method-assign]

    @property
    def store_folder(self) -> Path:
        return self.folder / "home" / "store"

    def find_marker(self, marker: str = MARKER) -> list[str]:
        """Return the names of the files, and of the rows of a dump, that contain the marker."""
        found = [
            path.name for path in sorted(self.folder.rglob("*"))
            if path.is_file() and (marker.encode() in path.read_bytes() or marker in path.name)
        ]  # fmt: skip
        if self.database:
            dump = subprocess.run(
                [postgres_programs() / "pg_dump", self.database], capture_output=True, check=True, text=True
            )
            found += [line[:200] for line in dump.stdout.splitlines() if marker in line]
        return found

    def list_objects(self) -> list[str]:
        return [path.name for path in self.store_folder.rglob("*") if path.is_file()]

    def sweep(self) -> None:
        pass_time(self.wiring.engine, self.store_folder, TWO_HOURS)
        self.wiring.sweep()


@pytest.fixture(params=["sqlite", "postgresql"])
def home(request: pytest.FixtureRequest, tmp_path: Path, omni: OmniVideoModel) -> Iterator[Home]:
    if request.param == "sqlite":
        yield Home(tmp_path / "files", omni, "")
        return
    with postgres(tmp_path / "postgres") as address:
        yield Home(tmp_path / "files", omni, address)


def wait_for(http: httpx.Client, path: str, *states: str) -> dict:
    """Wait until a turn, a video or a batch has ended, and check how."""
    key = "status" if "/turns/" not in path else "state"
    ends = ("done", "asks", "failed", "cancelled", "completed", "expired")
    found = wait_until(lambda: (found := http.get(path).json())[key] in ends and found)
    assert found[key] in states, found
    return found


def run_turn(http: httpx.Client, thread: str, text: str, state: str = "", **fields: object) -> None:
    """Run a turn in a thread with the marker in its id; `state` is how it must end, if that matters."""
    http.post("/v1/threads", json={"id": f"{MARKER}-{thread}"})
    path = f"/v1/threads/{MARKER}-{thread}/turns"
    turn = http.post(path, json={"text": text, "steps": 3} | fields).json()["id"]
    wait_for(http, f"{path}/{turn}", *([state] if state else ["done", "asks"]))


def say_and_make_everything(http: httpx.Client, script: FailingMLLM) -> list[str]:
    """Send the marker in every field that a user fills, and return the paths to delete."""
    upload = http.post(
        "/v1/files", files={"file": (f"{MARKER}.png", make_png())}, data={"purpose": "vision"}
    ).json()["id"]  # fmt: skip
    run_turn(http, "words", f"a red ball; what is {MARKER}?", check=2)
    run_turn(http, "thread", "a red ball", check=2)
    run_turn(http, "thread", "make it blue")
    script.fails = True
    run_turn(http, "thread", "how many balls are there?", state="failed")
    script.fails = False
    run_turn(http, "thread", "how many balls are there?", attachments=[{"file_id": upload}])
    http.post(f"/v1/threads/{MARKER}-thread/forks", json={"after_turn": 1, "id": f"{MARKER}-fork"})
    turns = f"/v1/threads/{MARKER}-fork/turns"
    cancelled = http.post(turns, json={"text": f"a green star; what is {MARKER}?", "steps": 200}).json()["id"]
    http.post(f"{turns}/{cancelled}/cancel")
    paths = [f"/v1/files/{upload}"]
    document = http.post(
        "/v1/files", files={"file": (f"{MARKER}.txt", MARKER.encode() * 99)}, data={"purpose": "user_data"}
    ).json()  # fmt: skip
    paths.append(f"/v1/files/{document['id']}")

    headers = {"Idempotency-Key": MARKER}
    video = http.post("/v1/videos", json={"prompt": f"a {MARKER}", "negative_prompt": MARKER} | QUICK, headers=headers)
    edit = http.post(
        "/v1/videos/edits", files={"video": ("a.mp4", make_mp4())}, data={"prompt": MARKER, "num_inference_steps": "1"}
    )
    for response in (video, edit):
        paths.append(f"/v1/videos/{response.json()['id']}")
        wait_for(http, paths[-1], "completed")
    image = http.post("/v1/images/generations", json={"prompt": MARKER, "size": "32x32", "num_inference_steps": 1})
    paths.append(f"/v1/images/{image.json()['id']}")

    messages = [{"role": "system", "content": MARKER}, {"role": "user", "content": f"a yellow {MARKER}"}]
    chat = http.post("/v1/chat/completions", json={"model": "tiny", "messages": messages, "steps": 2})
    assert chat.status_code == 200, chat.text
    response = http.post(
        "/v1/responses", json={"model": "tiny", "input": f"a ball {MARKER}", "metadata": {"a": MARKER}}
    )
    assert response.status_code == 200, response.text
    hook = http.post("/v1/webhooks", json={"url": f"https://{MARKER}.test/", "name": MARKER}).json()["id"]
    paths.append(f"/v1/webhooks/{hook}")
    paths += run_batches(http)
    for path in (f"/v1/threads/{MARKER}", f"/v1/videos/{MARKER}?after={MARKER}", f"/{MARKER}"):
        assert http.get(path).status_code == 404
    assert http.post("/v1/videos", json={"prompt": MARKER, MARKER: 1}).status_code == 400
    return paths + [f"/v1/threads/{item['id']}" for item in http.get("/v1/threads?limit=100").json()["data"]]


def run_batches(http: httpx.Client) -> list[str]:
    paths = []
    bodies = {
        "/v1/videos": {"prompt": MARKER} | QUICK,
        "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": f"a {MARKER}"}], "steps": 2},
    }
    for endpoint, body in bodies.items():
        lines = [
            json.dumps({"custom_id": f"{MARKER}-{number}", "method": "POST", "url": endpoint, "body": body}).encode()
            for number in range(2)
        ]
        file = http.post(
            "/v1/files", files={"file": ("lines.jsonl", b"\n\n".join(lines))}, data={"purpose": "batch"}
        ).json()  # fmt: skip
        fields = {"input_file_id": file["id"], "endpoint": endpoint, "completion_window": "24h"}
        batch = http.post("/v1/batches", json=fields | {"metadata": {"a": MARKER}}).json()
        paths += [f"/v1/files/{file['id']}", f"/v1/batches/{batch['id']}"]
        ended = wait_for(http, paths[-1], "completed")
        assert ended["request_counts"] == {"total": 2, "completed": 2, "failed": 0}
    return paths


def test_nothing_is_left_of_what_a_user_has_deleted(home: Home) -> None:
    log_path = home.folder / "service.log"
    home.folder.mkdir(exist_ok=True)
    with log_to(log_path), run_api_server(home.wiring) as address:
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=address, headers=headers, timeout=60, trust_env=False) as http:
            paths = say_and_make_everything(http, home.wiring.mllm.script)  # type: ignore[attr-defined]
            assert MARKER not in log_path.read_text(), "a log never contains a user's words"
            assert "RuntimeError" in log_path.read_text()
            home.sweep()
            assert len(home.find_marker()) > 3 and home.list_objects(), "the sweep keeps what was not deleted"
            for path in paths:
                deleted = http.delete(path)
                assert deleted.status_code == 200, f"{path}: {deleted.text}"
                assert http.get(path).status_code in (404, 405)
            home.sweep()
            home.sweep()
            assert home.find_marker() == []
            assert home.list_objects() == []
            again = http.post("/v1/threads", json={"id": f"{MARKER}-thread"})
            assert again.status_code == 201, "the id is free again"


def respond(http: httpx.Client, text: str, **fields: object) -> dict:
    body = {"model": "tiny", "input": text, "steps": 1, "seed": 3} | fields
    return http.post("/v1/responses", json=body).raise_for_status().json()


def test_nothing_is_left_of_deleted_responses(home: Home) -> None:
    """The last response of a thread goes, and the thread continues from the one before it."""
    words = [f"{MARKER}{number}" for number in range(5)]
    with run_api_server(home.wiring) as address:
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=address, headers=headers, timeout=60, trust_env=False) as http:
            first = respond(http, f"a red ball; what is {words[0]}?")["id"]
            second = respond(http, f"a green star; what is {words[1]}?", previous_response_id=first)["id"]
            third = respond(http, f"what is {words[2]}?", previous_response_id=second)["id"]
            open_response = respond(http, f"a ball; what is {words[3]}?", background=True, steps=200)["id"]
            refused = http.delete(f"/v1/responses/{second}")
            assert refused.status_code == 409 and "later turns continue" in refused.text
            for response_id in (third, second, open_response):
                deleted = http.delete(f"/v1/responses/{response_id}")
                assert deleted.json() == {"id": response_id, "object": "response", "deleted": True}, deleted.text
                assert http.get(f"/v1/responses/{response_id}").status_code == 404
                assert http.delete(f"/v1/responses/{response_id}").status_code == 404
            num_objects = len(home.list_objects())
            home.sweep()
            home.sweep()
            assert [home.find_marker(word) for word in words[1:4]] == [[], [], []] and home.find_marker(words[0])
            assert 0 < len(home.list_objects()) < num_objects, "only the first clip is left"
            assert len(http.get("/v1/threads").json()["data"]) == 1
            fourth = respond(http, f"how many {words[4]}?", previous_response_id=first)
            assert fourth["status"] == "completed"
            for response_id in (fourth["id"], first):
                assert http.delete(f"/v1/responses/{response_id}").status_code == 200
            home.sweep()
            home.sweep()
            assert home.find_marker() == [] and home.list_objects() == []
            assert http.get("/v1/threads").json()["data"] == []


def test_a_deletion_whose_process_is_killed_is_repeated(home: Home) -> None:
    with run_api_server(home.wiring) as address:
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=address, headers=headers, timeout=60, trust_env=False) as http:
            first = respond(http, "a red ball")["id"]
            second = respond(http, "how many balls are there?", previous_response_id=first)["id"]
            turn = home.wiring.turns.get_turn(f"turn_{second.removeprefix('resp_')}", "admin")
            assert turn is not None and home.wiring.turns.begin_deletion(turn)
            assert http.post(f"/v1/threads/{turn.thread_id}/turns", json={"text": "a ball"}).status_code == 409
            pass_time(home.wiring.engine, home.store_folder, 60.0)
            wait_until(lambda: http.get(f"/v1/responses/{second}").json()["status"] == "failed")
            assert http.delete(f"/v1/responses/{second}").status_code == 200
            thread = http.get(f"/v1/threads/{turn.thread_id}").json()
            assert len(thread["turns"]) == 1 and respond(http, "a ball", previous_response_id=first)["id"]
