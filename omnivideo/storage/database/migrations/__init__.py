"""The revisions of the schema. They only go up: stop the service, back up the database, and upgrade."""

from typing import NoReturn

from omnivideo.errors import StoreError


def refuse_downgrade() -> NoReturn:
    """Refuse to lower the schema, which would lose what newer versions have written."""
    raise StoreError("database: its schema cannot be downgraded; restore the backup that was made before the upgrade")
