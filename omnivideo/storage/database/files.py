"""Files that users uploaded, and result files of batches."""

from typing import Any

from sqlalchemy import ColumnElement, and_, or_, select, update

from omnivideo.records import FileRecord
from omnivideo.storage.database.batches import ACTIVE_BATCH_STATES
from omnivideo.storage.database.repository import Repository, find_object_keys, record_from_row, unix_now
from omnivideo.storage.database.schema import batches, files


class FileRepository(Repository):
    def create_file(
        self, owner: str, *, file_id: str, name: str, purpose: str, size_bytes: int, object_key: str,
        artifact: dict[str, Any] | None, lifetime_seconds: float | None = None,
    ) -> FileRecord:  # fmt: skip
        """Create a file, which expires after `lifetime_seconds`, and return it.

        If the id exists, return the file that has it, unchanged.
        """
        values = {
            "id": file_id, "owner": owner, "name": name, "purpose": purpose, "size_bytes": size_bytes,
            "object_key": object_key, "artifact": artifact, "created_at": unix_now(), "deleted": False,
            "expires_at": None if lifetime_seconds is None else unix_now() + lifetime_seconds,
        }  # fmt: skip
        return record_from_row(FileRecord, self.insert_if_absent(files, values))

    def get_file(self, file_id: str, owner: str) -> FileRecord | None:
        row = self.fetch_one(select(files).where(files.c.id == file_id, match_owned_files(owner)))
        return None if row is None else record_from_row(FileRecord, row)

    def list_files(
        self, owner: str, purpose: str | None, after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[FileRecord], bool]:
        """Return a page of the owner's files, of one purpose if given, and whether more follow."""
        condition = match_owned_files(owner)
        if purpose is not None:
            condition = and_(condition, files.c.purpose == purpose)
        cursor_query = select(files.c.created_at, files.c.id).where(files.c.id == after, files.c.owner == owner)
        rows, has_more = self.fetch_page(files, condition, after, limit, newest_first, cursor_query)
        return [record_from_row(FileRecord, row) for row in rows], has_more

    def delete_file(self, file_id: str, owner: str) -> bool:
        """Mark a file as deleted. Return False if the owner has no such file."""
        deletion = update(files).where(files.c.id == file_id, match_owned_files(owner)).values(deleted=True)
        return bool(self.fetch_all(deletion.returning(files.c.id)))

    def collect_referenced_keys(self) -> set[str]:
        """Return the object keys of all files, including deleted files that an active batch still reads."""
        active_input_ids = select(batches.c.input_file_id).where(batches.c.state.in_(ACTIVE_BATCH_STATES))
        is_referenced = or_(match_present_files(), files.c.id.in_(active_input_ids))
        rows = self.fetch_all(select(files.c.object_key, files.c.artifact).where(is_referenced))
        return {key for row in rows for key in (row.object_key, *find_object_keys(row.artifact))}


def match_owned_files(owner: str) -> ColumnElement[bool]:
    return and_(files.c.owner == owner, match_present_files())


def match_present_files() -> ColumnElement[bool]:
    """Match the files that were not deleted and have not expired."""
    return and_(files.c.deleted.is_(False), or_(files.c.expires_at.is_(None), files.c.expires_at > unix_now()))
