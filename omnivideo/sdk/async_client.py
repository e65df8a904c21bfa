"""The client of the HTTP service for an event loop, with the methods of Studio. `Client` is the same without await."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, Unpack, cast

from omnivideo.contracts import Route, StepProgress, check_prompt
from omnivideo.errors import ArtifactNotFound, InvalidInput, JobFailed, ModelUnavailable, OmniVideoError
from omnivideo.manifests import Manifest
from omnivideo.sdk.async_thread import AsyncThread
from omnivideo.sdk.batch import BatchOutcome
from omnivideo.sdk.connection import ServiceConnection, cancel_on_service, to_request_fields
from omnivideo.sdk.options import (
    CLIP_TO_ANIMATE,
    PICTURE_TO_EXTEND,
    GenerationOptions,
    SamplingOptions,
    Source,
    StepCallback,
    TextCallback,
    choose_seeds,
    find_requested_medium,
    ignore_text,
    to_source_file,
)
from omnivideo.sdk.progress import follow_steps
from omnivideo.sdk.remote_batch import RemoteBatch
from omnivideo.sdk.result import Result

POLL_SECONDS = 0.1  # unless the service suggests an interval
IMAGE_TIMEOUT_SECONDS = 600.0  # of a request that ends with the image
MAX_CONCURRENT_CALLS = 8
EDIT_ARGUMENTS = {"prompt": "instruction", "image": "source", "video": "source"}  # by the names in requests
CONTINUATION_ARGUMENTS = {"input_reference": "source", "video": "source"}
Value = TypeVar("Value")


class AsyncClient:
    """The client of the service at `address`, for asyncio. `timeout` is in seconds.

    All methods raise an OmniVideoError if the service refuses a request or cannot be reached. Cancelling a call cancels
    its work on the service.
    """

    def __init__(self, address: str = "http://127.0.0.1:8000", api_key: str | None = None, timeout: float = 60.0):
        self.connection = ServiceConnection(address, api_key, timeout)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self.connection.close()

    async def open_thread(self, thread_id: str | None = None, create: bool = False) -> AsyncThread:
        """Return a new thread, or the thread with the given id, which is created if `create` is set.

        Raises InvalidInput if it does not exist.
        """
        if thread_id is not None:
            try:
                await self.connection.send_request("GET", f"/v1/threads/{thread_id}")
                return AsyncThread(self.connection, thread_id)
            except ArtifactNotFound:
                if not create:
                    raise InvalidInput("thread", f"there is no thread {thread_id!r}") from None
        body = {} if thread_id is None else {"id": thread_id}
        created = await self.connection.fetch_json("POST", "/v1/threads", json=body, field_names={"id": "thread"})
        return AsyncThread(self.connection, created["id"])

    def batch(self, prompts: Iterable[str | dict[str, Any]], folder: str | Path) -> AsyncIterator[BatchOutcome]:
        """Generate each prompt into the folder, with a line in its results.jsonl; skip what an earlier run did.

        It runs as batches of the service, which are cancelled with the call.
        """
        return RemoteBatch(self.connection, self.route, self.fetch_result).run(prompts, Path(folder))

    async def route(self, prompt: str, source: Source | None = None) -> Route:
        """Return what the model would answer the request with: text, an image or a video, with its probability."""
        request: dict[str, Any] = {"json": {"prompt": check_prompt("prompt", prompt)}}
        if source is not None:
            request = {"data": request["json"], "files": {"source": await asyncio.to_thread(read_upload, source)}}
        return Route.parse_stored(await self.connection.fetch_json("POST", "/v1/route", **request))

    async def generate(
        self,
        prompt: str,
        *,
        image: bool | None = None,
        width: int | None = None,
        height: int | None = None,
        frames: int | None = None,
        fps: float | None = None,
        seconds: float | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        flow_shift: float | None = None,
        negative_prompt: str | None = None,
        seed: int = 0,
        progress: bool | None = None,
        on_step: StepCallback | None = None,
    ) -> Result:
        """Generate an image if `image` is True, a clip if it is False; by default the model decides.

        What is None comes from the preset; a seed of -1 is any seed. In a terminal or a notebook a progress bar is
        shown unless `progress` is False. Raises an InvalidInput that names the option.
        """
        prompt = check_prompt("prompt", prompt)
        image = find_requested_medium(image, frames, fps, seconds)
        if image is None:
            image = (await self.route(prompt)).kind == "image"
        options = {
            "width": width, "height": height, "frames": None if image and frames == 1 else frames, "fps": fps,
            "seconds": seconds, "steps": steps, "guidance_scale": guidance_scale, "flow_shift": flow_shift,
            "negative_prompt": negative_prompt, "seed": seed,
        }  # fmt: skip
        request = {"json": {"prompt": prompt} | to_request_fields(options)}
        with follow_steps(prompt, progress, on_step) as report:
            if image:
                return await self.request_image("/v1/images/generations", request, {})
            return await self.request_clip("/v1/videos", request, {}, report)

    async def generate_many(self, prompt: str, n: int, **options: Unpack[GenerationOptions]) -> list[Result]:
        """Generate `n` results with consecutive seeds, with the options of `generate`."""
        seeds = choose_seeds(options.get("seed", 0), n)
        calls = [cast(GenerationOptions, {**options, "seed": seed}) for seed in seeds]
        return await run_concurrently([partial(self.generate, prompt, **call) for call in calls])

    async def edit(
        self,
        source: Source,
        instruction: str,
        *,
        width: int | None = None,
        height: int | None = None,
        frames: int | None = None,
        fps: float | None = None,
        seconds: float | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        flow_shift: float | None = None,
        negative_prompt: str | None = None,
        seed: int = 0,
        progress: bool | None = None,
        on_step: StepCallback | None = None,
    ) -> Result:
        """Edit a source as the instruction says. An image is edited to an image, a clip to a clip of its length.

        The source is a path, a PIL image, an array or a result. The options are those of `generate`.
        """
        options = {
            "width": width, "height": height, "frames": frames, "fps": fps, "seconds": seconds, "steps": steps,
            "guidance_scale": guidance_scale, "flow_shift": flow_shift, "negative_prompt": negative_prompt,
            "seed": seed,
        }  # fmt: skip
        fields = {"prompt": check_prompt("instruction", instruction)} | to_request_fields(options)
        upload, is_image = await asyncio.to_thread(read_edit_source, source)
        form = {name: str(value) for name, value in fields.items()}
        with follow_steps(instruction, progress, on_step) as report:
            if is_image:
                request: dict[str, Any] = {"data": form | {"response_format": "b64_json"}, "files": {"image": upload}}
                return await self.request_image("/v1/images/edits", request, EDIT_ARGUMENTS)
            request = {"data": form, "files": {"video": upload}}
            return await self.request_clip("/v1/videos/edits", request, EDIT_ARGUMENTS, report)

    async def edit_many(
        self, source: Source, instruction: str, n: int, **options: Unpack[SamplingOptions]
    ) -> list[Result]:
        """Edit a source `n` times with consecutive seeds, with the options of `edit`."""
        seeds = choose_seeds(options.get("seed", 0), n)
        calls = [cast(SamplingOptions, {**options, "seed": seed}) for seed in seeds]
        return await run_concurrently([partial(self.edit, source, instruction, **call) for call in calls])

    async def animate(
        self,
        source: Source,
        prompt: str,
        *,
        last_image: Source | None = None,
        width: int | None = None,
        height: int | None = None,
        frames: int | None = None,
        fps: float | None = None,
        seconds: float | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        flow_shift: float | None = None,
        negative_prompt: str | None = None,
        seed: int = 0,
        progress: bool | None = None,
        on_step: StepCallback | None = None,
    ) -> Result:
        """Generate a clip that begins with a picture, and with `last_image` also ends with one.

        Pictures are a path, a PIL image, an array or a result. The options are those of `generate`. Raises an
        InvalidInput if the preset's weights cannot do it.
        """
        options = {
            "width": width, "height": height, "frames": frames, "fps": fps, "seconds": seconds, "steps": steps,
            "guidance_scale": guidance_scale, "flow_shift": flow_shift, "negative_prompt": negative_prompt,
            "seed": seed,
        }  # fmt: skip
        task = "image-to-video" if last_image is None else None
        upload, is_image = await asyncio.to_thread(read_edit_source, source)
        if not is_image:
            raise InvalidInput("source", CLIP_TO_ANIMATE)
        files = {"input_reference": upload}
        if last_image is not None:
            files["last_image"] = await asyncio.to_thread(read_upload, last_image, "last_image")
        return await self.continue_media("/v1/videos", prompt, options | {"task": task}, files, (progress, on_step))

    async def extend(
        self,
        source: Source,
        prompt: str,
        *,
        frames: int | None = None,
        seconds: float | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        flow_shift: float | None = None,
        negative_prompt: str | None = None,
        seed: int = 0,
        progress: bool | None = None,
        on_step: StepCallback | None = None,
    ) -> Result:
        """Continue a clip as the prompt says, and return it with what follows.

        `frames` or `seconds` are added, at the clip's size and frame rate; by default what the model adds in one pass.
        The other options are those of `generate`. Raises an InvalidInput if the preset's weights cannot do it.
        """
        options = {
            "frames": frames, "seconds": seconds, "steps": steps, "guidance_scale": guidance_scale,
            "flow_shift": flow_shift, "negative_prompt": negative_prompt, "seed": seed,
        }  # fmt: skip
        upload, is_image = await asyncio.to_thread(read_edit_source, source)
        if is_image:
            raise InvalidInput("source", PICTURE_TO_EXTEND)
        files = {"video": upload}
        return await self.continue_media("/v1/videos/extensions", prompt, options, files, (progress, on_step))

    async def continue_media(
        self,
        path: str,
        prompt: str,
        options: dict[str, Any],
        files: dict[str, tuple[str, bytes]],
        display: tuple[bool | None, StepCallback | None],
    ) -> Result:
        """Request a clip that begins with uploaded media; `display` is how its progress is shown."""
        fields = {"prompt": check_prompt("prompt", prompt)} | to_request_fields(options)
        request = {"data": {name: str(value) for name, value in fields.items()}, "files": files}
        with follow_steps(prompt, *display) as report:
            return await self.request_clip(path, request, CONTINUATION_ARGUMENTS, report)

    async def understand(
        self,
        source: Source,
        question: str,
        *,
        on_text: TextCallback = ignore_text,
        temperature: float = 0.2,
        top_p: float = 0.6,
        seed: int = 0,
    ) -> str:
        """Answer a question about an image or a clip; call `on_text` with each new piece of the answer."""
        form = {
            "question": check_prompt("question", question), "temperature": str(temperature), "top_p": str(top_p),
            "seed": str(seed),
        }  # fmt: skip
        files = {"source": await asyncio.to_thread(read_upload, source)}
        pieces: list[str] = []
        async for piece in self.connection.stream_json_lines("/v1/understand", form | {"stream": "true"}, files):
            if piece is None:
                return "".join(pieces).strip()
            pieces.append(piece)
            on_text(piece)
        raise ModelUnavailable("the answer broke off; ask again")

    # ------------------------------------------------------------ requests

    async def request_image(self, path: str, request: dict[str, Any], field_names: dict[str, str]) -> Result:
        """Request an image, which is the answer; leaving the request cancels it on the service."""
        body = await self.connection.fetch_json(
            "POST", path, field_names=field_names, timeout=IMAGE_TIMEOUT_SECONDS, **request
        )
        image = body["data"][0]
        manifest = await self.connection.send_request("GET", f"/v1/images/{image['id']}/manifest")
        data = base64.b64decode(image["b64_json"])
        return Result(Manifest.parse_stored(manifest.content), data=data, suffix="png")

    async def request_clip(
        self, path: str, request: dict[str, Any], field_names: dict[str, str], report: StepCallback
    ) -> Result:
        """Create a video, poll it until it has ended, and download it. Raises JobFailed."""
        creation = asyncio.create_task(self.connection.fetch_json("POST", path, field_names=field_names, **request))
        try:
            video = await asyncio.shield(creation)
            video = await self.wait_for_video(video, report)
        except BaseException as error:
            if not isinstance(error, OmniVideoError):
                await self.cancel_video(creation)
            raise
        if video["status"] != "completed":
            failure = video.get("error") or {"code": "cancelled", "message": "the clip was cancelled"}
            raise JobFailed(failure["code"], failure["message"])
        return await self.fetch_result(video["id"])

    async def wait_for_video(self, video: dict[str, Any], report: StepCallback) -> dict[str, Any]:
        started_at, last_progress = time.monotonic(), -1
        while video["status"] in ("queued", "in_progress"):
            response = await self.connection.send_request("GET", f"/v1/videos/{video['id']}")
            video = response.json()
            if (progress := video["progress"]) != last_progress:
                last_progress, elapsed = progress, time.monotonic() - started_at
                eta_seconds = elapsed / progress * (100 - progress) if progress else 0.0
                report(StepProgress(step=progress, steps=100, eta_seconds=eta_seconds))
            if video["status"] in ("queued", "in_progress"):
                await asyncio.sleep(int(response.headers.get("openai-poll-after-ms", 1000 * POLL_SECONDS)) / 1000)
        return video

    async def cancel_video(self, creation: "asyncio.Task[dict[str, Any]]") -> None:
        """Cancel a video on the service, whose creation may still be under way."""
        with cancel_on_service():
            video = await creation
            await self.connection.send_request("POST", f"/v1/videos/{video['id']}/cancel")
        creation.cancel()

    async def fetch_result(self, job_id: str, kind: str = "videos") -> Result:
        """Download a finished video or image with its manifest."""
        content = await self.connection.send_request("GET", f"/v1/{kind}/{job_id}/content")
        manifest = await self.connection.send_request("GET", f"/v1/{kind}/{job_id}/manifest")
        suffix = "mp4" if kind == "videos" else "png"
        return Result(Manifest.parse_stored(manifest.content), data=content.content, suffix=suffix)


def read_upload(source: Source, field: str = "source") -> tuple[str, bytes]:
    """Return the name and the content of a source. Raises an InvalidInput with the field if it cannot be read."""
    source_file = to_source_file(source, field)
    return source_file.name, source_file.read(field)


def read_edit_source(source: Source) -> tuple[tuple[str, bytes], bool]:
    """Return the name and the content of a source, and whether it is an image. Raises InvalidInput if it is neither."""
    from omnivideo.media.read import measure_media

    source_file = to_source_file(source)
    is_image = measure_media(source_file.file).kind == "image"
    return (source_file.name, source_file.read()), is_image


async def run_concurrently(calls: list[Callable[[], Awaitable[Value]]]) -> list[Value]:
    """Return the results of calls, a few of which run at a time. If one fails, the others are cancelled."""
    limiter = asyncio.Semaphore(MAX_CONCURRENT_CALLS)

    async def run(call: Callable[[], Awaitable[Value]]) -> Value:
        async with limiter:
            return await call()

    tasks = [asyncio.create_task(run(call)) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
