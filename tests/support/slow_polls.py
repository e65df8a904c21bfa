"""Slow down the polls of followers, so that only notifications arrive in time."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from omnivideo.storage.database import notifications


@contextmanager
def slow_polls() -> Iterator[None]:
    """Set the poll intervals to a minute for the databases that are opened inside the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(notifications, "SQLITE_POLL_SECONDS", 60.0)
        patch.setattr(notifications, "POSTGRESQL_POLL_SECONDS", 60.0)
        notifications.NOTIFIERS.clear()
        yield
    notifications.NOTIFIERS.clear()
