"""Two versions on one database: the newest older one works beside this one, and 0.1 does not."""

import json
from pathlib import Path

import httpx
import pytest
from sqlalchemy import text

from omnivideo import Client
from omnivideo.storage.database.engine import create_database_engine
from tests.support.openai_service import wait_until
from tests.support.releases import (
    ADDED_FIELD,
    KEY,
    ROOT,
    VERSION_0_1,
    ReleasedVersion,
    build_later_version,
    find_newest_older_tag,
    install_wheel,
)
from tests.support.servers import postgres

CLIP = {"prompt": "a red ball", "num_inference_steps": 4, "size": "64x64"}


@pytest.fixture(scope="module")
def older_package(tmp_path_factory) -> Path:
    return install_wheel(find_newest_older_tag(), tmp_path_factory.mktemp("older"))


@pytest.fixture(scope="module")
def package_0_1(tmp_path_factory) -> Path:
    return install_wheel(VERSION_0_1, tmp_path_factory.mktemp("version-0-1"))


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request, tmp_path):
    if request.param == "sqlite":
        yield ""
        return
    with postgres(tmp_path / "pg") as address:
        yield address


def fetch_rows(home: Path, database: str, query: str) -> list[tuple]:
    engine = create_database_engine(database or f"sqlite:///{home / 'service.sqlite'}")
    with engine.connect() as connection:
        rows = [tuple(row) for row in connection.execute(text(query))]
    engine.dispose()
    return rows


def wait_for_clip(client: httpx.Client, video_id: str) -> None:
    path = f"/v1/videos/{video_id}"
    wait_until(lambda: client.get(path).json()["status"] == "completed", 120)
    assert client.get(f"{path}/content").content[4:8] == b"ftyp"


def run_turn(client: httpx.Client, thread_id: str, words: str, reader: httpx.Client) -> dict:
    """Run a turn and return it as another version's service reads it."""
    path = f"/v1/threads/{thread_id}/turns"
    turn = client.post(path, json={"text": words, "steps": 2}).raise_for_status().json()

    def read_end() -> dict | None:
        current = reader.get(f"{path}/{turn['id']}").raise_for_status().json()
        return current if current["state"] not in ("queued", "running") else None

    return wait_until(read_end, 120)


@pytest.mark.timeout(900)
def test_the_newest_older_version_works_beside_this_one(older_package, database, tmp_path):
    current, older = ReleasedVersion(ROOT, tmp_path, database), ReleasedVersion(older_package, tmp_path, database)
    assert current.run("migrate").returncode == 0
    with older.serve() as old, current.serve() as new:
        ids = [(old, new)[seed % 2].post("/v1/videos", json=CLIP | {"seed": seed}).json()["id"] for seed in range(8)]
        for seed, video_id in enumerate(ids):  # read by the version that did not take the request
            wait_for_clip((new, old)[seed % 2], video_id)
        thread_id = old.post("/v1/threads").json()["id"]
        turns = [
            run_turn(old, thread_id, "a picture of a red circle", new),
            run_turn(new, thread_id, "make the circle blue", old),
            run_turn(old, thread_id, "make the circle green", new),
            run_turn(new, thread_id, "a picture of a yellow square", old),
        ]
        assert [turn["state"] for turn in turns] == ["done"] * 4, turns
        for client in (old, new):
            thread = client.get(f"/v1/threads/{thread_id}").json()
            assert [turn["number"] for turn in thread["turns"]] == [1, 2, 3, 4] and len(thread["artifacts"]) == 4
    rows = fetch_rows(tmp_path, database, "SELECT state, attempt FROM jobs")
    assert len(rows) == 12 and set(rows) == {("done", 1)}
    assert {attempt for (attempt,) in fetch_rows(tmp_path, database, "SELECT attempt FROM turns")} == {1}
    for version in (current, older):
        assert "Traceback" not in version.log.read_text()


@pytest.mark.timeout(600)
def test_version_0_1_and_this_one_refuse_each_other(package_0_1, database, tmp_path):
    current, first = ReleasedVersion(ROOT, tmp_path, database), ReleasedVersion(package_0_1, tmp_path, database)
    with first.serve():
        for command in ("migrate", "serve"):
            refused = current.run(command)
            assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
            # On PostgreSQL only `migrate` changes tables; `serve` says that it must run first.
            assert "migrate" in refused.stderr and ("0.1" in refused.stderr or (database and command == "serve"))
        assert fetch_rows(tmp_path, database, "SELECT version_num FROM alembic_version") == [("0002",)]
    assert current.run("migrate").returncode == 0
    assert first.run("serve", "--port", "1").returncode != 0  # it does not know the schema, and changes nothing
    assert current.run("keys", "list").returncode == 0


LONG_CLIP = CLIP | {"num_inference_steps": 60, "seed": 7}
IMAGE_LINE = {"custom_id": "a", "method": "POST", "url": "/v1/images/generations", "body": {"prompt": "a red ball"}}
TALK = ["a picture of a red circle; then make it blue", "undo", "what colour is the circle?"]
QUESTION = "a picture of a red blue circle"


def write_everything(client: httpx.Client) -> dict[str, str]:
    """Let a service store a document of each kind, and return the paths at which it can be read."""
    clip_id = client.post("/v1/videos", json=CLIP).raise_for_status().json()["id"]
    wait_for_clip(client, clip_id)
    clip = client.get(f"/v1/videos/{clip_id}/content").content
    files = {"file": ("a.mp4", clip)}
    media = client.post("/v1/files", files=files, data={"purpose": "vision"}).raise_for_status().json()["id"]
    hook = client.post("/v1/webhooks", json={"name": "a", "url": "http://127.0.0.1:9/"}).raise_for_status().json()["id"]
    thread_id = client.post("/v1/threads", json={"id": "talk"}).raise_for_status().json()["id"]
    turns = [run_turn(client, thread_id, words, client) for words in [*TALK, QUESTION]]
    assert [turn["state"] for turn in turns] == ["done"] * len(TALK) + ["asks"], turns
    lines = {"file": ("a.jsonl", json.dumps(IMAGE_LINE).encode())}
    lines_id = client.post("/v1/files", files=lines, data={"purpose": "batch"}).raise_for_status().json()["id"]
    batch = {"input_file_id": lines_id, "endpoint": IMAGE_LINE["url"], "completion_window": "24h"}
    batch_id = client.post("/v1/batches", json=batch).raise_for_status().json()["id"]
    wait_until(lambda: client.get(f"/v1/batches/{batch_id}").json()["status"] == "completed", 120)
    thread = f"/v1/threads/{thread_id}"
    return {
        "clip": f"/v1/videos/{clip_id}", "manifest": f"/v1/videos/{clip_id}/manifest", "file": f"/v1/files/{media}",
        "webhook": f"/v1/webhooks/{hook}", "batch": f"/v1/batches/{batch_id}", "thread": thread,
        "events": f"{thread}/turns/{turns[0]['id']}/events",
    } | {f"turn {number}": f"{thread}/turns/{turn['id']}" for number, turn in enumerate(turns)}  # fmt: skip


@pytest.mark.timeout(900)
def test_documents_with_fields_of_a_later_version_are_read(database, tmp_path):
    """A clip whose settings may have changed is left to workers that know them; everything else goes on here."""
    later_package = build_later_version(tmp_path / "later")
    current, later = ReleasedVersion(ROOT, tmp_path, database), ReleasedVersion(later_package, tmp_path, database)
    for version in (current, later):
        version.environment["OMNIVIDEO_WEBHOOK_HOSTS"] = "127.0.0.1"
    assert current.run("migrate").returncode == 0
    with later.serve() as client:
        paths = write_everything(client)
        assert ADDED_FIELD in client.get(paths["manifest"]).text  # the later version has written it
        sdk = Client(str(client.base_url), api_key=KEY)
        assert len(sdk.open_thread("talk").get_turns()) == len(TALK) and sdk.route("a red ball").kind
        long_clip = client.post("/v1/videos", json=LONG_CLIP).json()["id"]
        wait_until(lambda: client.get(f"/v1/videos/{long_clip}").json()["progress"] > 10, 120)
        later_answers = {name: client.get(path).raise_for_status() for name, path in paths.items()}
    for table in ("jobs", "turns", "turn_events", "workers"):
        assert ADDED_FIELD in str(fetch_rows(tmp_path, database, f"SELECT * FROM {table}")), table
    with current.serve() as client:
        wait_until(lambda: client.get(f"/v1/videos/{long_clip}").json()["status"] == "queued", 60)
        for name, path in paths.items():
            assert client.get(path).status_code == later_answers[name].status_code == 200, (name, client.get(path).text)
        turns = client.get(paths["thread"]).json()["turns"]
        assert len(turns) == len(TALK) and client.get(paths["clip"] + "/content").content[4:8] == b"ftyp"
        assert run_turn(client, "talk", "blue", client)["state"] == "done"
        assert run_turn(client, "talk", "make it green", client)["state"] == "done"
        edit = {"prompt": "make it blue", "num_inference_steps": 2, "video": {"file_id": paths["file"].split("/")[-1]}}
        wait_for_clip(client, client.post("/v1/videos/edits", json=edit).raise_for_status().json()["id"])
        source = {"prompt": "make it red", "video": {"id": paths["clip"].split("/")[-1]}, "num_inference_steps": 2}
        wait_for_clip(client, client.post("/v1/videos/edits", json=source).raise_for_status().json()["id"])
        assert client.get(f"/v1/videos/{long_clip}").json()["status"] == "queued"
    with later.serve() as client:
        wait_for_clip(client, long_clip)
    assert "Traceback" not in current.log.read_text()
