"""Run the migrations on the connection that `storage.database.engine.upgrade_schema` passes in.

A schema of a later version is left as it is.
"""

import logging

from alembic import context
from sqlalchemy import text

from omnivideo.storage.database.schema import metadata

log = logging.getLogger("omnivideo.storage")

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, transaction_per_migration=False)
with context.begin_transaction():
    if connection.dialect.name == "sqlite":  # on PostgreSQL, `upgrade_schema` holds a lock
        connection.execute(text("BEGIN IMMEDIATE"))
    current = context.get_context().get_current_revision()
    if current is None or current in {script.revision for script in context.script.walk_revisions()}:
        context.run_migrations()
    else:
        log.warning("the database has the schema %s of a later version", current)
