"""A conversation on a service, for an event loop."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import httpx
from pydantic import TypeAdapter

from omnivideo.contracts import Artifact
from omnivideo.errors import JobFailed, OmniVideoError
from omnivideo.manifests import parse_manifest
from omnivideo.sdk.connection import (
    MAX_ATTEMPTS,
    ServiceConnection,
    cancel_on_service,
    error_from_body,
    error_from_response,
    raise_for_certificate,
)
from omnivideo.sdk.options import Source, to_source_file
from omnivideo.sdk.result import Result
from omnivideo.turns import QuestionAsked, Think, Turn, TurnCompleted, TurnEvent

EVENT_ADAPTER: TypeAdapter[TurnEvent] = TypeAdapter(TurnEvent)


class AsyncThread:
    """A thread of a service, with the methods of a Studio's thread.

    Leaving the loop over a turn's events cancels the turn.
    """

    def __init__(self, connection: ServiceConnection, thread_id: str):
        self.connection = connection
        self.id = thread_id
        self.path = f"/v1/threads/{thread_id}"

    async def send(
        self,
        text: str,
        attachments: Sequence[Source | Artifact] = (),
        *,
        think: Think = "auto",
        check: int = 1,
        seed: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> AsyncGenerator[TurnEvent]:
        """Run a turn and yield its events as they happen; the last one is TurnCompleted or QuestionAsked.

        A lost connection is resumed without a lost event. The text sent after a QuestionAsked is the reply. Raises an
        InvalidInput that names the option, and JobFailed if the turn fails, which leaves the thread as it was.
        """
        options = {"think": think, "check": check, "seed": seed, "steps": steps, "guidance_scale": guidance_scale}
        parts = [{"file_id": await self.upload_file(source)} for source in attachments]
        body = {"text": text, "attachments": parts, **options}
        creation = asyncio.create_task(self.connection.fetch_json("POST", f"{self.path}/turns", json=body))
        has_ended = False
        try:
            turn_id = (await asyncio.shield(creation))["id"]
            async with aclosing(self.follow_turn(turn_id)) as events:
                async for event in events:
                    has_ended = isinstance(event, TurnCompleted | QuestionAsked)
                    yield event
            has_ended = True
        except OmniVideoError:
            has_ended = True
            raise
        finally:
            if not has_ended:
                await self.cancel_turn(creation)

    async def cancel_turn(self, creation: "asyncio.Task[dict[str, Any]]") -> None:
        """Cancel a turn on the service, whose creation may still be under way, and wait until it has ended."""
        with cancel_on_service():
            path = f"{self.path}/turns/{(await creation)['id']}"
            turn = await self.connection.fetch_json("POST", f"{path}/cancel")
            while turn["state"] in ("queued", "running"):
                await asyncio.sleep(0.05)
                turn = await self.connection.fetch_json("GET", path)
        creation.cancel()

    async def upload_file(self, source: Source | Artifact) -> str:
        """Store a source as a file of the service and return its id."""
        if isinstance(source, Artifact):
            result = await self.fetch_artifact(source)
            file = (f"{source.caption[:40] or 'artifact'}.{result.suffix}", result.data)
        else:
            source_file = to_source_file(source, "attachments")
            file = (source_file.name, await asyncio.to_thread(source_file.read, "attachments"))
        names = {"file": "attachments"}
        upload = await self.connection.fetch_json(
            "POST", "/v1/files", field_names=names, data={"purpose": "vision"}, files={"file": file}
        )
        return str(upload["id"])

    async def follow_turn(self, turn_id: str) -> AsyncGenerator[TurnEvent]:
        """Yield a turn's events from the first one; raise JobFailed if the turn failed or was cancelled."""
        last_event_id = 0
        for attempt in range(MAX_ATTEMPTS):
            try:
                async with aclosing(self.stream_events(turn_id, last_event_id)) as events:
                    async for number, event in events:
                        last_event_id = number
                        yield event
                break
            except httpx.TransportError as error:
                raise_for_certificate(error)
                await asyncio.sleep(0.25 * 2**attempt)
        turn = await self.connection.fetch_json("GET", f"{self.path}/turns/{turn_id}")
        if turn["state"] == "failed":
            raise error_from_body(turn["error"], {})
        if turn["state"] == "cancelled":
            raise JobFailed("cancelled", "the turn was cancelled")

    async def stream_events(self, turn_id: str, after_event_id: int) -> AsyncGenerator[tuple[int, TurnEvent]]:
        """Yield (id, event) of the turn's server-sent events with ids above `after_event_id`."""
        headers, number, data = {"Last-Event-ID": str(after_event_id)}, after_event_id, ""
        path = f"{self.path}/turns/{turn_id}/events"
        async with self.connection.http.stream("GET", path, headers=headers) as response:
            if response.status_code >= 400:
                await response.aread()
                raise error_from_response(response, {})
            async for line in response.aiter_lines():
                name, _, value = line.partition(": ")
                if name == "id":
                    number = int(value)
                elif name == "data":
                    data = value
                elif not line and data:
                    yield number, EVENT_ADAPTER.validate_json(data, extra="ignore")
                    data = ""

    # ------------------------------------------------------------ reading

    async def fork(self, turn: int, name: str | None = None) -> "AsyncThread":
        """Return a new thread that starts with the first `turn` turns of this one."""
        body = {"after_turn": turn} | ({"id": name} if name else {})
        names = {"after_turn": "turn", "id": "thread"}
        fork = await self.connection.fetch_json("POST", f"{self.path}/forks", json=body, field_names=names)
        return AsyncThread(self.connection, fork["id"])

    async def fetch_detail(self) -> dict[str, Any]:
        detail: dict[str, Any] = await self.connection.fetch_json("GET", self.path)
        return detail

    async def get_turns(self) -> list[Turn]:
        return [Turn.parse_stored(turn) for turn in (await self.fetch_detail())["turns"]]

    async def get_artifacts(self) -> list[Artifact]:
        """Return every attached or generated artifact, in order."""
        return [Artifact.parse_stored(artifact) for artifact in (await self.fetch_detail())["artifacts"]]

    async def get_open_question(self) -> str | None:
        """Return the question that waits for a reply, or None."""
        question: str | None = (await self.fetch_detail())["question"]
        return question

    async def get_lineage(self, key: str | None = None) -> list[Artifact]:
        """Return an artifact, by default the last one, and the artifacts that it was edited from, newest first."""
        query = {"artifact": key} if key else {}
        lineage = await self.connection.fetch_json("GET", f"{self.path}/lineage", params=query)
        return [Artifact.parse_stored(artifact) for artifact in lineage]

    async def fetch_artifact(self, artifact: Artifact) -> Result:
        """Return an artifact of this thread."""
        path = f"{self.path}/artifacts"
        content = (await self.connection.send_request("GET", f"{path}/{artifact.key}")).content
        manifest = None
        if artifact.manifest is not None:
            response = await self.connection.send_request("GET", f"{path}/{artifact.manifest}")
            manifest = parse_manifest(response.content)
        return Result(manifest, data=content, suffix=artifact.key.rpartition(".")[2], fps=artifact.fps)
