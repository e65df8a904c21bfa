"""What is asked of a client's observations, feature by feature. A function raises AssertionError if one is wrong."""

import re
from collections.abc import Callable
from typing import Any

from tests.support.client_services import RunningService, read_key

LINK = re.compile(r"https?://[^\s)>\"\]]+/artifacts/[^\s)>\"\]]+\.mp4[^\s)>\"\]/]*(?=[\s)>\"\]]|$)")
MAGIC = {"png": "89504e47", "webp": "52494646", "mp4": "66747970"}


def check_conversation(saw: Any, service: RunningService) -> None:
    """The second turn changes the first one's clip, and the third is answered in words, correctly."""
    clip, edit, answer = saw["answers"]
    clip_link, edit_link = LINK.findall(clip)[-1], LINK.findall(edit)[-1]
    assert "circle" in clip and "blue" in edit, saw
    assert service.find_source(edit_link) == read_key(clip_link), saw
    assert "right" in answer and not LINK.search(answer), saw
    for link in (clip_link, edit_link):
        data = service.http.get(link).content
        assert data[4:8] == b"ftyp", link


def check_streaming(saw: Any, service: RunningService) -> None:
    check_conversation(saw, service)
    assert min(saw.get("chunks", [2])) > 1, saw  # a terminal shows no chunks


def check_usage(saw: Any, service: RunningService) -> None:
    """Whole and streamed, where the client has both: tokens of the prompt and of the answer."""
    assert saw and all(prompt > 0 and completion > 0 for prompt, completion in saw), saw


def check_picture(saw: Any, service: RunningService) -> None:
    assert "red" in saw and "square" in saw, saw


def check_tools(saw: Any, service: RunningService) -> None:
    """Tools may be offered and are never called; a tool's result is answered from."""
    assert saw["answer"].strip() and not saw["calls"], saw
    assert "told" not in saw or saw["told"].strip(), saw


def check_structured_output(saw: Any, service: RunningService) -> None:
    assert saw["title"].strip(), saw


def check_words(saw: Any, service: RunningService) -> None:
    assert saw.strip() and not LINK.search(saw), saw


def check_images(saw: Any, service: RunningService) -> None:
    assert saw and all(item["begins"].startswith((MAGIC["png"], MAGIC["webp"])) for item in saw), saw


def check_videos(saw: Any, service: RunningService) -> None:
    assert saw and all(MAGIC["mp4"] in item["begins"] for item in saw), saw


def check_files(saw: Any, service: RunningService) -> None:
    assert saw and all(saw.values()), saw


def check_batches(saw: Any, service: RunningService) -> None:
    assert saw["status"] == "completed" and set(saw["lines"]) == {200}, saw


def check_webhooks(saw: Any, service: RunningService) -> None:
    assert saw == {"type": "video.completed", "same": True}, saw


def check_models(saw: Any, service: RunningService) -> None:
    assert {"tiny", "tiny-text"} <= set(saw), saw


def check_over_long_text(saw: Any, service: RunningService) -> None:
    """What is wrong with a person's words is an answer, not an HTTP error."""
    assert "too long" in saw, saw


def check_never(saw: Any, service: RunningService) -> None:
    raise AssertionError(f"it was not refused: {saw}")


# The feature, its check, and how many pictures and clips it generates.
FEATURES: dict[str, tuple[Callable[[Any, RunningService], None], int]] = {
    "models": (check_models, 0),
    "conversation": (check_conversation, 2),
    "streaming": (check_streaming, 2),
    "usage": (check_usage, 0),
    "picture": (check_picture, 0),
    "responses": (check_conversation, 2),
    "streamed responses": (check_streaming, 2),
    "tools": (check_tools, 0),
    "forced tool": (check_never, 0),
    "structured output": (check_structured_output, 0),
    "title": (check_words, 0),
    "over-long text": (check_over_long_text, 0),
    "regenerate": (check_words, 0),
    "continue": (check_words, 0),
    "stop": (check_words, 1),  # the words are those of the answer after the one that was stopped
    "images": (check_images, 2),
    "videos": (check_videos, 2),
    "files": (check_files, 0),
    "batches": (check_batches, 0),
    "webhooks": (check_webhooks, 1),
}
# What the service refuses on purpose, with a word of the message that the client shows.
REFUSALS = {"forced tool": "tool_choice"}
