"""Two versions on one database: the newest older one works beside this one, and 0.1 does not."""

from pathlib import Path

import httpx
import pytest
from sqlalchemy import text

from omnivideo.storage.database.engine import create_database_engine
from tests.support.openai_service import wait_until
from tests.support.releases import ROOT, VERSION_0_1, ReleasedVersion, find_newest_older_tag, install_wheel
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
