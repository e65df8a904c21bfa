"""Let time pass for what is stored: rows of the database and files of the object store."""

import os
from pathlib import Path

from sqlalchemy import Engine, Float, update

from omnivideo.storage.database.schema import metadata


def pass_time(engine: Engine, store_folder: Path, seconds: float) -> None:
    """Make every row and every file look as if it had been written `seconds` earlier."""
    with engine.connect() as connection:
        for table in metadata.sorted_tables:
            times = [column for column in table.columns if isinstance(column.type, Float) and "_at" in column.name]
            if times:
                connection.execute(update(table).values({column.name: column - seconds for column in times}))
    for path in store_folder.rglob("*"):
        if path.is_file():
            written_at = path.stat().st_mtime - seconds
            os.utime(path, (written_at, written_at))
