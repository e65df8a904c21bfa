"""Previews: the object store has their images, events refer to them, and the sweep removes them later."""

import asyncio
import base64
import json
import os
import time
from pathlib import Path

from sqlalchemy import Engine, select

from omnivideo.api.event_feed import EventFeed
from omnivideo.contracts import Job, StepProgress, resolve_sampling_params
from omnivideo.presets import TINY
from omnivideo.storage.database.jobs import JobRepository
from omnivideo.storage.database.schema import turn_events
from omnivideo.storage.database.turns import TurnRepository
from omnivideo.storage.objects.local import LocalObjectStore
from omnivideo.turns import TurnRecord
from tests.support.claims import MODEL

PNGS = (b"first png", b"second png")
LIFETIME_SECONDS = 3600.0


def run_turn_with_previews(engine: Engine, store: LocalObjectStore) -> TurnRecord:
    """Create a running turn whose job has shown two previews."""
    turns, jobs = TurnRepository(engine), JobRepository(engine)
    turns.create_thread("thread", "ann")
    turns.create_turn("turn", "thread", "ann", 1, {"text": "a red ball"})
    turn = turns.claim_next_turn(60.0)
    params = resolve_sampling_params(TINY, "text-to-video", seed=1)
    jobs.submit(
        Job(id="thread/1.1.1", prompt="x", visual_tokens=None, source=None, params=params),
        "ann",
    )
    claim = jobs.claim_next_job("worker", MODEL)
    assert turn is not None and claim is not None
    for step, png in enumerate(PNGS, start=1):
        jobs.heartbeat(claim, StepProgress(step=step, steps=2, eta_seconds=0.5), preview=store.put(png, "png"))
    return turn


def stream(engine: Engine, store: LocalObjectStore) -> list[dict[str, str]]:
    """Return the events that a client of an ended turn receives."""

    async def collect() -> list[dict[str, str]]:
        return [message async for message in EventFeed(TurnRepository(engine), store).stream_turn("turn")]

    return asyncio.run(collect())


def age_files(folder: Path) -> None:
    """Make every file look as if it had been written before its lifetime began."""
    past = time.time() - 2 * LIFETIME_SECONDS
    for path in folder.rglob("*"):
        os.utime(path, (past, past))


def test_clients_receive_the_image_and_the_database_stores_its_key(empty_database: Engine, tmp_path: Path) -> None:
    store = LocalObjectStore(tmp_path)
    turn = run_turn_with_previews(empty_database, store)
    TurnRepository(empty_database).end_turn(turn, "done")
    assert stream(empty_database, store)[1::2] == [
        {
            "id": str(number),
            "event": "preview",
            "data": json.dumps({"kind": "preview", "png": base64.b64encode(png).decode()}),
        }
        for number, png in zip((2, 4), PNGS, strict=True)
    ]
    with empty_database.connect() as connection:
        bodies = connection.execute(select(turn_events.c.body).order_by(turn_events.c.number)).scalars().all()
    assert [set(body) for body in bodies[1::2]] == [{"kind", "key"}] * 2


def test_the_sweep_keeps_previews_of_running_turns(empty_database: Engine, tmp_path: Path) -> None:
    store, turns = LocalObjectStore(tmp_path), TurnRepository(empty_database)
    turn = run_turn_with_previews(empty_database, store)
    age_files(tmp_path)
    assert store.sweep(turns.collect_referenced_keys(), LIFETIME_SECONDS) == []
    turns.end_turn(turn, "done")
    assert len(store.sweep(turns.collect_referenced_keys(), LIFETIME_SECONDS)) == len(PNGS)
    assert [message["event"] for message in stream(empty_database, store)] == ["step", "step"]
