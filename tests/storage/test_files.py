"""Files in a real database: SQLite and PostgreSQL."""

from typing import Any

import pytest
from sqlalchemy import Engine

from omnivideo.storage.database.batches import BatchRepository
from omnivideo.storage.database.files import FileRecord, FileRepository


@pytest.fixture
def files(empty_database: Engine) -> FileRepository:
    return FileRepository(empty_database)


def create_file(files: FileRepository, file_id: str, owner: str = "ann", **overrides: Any) -> FileRecord:
    values = {"name": "a", "purpose": "batch", "size_bytes": 1, "object_key": f"{file_id}.bin", "artifact": None}
    return files.create_file(owner, file_id=file_id, **(values | overrides))


def test_an_existing_file_is_returned_unchanged(files: FileRepository) -> None:
    first = create_file(files, "one", artifact={"a": [1]})
    again = create_file(files, "one", object_key="other.bin")
    assert first == again and again.artifact == {"a": [1]} and again.created_at > 0


def test_files_are_listed_by_purpose(files: FileRepository) -> None:
    create_file(files, "one")
    create_file(files, "two", purpose="vision")
    page, has_more = files.list_files("ann", "vision", None, 5, True)
    assert ([file.id for file in page], has_more) == (["two"], False)


def test_a_deleted_file_is_not_found(files: FileRepository) -> None:
    create_file(files, "one")
    assert files.delete_file("one", "ann") and not files.get_file("one", "ann")
    assert not files.delete_file("one", "ann")


def test_objects_of_files_and_batch_inputs_are_referenced(files: FileRepository) -> None:
    batches = BatchRepository(files.engine)
    for file_id in ("kept", "input", "deleted"):
        create_file(files, file_id)
    batch = batches.create_batch(
        "ann", 9, batch_id="batch", endpoint="/v1/videos", input_file_id="input", metadata={"a": "b"}
    )
    files.delete_file("deleted", "ann")
    files.delete_file("input", "ann")
    assert files.collect_referenced_keys() == {"kept.bin", "input.bin"}
    assert batches.get_batch_input_key("batch") == "input.bin"
    batches.transition_batch(batch, "failed")
    assert files.collect_referenced_keys() == {"kept.bin"}
