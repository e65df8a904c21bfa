"""Batches on a service: the items as batches of its API, and their results in a folder as a Studio writes them."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Iterable
from pathlib import Path
from typing import Any, Protocol

from omnivideo.contracts import Route
from omnivideo.errors import OmniVideoError
from omnivideo.presets import PRESETS, Preset
from omnivideo.sdk.batch import BatchFolder, BatchOutcome
from omnivideo.sdk.batch_items import BatchItem, compute_digest, parse_items
from omnivideo.sdk.connection import OPTION_NAMES, ServiceConnection, cancel_on_service, to_request_fields
from omnivideo.sdk.options import find_requested_medium
from omnivideo.sdk.result import Result

POLL_SECONDS = 0.5
STATE_FILE = ".batch.json"
VIDEOS, IMAGES = "/v1/videos", "/v1/images/generations"
ENDED = ("completed", "failed", "expired", "cancelled")


class RoutePrompt(Protocol):
    def __call__(self, prompt: str) -> Awaitable[Route]: ...


class FetchResult(Protocol):
    def __call__(self, job_id: str, kind: str) -> Awaitable[Result]: ...


class RemoteBatch:
    """Runs items as batches of a service: one for the clips and one for the images.

    The ids of the batches are kept in the folder, so that a later call with the same items waits for the same batches.
    """

    def __init__(self, connection: ServiceConnection, route: RoutePrompt, fetch_result: FetchResult):
        self.connection = connection
        self.route = route
        self.fetch_result = fetch_result

    async def run(self, prompts: Iterable[str | dict[str, Any]], folder: Path) -> AsyncGenerator[BatchOutcome]:
        """Yield the outcome of each item; what an earlier call has done comes first, with neither file nor error."""
        items = parse_items(prompts, await self.find_preset())
        results = BatchFolder(folder)
        remaining = [item for item in items if not results.is_done(item)]
        for item in items:
            if results.is_done(item):
                yield BatchOutcome(item.id, None, None)
        if not remaining:
            return
        lines_by_id = await self.run_batches(remaining, folder)
        for item in remaining:
            outcome = await self.save_outcome(item, lines_by_id[item.id], folder)
            results.record(item, outcome)
            yield outcome

    async def find_preset(self) -> Preset | None:
        """Return the preset that the service generates with, or None if this version does not know it."""
        models = (await self.connection.fetch_json("GET", "/v1/models"))["data"]
        return next((PRESETS[model["id"]] for model in models if model["id"] in PRESETS), None)

    async def run_batches(self, items: list[BatchItem], folder: Path) -> dict[str, Any]:
        """Return the output or error line of each item, by the item's id."""
        state_path = folder / STATE_FILE
        requests = [[item.id, compute_digest(item)] for item in items]
        state = json.loads(state_path.read_text()) if state_path.exists() else {}
        if state.get("requests") != requests or "ids" not in state:
            state = {"requests": requests, "ids": await self.submit_batches(items)}
            state_path.write_text(json.dumps(state))
        try:
            lines: dict[str, Any] = {}
            for batch_id in state["ids"]:
                lines |= await self.wait_for_batch(batch_id)
        except OmniVideoError:
            raise
        except BaseException:
            await self.cancel_batches(state["ids"])
            state_path.unlink(missing_ok=True)
            raise
        missing_line = {"error": {"message": "the batch ended without this item"}}
        return {item.id: lines.get(item.id, missing_line) for item in items}

    async def submit_batches(self, items: list[BatchItem]) -> list[str]:
        lines: dict[str, list[str]] = {}
        for item in items:
            endpoint = IMAGES if await self.is_image(item) else VIDEOS
            lines.setdefault(endpoint, []).append(json.dumps(to_batch_line(item, endpoint)))
        batch_ids = []
        for endpoint, endpoint_lines in lines.items():
            file = ("batch.jsonl", "\n".join(endpoint_lines).encode())
            upload = await self.connection.fetch_json(
                "POST", "/v1/files", data={"purpose": "batch"}, files={"file": file}
            )
            body = {"input_file_id": upload["id"], "endpoint": endpoint, "completion_window": "24h"}
            batch_ids.append(str((await self.connection.fetch_json("POST", "/v1/batches", json=body))["id"]))
        return batch_ids

    async def is_image(self, item: BatchItem) -> bool:
        """Return whether an item is an image; where it does not say so, the model decides."""
        image = find_requested_medium(item.image, item.frames, item.fps, item.seconds)
        return (await self.route(item.prompt)).kind == "image" if image is None else image

    async def wait_for_batch(self, batch_id: str) -> dict[str, Any]:
        """Return the lines of a batch's output and error files, by their ids, when it has ended."""
        while (batch := await self.connection.fetch_json("GET", f"/v1/batches/{batch_id}"))["status"] not in ENDED:
            await asyncio.sleep(POLL_SECONDS)
        lines: dict[str, Any] = {}
        for file_field in ("output_file_id", "error_file_id"):
            if batch.get(file_field):
                content = await self.connection.send_request("GET", f"/v1/files/{batch[file_field]}/content")
                lines |= {(line := json.loads(raw))["custom_id"]: line for raw in content.text.splitlines()}
        return lines

    async def cancel_batches(self, batch_ids: list[str]) -> None:
        with cancel_on_service():
            for batch_id in batch_ids:
                await self.connection.send_request("POST", f"/v1/batches/{batch_id}/cancel")

    async def save_outcome(self, item: BatchItem, line: dict[str, Any], folder: Path) -> BatchOutcome:
        """Download the item's result into the folder, with its manifest."""
        if error := line.get("error") or line["response"]["body"].get("error"):
            field = error.get("param") or ""
            message = str(error["message"])
            if field in OPTION_NAMES:
                message = message.replace(f"{field}:", f"{OPTION_NAMES[field]}:", 1)
            return BatchOutcome(item.id, None, message)
        body = line["response"]["body"]
        kind = "videos" if body.get("object") == "video" else "images"
        try:
            result = await self.fetch_result(body["id"], kind)
            name = f"{item.id}.{result.suffix}"
            await asyncio.to_thread(result.save, folder / name)
        except OmniVideoError as error:
            return BatchOutcome(item.id, None, str(error))
        return BatchOutcome(item.id, name, None)


def to_batch_line(item: BatchItem, endpoint: str) -> dict[str, Any]:
    """Return an item as a line of the service's batch file."""
    options = item.get_settings()
    if endpoint == IMAGES and options["frames"] == 1:
        options["frames"] = None
    body = {"prompt": item.prompt} | to_request_fields(options)
    return {"custom_id": item.id, "method": "POST", "url": endpoint, "body": body}
