"""All conversations of one wiring: the planner over its ports, the threads' checkpoints, and the store."""

import json
import sqlite3
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.sqlite import SqliteSaver

from omnivideo.agent import words
from omnivideo.agent.graph import Planner, prompts_for
from omnivideo.agent.thread import Attach, Thread
from omnivideo.backends.media import frames_of
from omnivideo.contracts import Artifact, Manifest
from omnivideo.errors import InvalidInput, NotInstalled, NotStored
from omnivideo.ports import MLLM, JobQueue, Keeper
from omnivideo.settings import Service


def saver_for(chosen: Service) -> BaseCheckpointSaver:
    if chosen.database:
        return postgres(chosen.database)
    try:
        chosen.home.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(chosen.home / "threads.sqlite", check_same_thread=False)
    except (OSError, sqlite3.Error):
        raise InvalidInput("home", "threads cannot be kept there; give a folder that can be written") from None
    saver = SqliteSaver(connection)
    saver.setup()
    # With the write-ahead log that is set up, a killed process loses nothing; a power cut may lose the last step.
    connection.execute("PRAGMA synchronous=NORMAL")
    return saver


def postgres(address: str) -> BaseCheckpointSaver:
    try:
        from langgraph.checkpoint.postgres import PostgresSaver
        from psycopg.rows import dict_row
        from psycopg_pool import ConnectionPool, PoolTimeout
    except ImportError:
        raise NotInstalled("threads in PostgreSQL need: pip install 'omnivideo[serve]'") from None
    # A pool that looks at a connection before it lends it: a server that was restarted is found again.
    kept: dict[str, Any] = {"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row}
    pool: ConnectionPool[Any] = ConnectionPool(
        address, min_size=1, max_size=8, timeout=10, kwargs=kept, check=ConnectionPool.check_connection, open=False
    )
    try:
        pool.open(wait=True, timeout=5)
    except PoolTimeout:
        pool.close()
        raise InvalidInput("OMNIVIDEO_DATABASE", "the server cannot be reached or refuses the login") from None
    saver = PostgresSaver(pool)
    saver.setup()
    return saver


LOCAL = "local"  # the owner where there is but one


@dataclass
class Conversations:
    """Threads of many owners.  `queue_for` gives the queue on which an owner's clips are drawn; `attach` stores a
    user's file; `redraw` gives the key of what a manifest draws, where this process has the decoder."""

    mllm: MLLM
    queue_for: Callable[[str], JobQueue]
    store: Keeper
    saver: BaseCheckpointSaver
    attach: Attach
    preset: str = "tiny"
    redraw: Callable[[Manifest], str] | None = None

    def __post_init__(self) -> None:
        self.acts = words.acts
        self.graph_for = lru_cache(maxsize=256)(self.planned)

    def planned(self, owner: str) -> Any:
        return Planner(self.mllm, self.queue_for(owner), prompts_for(self.preset)).graph(self.saver)

    @property
    def graph(self) -> Any:
        return self.graph_for(LOCAL)

    def thread(self, name: str | None = None, create: bool = False, owner: str = LOCAL) -> Thread:
        """The thread of that id, a new one without; raises InvalidInput where there is none and `create` is False."""
        thread = Thread(self.graph_for(owner), name or uuid.uuid4().hex[:12], self.attach)
        if (name is None or create) and not thread.exists():
            return thread.begin()
        return thread.opened()

    def close(self) -> None:
        """Lets go of the database."""
        self.saver.conn.close()  # type: ignore[attr-defined]

    def threads(self) -> list[str]:
        found = {entry.config["configurable"]["thread_id"]: None for entry in self.saver.list(None)}
        return list(found)

    def frames(self, artifact: Artifact) -> np.ndarray:
        """uint8 [F, H, W, 3]."""
        return frames_of(self.store, artifact)

    def replay(self, artifact: Artifact) -> str:
        """The key of what an artifact's manifest draws; raises NotStored for one that was attached."""
        if artifact.manifest is None:
            raise NotStored("store: that artifact was attached, not drawn")
        assert self.redraw, "a replay needs the decoder in this process"
        return self.redraw(Manifest(**json.loads(self.store.get(artifact.manifest))))

    def referred(self) -> set[str]:
        """The keys that some thread refers to."""
        referred: set[str | None] = set()
        for name in self.threads():
            for past in self.graph.get_state_history({"configurable": {"thread_id": name}}):
                for one in past.values.get("artifacts", []):
                    referred |= {one["key"], one["manifest"], one["latents"]}
        kept = {key for key in referred if key}
        return kept | self.redrawn_from(kept)

    def redrawn_from(self, kept: set[str]) -> set[str]:
        """The tensors that the manifests among these name: without them nothing could be drawn again."""
        manifests = [json.loads(self.store.get(key)) for key in kept if key.endswith(".json") and self.store.has(key)]
        named = {one.get(name) for one in manifests for name in ("visual_tokens", "source_latents")}
        return {key for key in named if key}

    def sweep(self, lifetime: float) -> list[str]:
        """Removes artifacts that no thread refers to, once they are older than `lifetime` seconds."""
        return self.store.sweep(self.referred(), lifetime)
