"""How an answer shows a clip or a picture in Markdown, and what it tells about the work on one."""

import re
from typing import Any

from omnivideo.api.answers.links import LinkBuilder
from omnivideo.contracts import Artifact, Medium

MAX_ALT_WORDS = 12
MEDIUM_NAMES: dict[Medium, str] = {"image": "picture", "video": "clip"}
MARKDOWN_PATTERN = re.compile(r"[\\`*_{}\[\]()<>#|!~]")


def shorten_caption(caption: str, max_words: int = MAX_ALT_WORDS) -> str:
    """Return the first words of a caption, without the characters that mean something in Markdown."""
    words = MARKDOWN_PATTERN.sub(" ", caption).split()
    shortened = " ".join(word[:40] for word in words[:max_words])
    return f"{shortened} ..." if len(words) > max_words else shortened


def build_artifact_path(thread_id: str, key: str) -> str:
    return f"/v1/threads/{thread_id}/artifacts/{key}"


def describe_artifact(artifact: Artifact) -> str:
    """Return the sentence that comes with a clip or a picture."""
    name, caption = MEDIUM_NAMES[artifact.medium], shorten_caption(artifact.caption)
    name = f"changed {name}" if artifact.source else name
    return f"Here is the {name}: {caption}" if caption else f"Here is the {name}."


def to_markdown(artifact: Artifact, thread_id: str, links: LinkBuilder) -> str:
    """Return a clip as an animated picture and its address, or a picture.

    Chat programs show no clip in an image's place, but an animated picture; terminals show the text and the address.
    """
    path, alt = build_artifact_path(thread_id, artifact.key), shorten_caption(artifact.caption)
    alt = alt or MEDIUM_NAMES[artifact.medium]
    if artifact.medium == "image":
        return f"![{alt}]({links.build_link(path)})"
    return f"![{alt}]({links.build_link(f'{path}/preview.webp')})\n\n<{links.build_link(path)}>"


def describe_action(event: dict[str, Any]) -> str:
    """Return what begins with an action event."""
    verb = "Changing" if event["goal"] == "edit" else "Generating"
    article = "the" if event["goal"] == "edit" else "a"
    return f"{verb} {article} {MEDIUM_NAMES[event['medium']]}: {shorten_caption(event['prompt'])}"


def describe_step(event: dict[str, Any]) -> str:
    """Return how far the denoising is, and the time left."""
    percent, seconds = 100 * event["step"] // event["steps"], round(event["eta_seconds"])
    if event["step"] >= event["steps"]:
        return f"{percent} %"
    left = f"{seconds} s" if seconds < 120 else f"{round(seconds / 60)} min"
    return f"{percent} %, about {left} left"
