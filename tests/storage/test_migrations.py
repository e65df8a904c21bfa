"""A database with the previous schema (0002) is upgraded to the latest one and keeps its rows."""

import json
import sqlite3
from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import psycopg
import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, text

from omnivideo.contracts import Artifact, Job, StepProgress, resolve_sampling_params
from omnivideo.errors import StoreError
from omnivideo.presets import TINY
from omnivideo.storage.database import earlier_version
from omnivideo.storage.database.batches import BatchRepository
from omnivideo.storage.database.engine import create_database_engine, upgrade_schema
from omnivideo.storage.database.files import FileRepository
from omnivideo.storage.database.jobs import JobRepository
from omnivideo.storage.database.keys import APIKeyRepository
from omnivideo.storage.database.turns import TurnRepository
from omnivideo.storage.database.webhooks import WebhookRepository
from omnivideo.turns import ArtifactReady, PlanReady, TextDelta, ThinkingDelta, ThreadRecord, TurnCompleted
from tests.support.claims import MODEL
from tests.support.servers import postgres

OLD_ARTIFACT = {
    "key": "a.mp4", "medium": "video", "width": 64, "height": 64, "frames": 9, "fps": 8.0, "about": "a red ball",
    "manifest": None, "latents": "a.safetensors", "source": None, "made_by": "one",
}  # fmt: skip
ARTIFACT = Artifact(
    key="a.mp4", medium="video", width=64, height=64, frames=9, fps=8, caption="a red ball", latents="a.safetensors",
    created_by="one",
)  # fmt: skip
OLD_GIVEN = {
    "width": 32, "height": None, "frames": None, "fps": None, "steps": 4, "guidance_scale": None, "flow_shift": None,
    "negative_prompt": None,
}  # fmt: skip
OLD_JOB = {
    "id": "open", "task": "video-editing", "prompt": "make it blue", "visual_tokens": None, "source": OLD_ARTIFACT,
    "seed": 1, "given": OLD_GIVEN,
}  # fmt: skip
JOB = Job(
    id="open", prompt="make it blue", visual_tokens=None, source=ARTIFACT,
    params=resolve_sampling_params(TINY, "video-editing", steps=4, seed=1).model_copy(update={"width": 32}),
    preset="tiny",
)  # fmt: skip
OLD_ACT = {"text": "make it blue", "source": "a.mp4"}
OLD_DONE = {
    "act": OLD_ACT, "goal": "edit", "routed": {"kind": "video", "probability": 1.0}, "trace": None,
    "tries": [{"seed": 1, "artifact": OLD_ARTIFACT, "agreement": 0.5}], "artifact": OLD_ARTIFACT, "answer": None,
}  # fmt: skip
OLD_TURN = {
    "number": 1, "text": "make it blue", "attachments": [OLD_ARTIFACT], "asked": [["which one?", "that one"]],
    "done": [OLD_DONE],
}  # fmt: skip
OLD_EVENTS = [
    {"kind": "plan", "plan": {"acts": [OLD_ACT]}},
    {"kind": "thinking", "piece": "let me see"},
    {"kind": "step", "step": 3, "steps": 20, "left": 1.5},
    {"kind": "text", "piece": "a ball"},
    {"kind": "artifact", "artifact": OLD_ARTIFACT, "final": True},
    {"kind": "waiting", "text": "it starts"},
    {"kind": "done", "turn": OLD_TURN},
]
OPTIONS = {"think": "auto", "check": 1, "seed": None, "steps": None, "guidance_scale": None}
OLD_BODY = {"text": "make it blue", "attachments": [OLD_ARTIFACT], "options": OPTIONS, "reply": True}
JOB_COLUMNS = {
    "owner": "ann", "lane": 1, "attempt": 2, "cancel": False,
    "meta": {"size": "64x64", "request": "a digest of 0.1"}, "kind": "video",
    "deleted": False, "announced": False, "step": 3, "steps": 20, "told": 11.0, "turn": 7,
}  # fmt: skip
OLD_ROWS = [
    ("keys", {"id": "key_1", "digest": "d1", "name": "ann", "made": 1.0, "revoked": False}),
    ("jobs", JOB_COLUMNS | {
        "id": "open", "state": "running", "losses": 1, "body": OLD_JOB, "left": 1.5, "preview": "p.png",
        "point": "x.safetensors", "pack": ["open", "other"], "worker": "w", "made": 10.0, "started": 12.0, "beat": 13.0,
    }),
    ("jobs", JOB_COLUMNS | {
        "id": "one", "state": "done", "losses": 0, "body": OLD_JOB | {"id": "one", "source": None}, "left": 0.0,
        "result": OLD_ARTIFACT, "made": 9.0, "started": 10.0, "beat": 10.0, "ended": 20.0,
    }),
    ("files", {
        "id": "file", "owner": "ann", "name": "a", "purpose": "batch", "bytes": 5, "key": "f.bin",
        "artifact": OLD_ARTIFACT, "made": 2.0, "deleted": False,
    }),
    ("batches", {
        "id": "batch", "owner": "ann", "state": "in_progress", "endpoint": "/v1/videos", "input": "file",
        "output": None, "errors": None, "counts": {"total": 2, "completed": 1, "failed": 0}, "meta": {"a": "b"},
        "trouble": [{"code": "x"}], "times": {"in_progress_at": 3}, "runner": "r", "beat": 4.0, "made": 3.0,
    }),
    ("lines", {"batch": "batch", "number": 1, "ok": True, "answer": {"a": 1}}),
    ("threads", {"id": "talk", "owner": "ann", "made": 5.0, "deleted": False}),
    ("turns", {
        "id": "turn", "thread": "talk", "owner": "ann", "state": "running", "number": 1, "cancel": False,
        "body": OLD_BODY, "error": None, "attempt": 1, "beat": 6.0, "made": 5.5,
    }),
    *[("events", {"turn": "turn", "number": at, "body": event, "made": 6.0 + at})
      for at, event in enumerate(OLD_EVENTS, 1)],
    ("events", {"turn": "turn", "number": 8, "body": {"kind": "preview", "png": "aGVsbG8="}, "made": 6.5}),
    ("chats", {"owner": "ann", "digest": "d2", "thread": "talk", "turns": 1, "made": 7.0}),
    ("hooks", {
        "id": "hook", "owner": "ann", "url": "https://a.test/", "secret": "s", "name": "a", "events": ["x"],
        "made": 8.0,
    }),
    ("deliveries", {"id": "event", "hook": "hook", "body": {"created_at": 1}, "tries": 1, "due": 0.0, "done": False}),
]  # fmt: skip


def insert_old_row(connection, table: str, row: dict) -> None:
    values = {name: json.dumps(value) if isinstance(value, dict | list) else value for name, value in row.items()}
    columns = ", ".join(f'"{name}"' for name in values)
    places = ", ".join(f":{name}" for name in values)
    connection.execute(text(f'INSERT INTO "{table}" ({columns}) VALUES ({places})'), values)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def upgraded_engine(request, tmp_path_factory):
    def fill_and_upgrade(address: str):
        engine = create_database_engine(address)
        upgrade_schema(engine, "0002")
        with engine.connect() as connection:
            for table, row in OLD_ROWS:
                insert_old_row(connection, table, row)
        upgrade_schema(engine, preset=TINY)
        return engine

    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "sqlite":
        yield fill_and_upgrade(f"sqlite:///{folder}/service.db")
        return
    with postgres(folder) as address:
        yield (engine := fill_and_upgrade(address))
        engine.dispose()


def test_jobs_are_kept(upgraded_engine):
    jobs = JobRepository(upgraded_engine)
    seen = jobs.get_status("open")
    assert seen.job == JOB
    assert (seen.owner, seen.lane, seen.state, seen.attempt, seen.worker_losses) == ("ann", "batch", "running", 2, 1)
    assert (seen.step, seen.steps, seen.eta_seconds, seen.preview) == (3, 20, 1.5, "p.png")
    assert (seen.created_at, seen.started_at, seen.ended_at, seen.meta) == (10.0, 12.0, None, {"size": "64x64"})
    done = jobs.get_status("one")
    assert (done.state, done.result, done.ended_at, done.job.source) == ("done", ARTIFACT, 20.0, None)
    assert jobs.submit(JOB, "ann") is None  # it is the same job
    assert jobs.requeue_lost_jobs(5.0) == ["open"]
    claim = jobs.claim_next_job("w", MODEL)
    # After two lost workers, the job is rendered alone and from the beginning.
    assert (claim.job, claim.attempt, claim.resume_key, claim.batch_job_ids) == (JOB, 3, None, ())


def test_keys_files_batches_and_webhooks_are_kept(upgraded_engine):
    batches = BatchRepository(upgraded_engine)
    (key,) = APIKeyRepository(upgraded_engine).list_keys()
    assert (key.id, key.name, key.created_at, key.revoked) == ("key_1", "ann", 1.0, False)
    assert (key.scopes, key.expires_at, key.own_limits) == (("read", "generate"), None, {})
    file = FileRepository(upgraded_engine).get_file("file", "ann")
    assert (file.size_bytes, file.object_key, file.created_at) == (5, "f.bin", 2.0)
    assert Artifact(**file.artifact) == ARTIFACT
    row = batches.get_batch("batch", "ann")
    assert (row.state, row.input_file_id, row.output_file_id, row.error_file_id) == ("in_progress", "file", None, None)
    assert (row.metadata, row.validation_errors, row.state_times) == (
        {"a": "b"}, [{"code": "x"}], {"in_progress_at": 3}
    )  # fmt: skip
    assert (row.counts["total"], row.runner_name, row.heartbeat_at, row.created_at) == (2, "r", 4.0, 3.0)
    assert batches.get_batch_input_key("batch") == "f.bin" and batches.load_line_results("batch") == {1: True}
    assert [line.output_line for line in batches.list_line_outcomes("batch", 0, 9)] == [{"a": 1}]
    assert batches.claim_batch("second", 5.0).id == "batch"
    ((delivery, hook),) = WebhookRepository(upgraded_engine).claim_due_deliveries(9, 60.0)
    assert (delivery.id, delivery.attempts, delivery.body) == ("event", 2, {"created_at": 1})
    assert (hook.id, hook.event_types, hook.created_at) == ("hook", ["x"], 8.0)


def test_events_with_preview_images_are_dropped(upgraded_engine: Engine) -> None:
    events = TurnRepository(upgraded_engine).list_events("turn")
    assert len(events) == len(OLD_EVENTS) and all(event["kind"] != "preview" for _, event in events)


def test_a_downgrade_is_refused(upgraded_engine: Engine) -> None:
    scripts = ScriptDirectory(str(resources.files("omnivideo.storage.database") / "migrations"))
    for revision in scripts.walk_revisions():
        with pytest.raises(StoreError, match="its schema cannot be downgraded; restore the backup"):
            revision.module.downgrade()


def test_the_schema_of_a_later_version_is_not_changed(tmp_path: Path) -> None:
    engine = create_database_engine(f"sqlite:///{tmp_path / 'later.sqlite'}")
    upgrade_schema(engine)
    with engine.connect() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    upgrade_schema(engine)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar() == "9999"
    engine.dispose()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_database_that_version_0_1_uses_is_not_converted(kind: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(earlier_version, "WAIT_SECONDS", 0.3)

    def convert(address: str, connect: Callable[[], sqlite3.Connection | psycopg.Connection]) -> None:
        engine = create_database_engine(address)
        upgrade_schema(engine, "0002")
        idle = connect()  # as version 0.1 connects: without a name
        idle.execute("SELECT * FROM jobs")
        idle.commit()
        with pytest.raises(StoreError, match=r"processes of version 0\.1 use it, .* stop them, then run"):
            upgrade_schema(engine, preset=TINY)
        idle.close()
        upgrade_schema(engine, preset=TINY)
        idle = connect()
        upgrade_schema(engine)  # a database of this version may be in use
        idle.close()
        engine.dispose()

    if kind == "sqlite":
        file = tmp_path / "service.sqlite"
        convert(f"sqlite:///{file}", partial(sqlite3.connect, file))
        return
    with postgres(tmp_path / "pg") as address:
        convert(address, partial(psycopg.connect, address))


def test_the_scripts_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []
    initialize = ScriptDirectory.__init__

    def record_folder(scripts: ScriptDirectory, folder: str, *args: Any, **options: Any) -> None:
        folders.append(folder)
        initialize(scripts, folder, *args, **options)

    monkeypatch.setattr(ScriptDirectory, "__init__", record_folder)
    engine = create_database_engine(f"sqlite:///{tmp_path / 'service.sqlite'}")
    for expected_count in (1, 2):
        upgrade_schema(engine)
        assert len(folders) == expected_count
    engine.dispose()


def test_threads_turns_and_events_are_kept(upgraded_engine):
    repository = TurnRepository(upgraded_engine)
    assert repository.list_threads("ann") == ([ThreadRecord(id="talk", public_id="talk", created_at=5.0)], False)
    turn = repository.get_turn("turn", "ann")
    assert (turn.thread_id, turn.state, turn.number, turn.attempt, turn.created_at) == ("talk", "running", 1, 1, 5.5)
    assert turn.body == {
        "text": "make it blue", "attachments": [ARTIFACT.model_dump()], "options": OPTIONS, "is_reply": True
    }  # fmt: skip
    numbers, events = zip(*repository.list_events("turn"), strict=True)
    assert numbers == (1, 2, 3, 4, 5, 6, 7) and events[5] == OLD_EVENTS[5]
    assert PlanReady(**events[0]).plan.actions[0].source == "a.mp4"
    assert ThinkingDelta(**events[1]).delta == "let me see"
    assert StepProgress(**events[2]) == StepProgress(step=3, steps=20, eta_seconds=1.5)
    assert TextDelta(**events[3]).delta == "a ball"
    assert ArtifactReady(**events[4]).artifact == ARTIFACT
    turn = TurnCompleted(**events[6]).turn
    assert turn.attachments == (ARTIFACT,) and turn.clarifications == (("which one?", "that one"),)
    (result,) = turn.results
    assert (result.action.text, result.route.kind, result.artifact) == ("make it blue", "video", ARTIFACT)
    assert (result.candidates[0].artifact, result.candidates[0].agreement) == (ARTIFACT, 0.5)
    assert repository.find_chat_thread("ann", "d2") == ("talk", 1)
    assert repository.claim_next_turn(5.0).id == "turn"
