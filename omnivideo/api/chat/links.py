"""The addresses of our own artifacts in texts of any client, and texts without addresses.

An address is recognised by its path, with or without a host and a query, and also if a client has percent-encoded it
into an address of its own.
"""

import re
from typing import NamedTuple
from urllib.parse import unquote

THREAD_ID, OBJECT_KEY = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", r"[0-9a-f]{64}\.[a-z0-9]{1,16}"
ARTIFACT_PATH = re.compile(rf"v1/threads/({THREAD_ID})/artifacts/({OBJECT_KEY})")
MARKDOWN_IMAGE = re.compile(r"!\[[^\[\]]*+\]\([^()\s]*+(?:\s[^()]*+)?\)")
MARKDOWN_LINK = re.compile(r"\[([^\[\]]*+)\]\([^()\s]*+(?:\s[^()]*+)?\)")
HTML_MEDIA = re.compile(r"<(img|video|source)\b[^<>]*+>(?:\s*+</\1>)?", re.IGNORECASE)
BARE_ADDRESS = re.compile(r"<?(?:https?://|/?v1/threads/)[^\s<>()\[\]\"']+>?")


class ArtifactLink(NamedTuple):
    thread_id: str
    key: str


def find_artifact_links(text: str) -> list[ArtifactLink]:
    """Return the artifacts that a text links to, in order, each once."""
    return list(dict.fromkeys(ArtifactLink(*match) for match in ARTIFACT_PATH.findall(unquote(text))))


def remove_addresses(text: str) -> str:
    """Return the text without pictures, clips and addresses; of a link, its words stay."""
    for pattern, replacement in (
        (MARKDOWN_IMAGE, " "),
        (MARKDOWN_LINK, r"\1"),
        (HTML_MEDIA, " "),
        (BARE_ADDRESS, " "),
    ):
        text = pattern.sub(replacement, text)
    return text


def remove_artifact_addresses(text: str) -> str:
    """Return a user's text without the addresses of our artifacts; other addresses stay."""

    def remove_ours(match: re.Match[str]) -> str:
        return "" if find_artifact_links(match[0]) else match[0]

    for pattern in (MARKDOWN_IMAGE, MARKDOWN_LINK, HTML_MEDIA, BARE_ADDRESS):
        text = pattern.sub(remove_ours, text)
    return text
