"""The conversations of a service or a Studio: the planner with its ports, checkpoints and store."""

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from langgraph.checkpoint.base import BaseCheckpointSaver

from omnivideo.agent.graph import Planner
from omnivideo.agent.rendering import MAX_GENERATIONS
from omnivideo.agent.thread import AttachFile, Thread, ThreadIndex
from omnivideo.contracts import Artifact, Lane
from omnivideo.errors import ArtifactNotFound
from omnivideo.manifests import FrameManifest, JoinManifest, Manifest, list_needed_keys, parse_manifest
from omnivideo.ports import CHARACTER_LIMITS, MLLM, JobQueue, MediaTools, SweepableObjectStore, TextLimits
from omnivideo.presets import Preset

ARTIFACT_KEYS = ("key", "manifest", "latents", "preview")  # the fields of an artifact that name objects of the store
KEPT_CHANNELS = ("turns", "artifacts", "descriptions")  # of a thread's state: what complete turns have left
LOCAL_OWNER = "local"  # the only owner, if the service requires no keys


class OpenQueue(Protocol):
    def __call__(self, owner: str, lane: Lane = "interactive", /) -> JobQueue:
        """Return the queue that renders an owner's clips in a lane."""
        ...


@dataclass
class Conversations:
    """The threads of all owners.

    `attach_file` stores a user's file. `open_media_tools` returns an owner's tools; without them nothing can be joined
    or converted. A turn that would generate more than `max_generations` is asked about. `replay_manifest` renders a
    manifest's clip again and returns its object key; it is None if the decoder is in another process.
    """

    mllm: MLLM
    queue_for: OpenQueue
    store: SweepableObjectStore
    checkpointer: BaseCheckpointSaver[Any]
    attach_file: AttachFile
    preset: Preset
    open_media_tools: Callable[[str], MediaTools] | None = None
    max_generations: int = MAX_GENERATIONS
    text_limits: TextLimits = CHARACTER_LIMITS
    replay_manifest: Callable[[Manifest], str] | None = None

    def __post_init__(self) -> None:
        self.get_graph = lru_cache(maxsize=256)(self.build_graph)

    def build_graph(self, owner: str, lane: Lane = "interactive") -> Any:
        queue, media_tools = self.queue_for(owner, lane), self.open_media_tools and self.open_media_tools(owner)
        planner = Planner(self.mllm, queue, self.preset, media_tools, self.max_generations, self.text_limits)
        return planner.build_graph(self.checkpointer)

    @property
    def graph(self) -> Any:
        return self.get_graph(LOCAL_OWNER)

    @property
    def local_media_tools(self) -> MediaTools:
        assert self.open_media_tools, "what makes media of media also does so again"
        return self.open_media_tools(LOCAL_OWNER)

    def open_thread(
        self,
        name: str | None = None,
        create: bool = False,
        owner: str = LOCAL_OWNER,
        lane: Lane = "interactive",
    ) -> Thread:
        """Open the thread with this id, or a new one. Raises InvalidInput if there is none and `create` is False.

        Its turns are rendered in the lane.
        """
        thread = self.get_thread(name or uuid.uuid4().hex[:12], owner, lane)
        return thread.ensure_state() if name is None or create else thread.require_existing()

    def get_thread(self, name: str, owner: str, lane: Lane = "interactive") -> Thread:
        """Return the thread with this id, which has no turns if its first checkpoint has not been written."""
        return Thread(self.get_graph(owner, lane), name, self.attach_file, self.text_limits)

    def open_fork(self, source_id: str, num_turns: int, name: str, owner: str, lane: Lane = "interactive") -> Thread:
        """Open the thread `name`; if it has no checkpoint, begin it with the first `num_turns` turns of another."""
        thread = self.get_thread(name, owner, lane)
        if not thread.exists():
            self.get_thread(source_id, owner).fork(num_turns, name)
        return thread

    def close(self) -> None:
        """Close the checkpoints' database."""
        self.checkpointer.conn.close()  # type: ignore[attr-defined]

    def list_thread_ids(self) -> list[str]:
        if isinstance(self.checkpointer, ThreadIndex):
            return list(self.checkpointer.list_thread_ids())
        thread_ids = {entry.config["configurable"]["thread_id"]: None for entry in self.checkpointer.list(None)}
        return list(thread_ids)

    def replay_artifact(self, artifact: Artifact) -> str:
        """Make an artifact again and return its object key. Raises ArtifactNotFound if it was attached."""
        if artifact.manifest is None:
            raise ArtifactNotFound("store: that artifact was attached, so there is no manifest to render it from")
        manifest = parse_manifest(self.store.get(artifact.manifest))
        match manifest:
            case JoinManifest():
                return self.local_media_tools.join_clips(manifest.parts, artifact.created_by).key
            case FrameManifest():
                return self.local_media_tools.extract_frame(*manifest.parts, manifest.position, artifact.created_by).key
        assert self.replay_manifest, "a replay needs the decoder in this process"
        return self.replay_manifest(manifest)

    def collect_referenced_keys(self) -> set[str]:
        """Return the object keys that any thread refers to; a thread's last state has the artifacts of all others.

        `collect_replay_keys` has those that their manifests refer to.
        """
        referenced_keys: set[str | None] = set()
        for name in self.list_thread_ids():
            state = self.graph.get_state({"configurable": {"thread_id": name}})
            results = [result for turn in state.values.get("turns", []) for result in turn["results"]]
            saved = [result["artifact"] for result in results if result.get("command") and result["artifact"]]
            unfinished = [value for channel, value in state.values.items() if channel not in KEPT_CHANNELS]
            for artifact in [*state.values.get("artifacts", []), *saved, *find_artifacts(unfinished)]:
                referenced_keys |= {artifact.get(name) for name in ARTIFACT_KEYS}
        return {key for key in referenced_keys if key}

    def collect_replay_keys(self, keys: set[str]) -> set[str]:
        """Return the keys of what the manifests among `keys`, and those of their parts, need to be made again."""
        found, unread = set[str](), [*keys]
        while unread:
            key = unread.pop()
            if key.endswith(".json"):
                with suppress(ArtifactNotFound):
                    needed = {*list_needed_keys(json.loads(self.store.get(key)))} - found - keys
                    found |= needed
                    unread += needed
        return found

    def sweep_artifacts(self, lifetime_seconds: float) -> list[str]:
        """Remove artifacts that no thread refers to and that are older than `lifetime_seconds`. Return their keys."""
        keys = self.collect_referenced_keys()
        return self.store.sweep(keys | self.collect_replay_keys(keys), lifetime_seconds)


def find_artifacts(value: Any) -> Iterator[dict[str, Any]]:
    """Yield the artifacts that stand anywhere in plain JSON."""
    if isinstance(value, dict):
        if "medium" in value and "key" in value:
            yield value
        for item in value.values():
            yield from find_artifacts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from find_artifacts(item)
