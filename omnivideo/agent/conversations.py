"""All conversations of one wiring: the planner over its ports, the threads' checkpoints, and the store."""

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from langgraph.checkpoint.base import BaseCheckpointSaver

from omnivideo.agent import english_rules
from omnivideo.agent.graph import Planner
from omnivideo.agent.thread import AttachFile, Thread
from omnivideo.contracts import Artifact, Manifest
from omnivideo.errors import ArtifactNotFound
from omnivideo.ports import MLLM, JobQueue, SweepableObjectStore
from omnivideo.presets import Preset

LOCAL_OWNER = "local"  # the owner where there is but one


@dataclass
class Conversations:
    """Threads of many owners.  `queue_for` gives the queue on which an owner's clips are drawn; `attach` stores a
    user's file; `redraw` gives the key of what a manifest draws, where this process has the decoder."""

    mllm: MLLM
    queue_for: Callable[[str], JobQueue]
    store: SweepableObjectStore
    checkpointer: BaseCheckpointSaver[Any]
    attach_file: AttachFile
    preset: Preset
    replay_manifest: Callable[[Manifest], str] | None = None

    def __post_init__(self) -> None:
        self.split_actions = english_rules.split_actions
        self.get_graph = lru_cache(maxsize=256)(self.build_graph)

    def build_graph(self, owner: str) -> Any:
        return Planner(self.mllm, self.queue_for(owner), self.preset).build_graph(self.checkpointer)

    @property
    def graph(self) -> Any:
        return self.get_graph(LOCAL_OWNER)

    def open_thread(self, name: str | None = None, create: bool = False, owner: str = LOCAL_OWNER) -> Thread:
        """The thread of that id, a new one without; raises InvalidInput where there is none and `create` is False."""
        thread = Thread(self.get_graph(owner), name or uuid.uuid4().hex[:12], self.attach_file)
        if (name is None or create) and not thread.exists():
            return thread.initialize_state()
        return thread.require_existing()

    def close(self) -> None:
        """Lets go of the database."""
        self.checkpointer.conn.close()  # type: ignore[attr-defined]

    def list_thread_ids(self) -> list[str]:
        thread_ids = {entry.config["configurable"]["thread_id"]: None for entry in self.checkpointer.list(None)}
        return list(thread_ids)

    def replay_artifact(self, artifact: Artifact) -> str:
        """The key of what an artifact's manifest draws; raises NotStored for one that was attached."""
        if artifact.manifest is None:
            raise ArtifactNotFound("store: that artifact was attached, not drawn")
        assert self.replay_manifest, "a replay needs the decoder in this process"
        return self.replay_manifest(Manifest(**json.loads(self.store.get(artifact.manifest))))

    def collect_referenced_keys(self) -> set[str]:
        """The keys that some thread refers to."""
        referenced_keys: set[str | None] = set()
        for name in self.list_thread_ids():
            for snapshot in self.graph.get_state_history({"configurable": {"thread_id": name}}):
                for artifact in snapshot.values.get("artifacts", []):
                    referenced_keys |= {artifact["key"], artifact["manifest"], artifact["latents"]}
        keys = {key for key in referenced_keys if key}
        return keys | self.collect_replay_keys(keys)

    def collect_replay_keys(self, keys: set[str]) -> set[str]:
        """The tensors that the manifests among these name: without them nothing could be drawn again."""
        manifests = [json.loads(self.store.get(key)) for key in keys if key.endswith(".json") and self.store.has(key)]
        named = {one.get(name) for one in manifests for name in ("visual_tokens", "source_latents")}
        return {key for key in named if key}

    def sweep_artifacts(self, lifetime_seconds: float) -> list[str]:
        """Removes artifacts that no thread refers to, once they are older than `lifetime` seconds."""
        return self.store.sweep(self.collect_referenced_keys(), lifetime_seconds)
