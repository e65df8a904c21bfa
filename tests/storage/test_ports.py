"""The ports JobStore and TurnStore, method by method: their in-memory twins behave as the databases do."""

import asyncio
import threading

import pytest
from sqlalchemy import Engine

from omnivideo.contracts import Artifact, Job, resolve_sampling_params
from omnivideo.errors import InvalidInput, ServiceBusy
from omnivideo.ports import JobStore, TurnStore
from omnivideo.presets import TINY
from omnivideo.storage.database.engine import create_memory_database
from omnivideo.storage.database.jobs import JobRepository
from omnivideo.storage.database.turns import TurnRepository
from tests.support.claims import MODEL
from tests.support.slow_polls import slow_polls

ARTIFACT = Artifact(key="a.mp4", medium="video", width=64, height=64, frames=9, fps=8, caption="x", created_by="one")


def build_job(job_id: str, prompt: str = "a red ball") -> Job:
    params = resolve_sampling_params(TINY, "text-to-video", seed=1)
    return Job(id=job_id, prompt=prompt, visual_tokens=None, source=None, params=params)


def test_a_job_store_submits_lists_and_counts(empty_database: Engine) -> None:
    store: JobStore = JobRepository(empty_database, max_open_jobs=3)
    submitted = store.submit(build_job("one"), "ann", kind="video", meta={"size": "64x64"})
    assert submitted is not None and submitted == store.get_status("one")
    assert (submitted.owner, submitted.state, submitted.kind, submitted.meta) == (
        "ann", "queued", "video", {"size": "64x64"}
    )  # fmt: skip
    assert store.submit(build_job("one"), "ann", kind="video") is None
    with pytest.raises(InvalidInput, match="id"):
        store.submit(build_job("one", "a blue ball"), "ann")
    store.submit(build_job("two"), "ann", kind="video")
    store.submit(build_job("three"), "bob", lane="batch")
    with pytest.raises(ServiceBusy):
        store.submit(build_job("four"), "bob")
    assert store.get_status("four") is None
    assert {status.id for status in store.list_statuses(["one", "three", "four"])} == {"one", "three"}
    assert store.count_queued() == 3 and store.get_oldest_wait_seconds() >= 0
    assert sorted(store.count_by_lane_and_state()) == [("batch", "queued", 1), ("interactive", "queued", 2)]
    page, has_more = store.list_owned_jobs("ann", "video", None, 1, newest_first=False)
    assert [status.id for status in page] == ["one"] and has_more
    page, has_more = store.list_owned_jobs("ann", "video", "one", 1, newest_first=False)
    assert [status.id for status in page] == ["two"] and not has_more


def test_a_job_store_cancels_and_deletes(empty_database: Engine) -> None:
    store: JobStore = JobRepository(empty_database)
    for job_id in ("a.1", "a.2", "b.1"):
        store.submit(build_job(job_id), "ann", kind="video")
    store.cancel("b.1")
    store.cancel_by_prefix("bob", "a.")
    assert store.count_queued() == 2
    store.cancel_by_prefix("ann", "a.")
    assert {status.state for status in store.list_statuses(["a.1", "a.2", "b.1"])} == {"cancelled"}
    assert store.get_owned_job("b.1", "bob", "video") is None and store.get_owned_job("b.1", "ann", "video")
    assert not store.delete_owned_job("b.1", "bob", "video") and store.delete_owned_job("b.1", "ann", "video")
    assert store.get_owned_job("b.1", "ann", "video") is None


def test_a_job_store_notifies_of_ends(empty_database: Engine) -> None:
    with slow_polls():
        jobs = JobRepository(empty_database)
        store: JobStore = jobs
        store.submit(build_job("one"))
        claim = jobs.claim_next_job("worker", MODEL)
        assert claim is not None

        async def wait_for_end() -> str | None:
            with store.watch_ends(["one"]) as watch:
                worker = threading.Timer(0.2, jobs.mark_done, (claim, ARTIFACT))
                worker.start()
                while (status := store.get_status("one")) is not None and status.state != "done":
                    await watch.receive(20)
                worker.join()
                return status and status.result and status.result.key

        assert asyncio.run(wait_for_end()) == "a.mp4"


def test_a_turn_store_keeps_threads_and_chats(empty_database: Engine) -> None:
    store: TurnStore = TurnRepository(empty_database)
    store.create_thread("talk", "ann")
    with pytest.raises(InvalidInput, match="thread"):
        store.create_thread("talk", "bob")
    assert store.has_thread("talk", "ann") and not store.has_thread("talk", "bob")
    assert [thread.id for thread in store.list_threads("ann")[0]] == ["talk"]
    assert store.list_threads("bob") == ([], False)
    store.delete_thread("talk")
    assert not store.has_thread("talk", "ann") and store.list_threads("ann") == ([], False)
    assert store.find_chat_thread("ann", "digest") is None
    for turn_count in (1, 2):
        store.save_chat_thread("ann", "digest", "talk", turn_count)
    assert store.find_chat_thread("ann", "digest") == ("talk", 2) and store.find_chat_thread("bob", "digest") is None


def test_a_turn_store_runs_one_turn_of_a_thread(empty_database: Engine) -> None:
    store: TurnStore = TurnRepository(empty_database)
    store.create_thread("talk", "ann")
    created = store.create_turn("turn", "talk", "ann", 1, {"text": "a ball"})
    assert created is not None and created == store.get_turn("turn", "ann") and store.get_turn("turn", "bob") is None
    assert store.create_turn("turn", "talk", "ann", 1, {}) is None
    assert store.create_turn("other", "talk", "ann", 2, {}) is None  # the first one is open
    first = store.claim_next_turn(60.0)
    assert first is not None and first.attempt == 1 and store.claim_next_turn(60.0) is None
    assert store.heartbeat(first) == "wanted" and store.claim_next_turn(60.0) is None
    second = store.claim_next_turn(-1.0)
    assert second is not None and second.attempt == 2
    assert store.heartbeat(first) == "lost" and not store.append_event(first, {"kind": "plan"})
    assert store.append_event(second, {"kind": "plan"}) and store.append_event(second, {"kind": "text", "delta": "x"})
    assert store.list_events("turn") == [(1, {"kind": "plan"}), (2, {"kind": "text", "delta": "x"})]
    store.cancel_turn("turn")
    assert store.heartbeat(second) == "cancelled"
    assert store.read_events("turn", 1).is_open and [number for number, _ in store.read_events("turn", 1).events] == [2]
    assert not store.end_turn(first, "done") and store.end_turn(second, "failed", {"code": "internal"})
    ended = store.get_turn("turn", "ann")
    assert ended is not None and (ended.state, ended.error) == ("failed", {"code": "internal"})
    assert not store.read_events("turn").is_open
    assert store.create_turn("other", "talk", "ann", 2, {}) is not None


def test_a_turn_store_notifies_of_events_and_ends(empty_database: Engine) -> None:
    with slow_polls():
        store: TurnStore = TurnRepository(empty_database)
        store.create_thread("talk", "ann")
        store.create_turn("turn", "talk", "ann", 1, {})
        turn = store.claim_next_turn(60.0)
        assert turn is not None

        async def receive_event() -> tuple[int | None, object]:
            with store.watch_events("turn") as watch:
                writer = threading.Timer(0.2, store.append_event, (turn, {"kind": "plan"}))
                writer.start()
                change = None
                while change is None:  # None: a listener has just connected
                    change = await watch.receive(20)
                writer.join()
                return change.number, change.body

        assert asyncio.run(receive_event()) == (1, {"kind": "plan"})
        threading.Timer(0.2, store.end_turn, (turn, "done")).start()
        store.wait_for_end("turn", "ann")
        ended = store.get_turn("turn", "ann")
        assert ended is not None and ended.state == "done"


def test_databases_in_memory_share_nothing() -> None:
    one, other = create_memory_database(), create_memory_database()
    first, second = JobRepository(one), JobRepository(other)
    first.submit(build_job("one"))
    assert second.get_status("one") is None and first.notifier is not second.notifier
    assert JobRepository(one).get_status("one") is not None
    assert TurnRepository(one).notifier is first.notifier
    one.dispose()
    other.dispose()
