"""The media and documents of a user's turn: from URLs, uploaded files, and addresses of our own artifacts."""

import base64
import binascii
import re

from omnivideo.api.chat.links import ArtifactLink, find_artifact_links
from omnivideo.api.chat.messages import ChatFile, UserTurn
from omnivideo.api.chat.wrappers import Document, NamedFile
from omnivideo.api.dependencies import ServiceContext
from omnivideo.api.media import MediaPart, artifact_from_part
from omnivideo.api.request_body import rename_error_field
from omnivideo.contracts import Artifact
from omnivideo.errors import ArtifactNotFound, InvalidInput

DATA_URL = re.compile(r"\Adata:(?P<type>[^;,]*)(?:;[^,]*)?,(?P<data>.*)", re.DOTALL)
MAX_DOCUMENT_BYTES = 2**20


def find_artifact(context: ServiceContext, owner: str, link: ArtifactLink) -> Artifact | None:
    """Return the artifact that an address names, or None if the owner has no such artifact."""
    if not context.turns.has_thread(link.thread_id, owner):
        return None
    artifacts = context.turn_runner.get_thread(owner, link.thread_id).get_artifacts()
    return next((artifact for artifact in artifacts if artifact.key == link.key), None)


def read_turn_media(context: ServiceContext, owner: str, turn: UserTurn, created_by: str) -> list[Artifact]:
    """Return the images and clips of a turn, in order, each once. Raises InvalidInput that names the field."""
    artifacts = []
    for field, url in turn.media:
        links = find_artifact_links(url)
        found = find_artifact(context, owner, links[0]) if links else None
        if found is None:
            found = artifact_from_part(context, owner, MediaPart(url=url), created_by, field)
        artifacts.append(found)
    for field, file in turn.files:
        if is_media_file(context, owner, file):
            part = MediaPart(file_id=file.file_id, url=None if file.file_id else file.file_data)
            artifacts.append(artifact_from_part(context, owner, part, created_by, field))
    artifacts += [found for link in turn.links if (found := find_artifact(context, owner, link)) is not None]
    return list({artifact.key: artifact for artifact in artifacts}.values())


def is_media_file(context: ServiceContext, owner: str, file: ChatFile) -> bool:
    """Return whether a file of a message is an image or a clip."""
    if file.file_id:
        stored = context.files.get_file(file.file_id, owner)
        return stored is not None and stored.artifact is not None
    return (file.file_data or "").startswith(("data:image/", "data:video/"))


def read_documents(context: ServiceContext, owner: str, turn: UserTurn) -> list[Document]:
    """Return the texts that came with a turn. Raises InvalidInput for a file id that the owner does not have."""
    documents = list(turn.documents)
    for field, file in turn.files:
        if not is_media_file(context, owner, file) and (text := read_file_text(context, owner, file, field)):
            documents.append(Document(file.filename, text))
    return documents


def read_file_text(context: ServiceContext, owner: str, file: ChatFile, field: str) -> str:
    """Return a file's text, or "" if it is not a text."""
    if file.file_id:
        stored = context.files.get_file(file.file_id, owner)
        if stored is None:
            raise rename_error_field(InvalidInput("file_id", f"there is no file {file.file_id[:100]!r}"), field)
        try:
            return decode_text(context.store.get(stored.object_key))
        except ArtifactNotFound:
            return ""
    match = DATA_URL.match(file.file_data or "")
    try:
        return decode_text(base64.b64decode(match["data"] if match else file.file_data or ""))
    except (binascii.Error, ValueError):
        return ""


def decode_text(data: bytes) -> str:
    try:
        text = data[:MAX_DOCUMENT_BYTES].decode(
            "utf-8", errors="strict" if len(data) <= MAX_DOCUMENT_BYTES else "ignore"
        )
    except UnicodeDecodeError:
        return ""
    return "" if "\0" in text else text


def list_missing_files(
    context: ServiceContext, owner: str, turn: UserTurn, documents: list[Document]
) -> list[NamedFile]:
    """Return the files that a turn names and that did not come with it."""
    num_media, received = len(turn.media) + len(turn.links), {document.name for document in documents}
    media = [file for file in turn.named_files if file.is_media]
    others = [file for file in turn.named_files if not file.is_media and file.name not in received]
    unreadable = [
        NamedFile(file.filename or "a file", "", False)
        for field, file in turn.files
        if not is_media_file(context, owner, file) and not read_file_text(context, owner, file, field)
    ]
    return [*media[num_media:], *others, *unreadable]
