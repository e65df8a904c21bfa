"""Download a preset's published weights from the Hugging Face hub into a folder that `weights import` takes.

    FOLDER/download.json               the commit of each repository, and the files that were verified
    FOLDER/<name of the repository>/   its files, as on the hub

A commit is pinned when the first file is fetched, and kept by every later run. An interrupted file continues where it
stopped. Each file is compared with the checksum that the hub gives for it: SHA-256 for a large file, git's SHA-1 for a
small one. `HF_ENDPOINT` and `HF_TOKEN` are read by huggingface_hub.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from tqdm import tqdm

from omnivideo.errors import CheckpointError, InvalidInput
from omnivideo.models.weights.repositories import REPOSITORIES
from omnivideo.models.weights.tensor_files import WriteProgress
from omnivideo.presets import HubRepository, get_preset

RECORD_FILE = "download.json"


@dataclass(frozen=True)
class HubFile:
    """A file of a repository: its name, its size and the hub's checksum; a large file has a SHA-256."""

    name: str
    size_bytes: int
    blob_id: str
    sha256: str | None


def list_repositories(preset_name: str) -> tuple[HubRepository, ...]:
    """Return the repositories of a preset; raise InvalidInput for a preset without published weights."""
    if get_preset(preset_name).name not in REPOSITORIES:
        raise InvalidInput("preset", f"{preset_name!r} is not published; allowed: {', '.join(REPOSITORIES)}")
    return REPOSITORIES[preset_name]


def download_repositories(
    preset_name: str,
    folder: Path,
    on_progress: WriteProgress,
    on_total: Callable[[int], None] = lambda size_bytes: None,
) -> None:
    """Download what a preset needs and verify it; raise CheckpointError for what cannot be fetched or is damaged."""
    repositories, record = list_repositories(preset_name), read_record(folder)
    folder.mkdir(parents=True, exist_ok=True)
    listings = {}
    for repository in repositories:
        with explain_hub_errors(repository.id):
            revision = record["revisions"].get(repository.id) or repository.revision
            commit, listings[repository.id] = list_hub_files(repository, revision)
        record["revisions"][repository.id] = commit
    write_record(folder, record)
    files = [file for listing in listings.values() for file in listing]
    on_total(sum(file.size_bytes for file in files))
    check_free_space(folder, repositories, listings)
    for repository in repositories:
        for file in listings[repository.id]:
            fetch_file(folder, repository, file, record, on_progress)


def check_free_space(
    folder: Path, repositories: Sequence[HubRepository], listings: dict[str, tuple[HubFile, ...]]
) -> None:
    needed = sum(
        file.size_bytes
        for repository in repositories
        for file in listings[repository.id]
        if not (folder / get_folder_name(repository) / file.name).exists()
    )
    free_bytes = shutil.disk_usage(folder).free
    if needed > free_bytes:
        raise CheckpointError(f"the files take {needed / 1e9:.1f} GB; the disk has {free_bytes / 1e9:.1f} GB free")


def get_folder_name(repository: HubRepository) -> str:
    return repository.id.rpartition("/")[2]


# ---------------------------------------------------------------- what the hub has


def list_hub_files(repository: HubRepository, revision: str | None) -> tuple[str, tuple[HubFile, ...]]:
    """Return the commit of a revision, and the files of it that match the repository's patterns.

    Raises CheckpointError for a pattern of a needed file that matches none.
    """
    info = HfApi().model_info(repository.id, revision=revision, files_metadata=True)
    files: dict[str, HubFile] = {}
    for pattern in (*repository.files, *repository.optional_files):
        found = [entry for entry in info.siblings or () if fnmatch(entry.rfilename, pattern)]
        if not found and pattern in repository.files:
            raise CheckpointError(f"{repository.id} has no file {pattern}")
        for entry in found:
            path = PurePosixPath(entry.rfilename)
            if path.is_absolute() or ".." in path.parts:
                raise CheckpointError(f"{repository.id} lists {entry.rfilename!r}, which is outside its folder")
            sha256 = entry.lfs.sha256 if entry.lfs else None
            files[entry.rfilename] = HubFile(entry.rfilename, entry.size or 0, entry.blob_id or "", sha256)
    assert info.sha is not None, "the hub always gives the commit"
    return info.sha, tuple(files.values())


@contextmanager
def explain_hub_errors(what: str) -> Iterator[None]:
    """Turn the errors of the hub and of the connection into one line."""
    try:
        yield
    except GatedRepoError:
        text = "its licence must be accepted on its page on the hub; then run `hf auth login`"
        raise CheckpointError(f"{what}: {text}") from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{what}: the hub does not have the pinned revision any more") from None
    except RepositoryNotFoundError:
        raise CheckpointError(f"{what} is not on the hub, or needs `hf auth login`") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "an error"
        raise CheckpointError(f"{what}: the hub answers {status}; repeat the command to continue") from None
    except CheckpointError:
        raise
    except Exception as error:  # the HTTP client that huggingface_hub chooses has error types of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(f"{what}: {reason}; repeat the command to continue") from None


# ---------------------------------------------------------------- one file


def fetch_file(
    folder: Path, repository: HubRepository, file: HubFile, record: dict[str, Any], on_progress: WriteProgress
) -> None:
    """Download one file, or continue it, and verify it; a file that was verified before is left alone."""
    name = f"{get_folder_name(repository)}/{file.name}"
    target = folder / name
    if target.is_file() and record["verified"].get(name) == describe_file(target, file):
        on_progress(file.name, file.size_bytes)
        return
    with explain_hub_errors(name):
        hf_hub_download(
            repository.id,
            file.name,
            revision=record["revisions"][repository.id],
            local_dir=folder / get_folder_name(repository),
            tqdm_class=build_progress_class(file.name, on_progress),
        )
    if target.stat().st_size != file.size_bytes or compute_hub_digest(target, file) != (file.sha256 or file.blob_id):
        target.unlink()
        raise CheckpointError(f"{name} is damaged: its checksum differs from the hub's; repeat the command")
    record["verified"][name] = describe_file(target, file)
    write_record(folder, record)


def build_progress_class(name: str, on_progress: WriteProgress) -> type[Any]:
    """Return a class like tqdm that draws nothing and reports bytes, those of an earlier run included."""

    class ByteProgress(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, initial: int = 0, **kwargs: Any):
            kwargs.pop("name", None)  # huggingface_hub's own addition
            super().__init__(*args, **(kwargs | {"initial": initial, "disable": True}))
            on_progress(name, initial)

        def update(self, n: float | None = 1) -> None:
            on_progress(name, int(n or 0))
            super().update(n)

    return ByteProgress


def compute_hub_digest(path: Path, file: HubFile) -> str:
    """Return the checksum that the hub gives for a file: SHA-256, or the SHA-1 of git's blob for a small file."""
    if file.sha256 is None:
        header = f"blob {path.stat().st_size}\0".encode()
        return hashlib.sha1(header + path.read_bytes(), usedforsecurity=False).hexdigest()
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def describe_file(path: Path, file: HubFile) -> list[Any]:
    """Return what identifies a verified file without reading it: the hub's checksum, and its size and time here."""
    status = path.stat()
    return [file.sha256 or file.blob_id, status.st_size, status.st_mtime_ns]


# ---------------------------------------------------------------- the record


def read_record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD_FILE
    if not path.is_file():
        return {"revisions": {}, "verified": {}}
    try:
        record = json.loads(path.read_text())
        if isinstance(record["revisions"], dict) and isinstance(record["verified"], dict):
            return {"revisions": record["revisions"], "verified": record["verified"]}
    except (ValueError, KeyError, TypeError):
        pass
    raise CheckpointError(f"{RECORD_FILE} is damaged; remove it, and every file is verified again")


def write_record(folder: Path, record: dict[str, Any]) -> None:
    partial = folder / f".{RECORD_FILE}.partial"
    partial.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    os.replace(partial, folder / RECORD_FILE)
