"""The embedded wiring of a conversation: planner, checkpoints, store, MLLM and decoder in one process."""

import json
import sqlite3
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.sqlite import SqliteSaver

from omnivideo.agent import words
from omnivideo.agent.graph import Planner, prompts_for
from omnivideo.agent.thread import Thread
from omnivideo.backends.decoder.local import LocalQueue
from omnivideo.backends.decoder.painter import Painter
from omnivideo.backends.media import attached, frames_of
from omnivideo.backends.mllm.local import LocalMLLM
from omnivideo.contracts import Artifact, Manifest
from omnivideo.errors import InvalidInput, NotInstalled, NotStored
from omnivideo.models.omni import Omni
from omnivideo.settings import Service
from omnivideo.storage.local import LocalStore


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
        from psycopg import Connection, OperationalError
        from psycopg.rows import dict_row
    except ImportError:
        raise NotInstalled("threads in PostgreSQL need: pip install 'omnivideo[serve]'") from None
    try:
        connection = Connection.connect(address, autocommit=True, prepare_threshold=0, row_factory=dict_row)
    except OperationalError:
        raise InvalidInput("OMNIVIDEO_DATABASE", "the server cannot be reached or refuses the login") from None
    saver = PostgresSaver(connection)
    saver.setup()
    return saver


class Conversations:
    """All threads of one home."""

    def __init__(self, omni: Omni, digest: str, chosen: Service):
        self.settings = chosen
        self.store = LocalStore(chosen.home / "store")
        self.painter = Painter(omni, self.store, digest)
        self.queue = LocalQueue(self.painter)
        self.saver = saver_for(chosen)
        self.mllm = LocalMLLM(omni, self.store)
        self.acts = words.acts
        planner = Planner(self.mllm, self.queue, prompts_for(omni.preset.name))
        self.graph: Any = planner.graph(self.saver)

    def thread(self, name: str | None = None, create: bool = False) -> Thread:
        """The thread of that id, a new one without; raises InvalidInput where there is none and `create` is False."""
        thread = Thread(self.graph, name or uuid.uuid4().hex[:12], self.attach)
        if (name is None or create) and not thread.exists():
            return thread.begin()
        return thread.opened()

    def close(self) -> None:
        """Lets go of the database."""
        self.saver.conn.close()  # type: ignore[attr-defined]

    def attach(self, path: str | Path, made_by: str) -> Artifact:
        return attached(self.store, path, made_by)

    def threads(self) -> list[str]:
        found = {entry.config["configurable"]["thread_id"]: None for entry in self.saver.list(None)}
        return list(found)

    def path(self, artifact: Artifact) -> Path:
        return self.store.path(artifact.key)

    def frames(self, artifact: Artifact) -> np.ndarray:
        """uint8 [F, H, W, 3]."""
        return frames_of(self.store, artifact)

    def replay(self, artifact: Artifact) -> str:
        """The key of what an artifact's manifest draws; raises NotStored for one that was attached."""
        if artifact.manifest is None:
            raise NotStored("store: that artifact was attached, not drawn")
        return self.painter.redrawn(Manifest(**json.loads(self.store.get(artifact.manifest))))

    def sweep(self) -> list[str]:
        """Removes artifacts that no thread refers to, once they are older than the settings' lifetime."""
        referred = set()
        for name in self.threads():
            for past in self.graph.get_state_history({"configurable": {"thread_id": name}}):
                for one in past.values.get("artifacts", []):
                    referred |= {one["key"], one["manifest"], one["latents"]}
        return self.store.sweep(referred - {None}, self.settings.lifetime)
