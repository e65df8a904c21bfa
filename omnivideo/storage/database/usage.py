"""What each key has used by day, and what it may still use. The counts are in the database, for all processes.

A key's own limits are columns of api_keys, where null stands for the default of the settings and 0 for no limit. The
admin key has no daily limits.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Engine,
    Integer,
    Row,
    ScalarSelect,
    Select,
    Update,
    and_,
    case,
    delete,
    func,
    literal,
    or_,
    select,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import FunctionElement

from omnivideo.errors import SECONDS_PER_DAY, LimitReached, compute_seconds_until_midnight
from omnivideo.records import REQUEST_WINDOW_SECONDS, KeyLimits, RequestWindow, UsageRecord
from omnivideo.storage.database.repository import Repository, record_from_row, unix_now
from omnivideo.storage.database.schema import api_keys, jobs, request_windows, usage_days

ADMIN_OWNER = "admin"
USAGE_LIFETIME_DAYS = 400
COUNTED_COLUMNS = tuple(column for column in usage_days.columns if column.name not in ("owner", "day"))
# What is limited by the day: the columns of api_keys and of usage_days, and the limit's name.
DAILY_LIMITS = (
    ("device_seconds_per_day", "device_seconds", "device-seconds"),
    ("stored_bytes_per_day", "stored_bytes", "stored-bytes"),
)


class unix_day(FunctionElement[int]):
    """Days since 1970 by the database's clock (UTC)."""

    type = Integer()
    inherit_cache = True


@compiles(unix_day, "sqlite")
def compile_unix_day_sqlite(element: unix_day, compiler: SQLCompiler, **kw: object) -> str:
    return "CAST(julianday('now') - 2440587.5 AS INTEGER)"


@compiles(unix_day, "postgresql")
def compile_unix_day_postgresql(element: unix_day, compiler: SQLCompiler, **kw: object) -> str:
    return "floor(extract(epoch from clock_timestamp()) / 86400)::integer"


def build_daily_error(limit: str, quota: float) -> LimitReached:
    """Return the error of a key that has used up its share of the day."""
    name = limit.replace("-", " ")
    message = f"{name}: this key may use {quota:.12g} a day, and they are used up; the next day begins at 00:00 UTC"
    return LimitReached(message, compute_seconds_until_midnight(), limit, quota, SECONDS_PER_DAY)


# ---------------------------------------------------------------- expressions


def build_limit(owner: str, column_name: str, defaults: KeyLimits) -> ScalarSelect[Any] | ColumnElement[Any]:
    """Return a key's limit as an expression; 0 is none."""
    default = 0 if owner == ADMIN_OWNER and column_name != "open_jobs" else getattr(defaults, column_name)
    own = select(api_keys.c[column_name]).where(api_keys.c.id == owner).scalar_subquery()
    return func.coalesce(own, default)


def build_used_today(owner: str, column_name: str) -> ColumnElement[Any]:
    is_today = and_(usage_days.c.owner == owner, usage_days.c.day == unix_day())
    return func.coalesce(select(usage_days.c[column_name]).where(is_today).scalar_subquery(), 0)


def select_exhausted_owners(defaults: KeyLimits) -> Select[Any]:
    """Select the owners that have used up a share of the day."""
    is_exhausted = []
    for limit_column, used_column, _ in DAILY_LIMITS:
        limit = func.coalesce(api_keys.c[limit_column], getattr(defaults, limit_column))
        is_exhausted.append(and_(limit > 0, usage_days.c[used_column] >= limit))
    source = usage_days.outerjoin(api_keys, api_keys.c.id == usage_days.c.owner)
    is_counted = and_(usage_days.c.day == unix_day(), usage_days.c.owner != ADMIN_OWNER)
    return select(usage_days.c.owner).select_from(source).where(is_counted, or_(*is_exhausted))


# ---------------------------------------------------------------- counting


class UsageCounter(Repository):
    """Adds to what keys have used today."""

    def build_addition(self, additions: Iterable[tuple[str, dict[str, float]]]) -> Any:
        """Return the statement that adds to what owners have used today, or None if there is nothing to add."""
        totals = defaultdict[str, dict[str, float]](lambda: {column.name: 0 for column in COUNTED_COLUMNS})
        for owner, counts in additions:
            for name, count in counts.items():
                totals[owner][name] += count
        if not totals:
            return None
        rows = [{"owner": owner, "day": unix_day(), **totals[owner]} for owner in sorted(totals)]
        insertion = self.insert_into(usage_days).values(rows)
        sums = {column.name: column + insertion.excluded[column.name] for column in COUNTED_COLUMNS}
        return insertion.on_conflict_do_update(index_elements=[usage_days.c.owner, usage_days.c.day], set_=sums)

    def add_usage(self, owner: str, **counts: float) -> None:
        """Add to what an owner has used today; the names are columns of usage_days."""
        self.fetch_all(self.build_addition([(owner, counts)]))

    def count_attempts(
        self, ending: Update, until: ColumnElement[Any] | None, *columns: ColumnElement[Any], stored_bytes: int = 0
    ) -> Sequence[Row[Any]]:
        """Run a statement that ends attempts of jobs, and count in the same transaction what they have used.

        The attempts have run from `started_at` until `until`, which is None for jobs that no worker had. A pass of
        several jobs counts for each of them in equal parts. Return the rows, with the given columns.
        """
        seconds = (literal(0.0) if until is None else until - jobs.c.started_at).label("used_seconds")
        used = (jobs.c.owner, jobs.c.state, jobs.c.step, jobs.c.result, jobs.c.batch_job_ids, seconds)
        return self.fetch_and_follow(
            ending.returning(*columns, *used),
            lambda rows: self.build_addition((row.owner, count_attempt(row, stored_bytes)) for row in rows),
        )


def count_attempt(row: Row[Any], stored_bytes: int) -> dict[str, float]:
    """Return what an attempt has used; the steps and the clip are counted when the job ends."""
    has_ended, result = row.state not in ("queued", "running"), row.result or {}
    is_done = row.state == "done"
    return {
        "device_seconds": max(0.0, row.used_seconds or 0.0) / max(1, len(row.batch_job_ids or ())),
        "steps": row.step if has_ended else 0,
        "clips": int(is_done and result.get("medium") == "video"),
        "images": int(is_done and result.get("medium") == "image"),
        "stored_bytes": stored_bytes,
    }


class UsageRepository(UsageCounter):
    """What keys have used and may use. `defaults` are the limits of keys that have no own ones."""

    def __init__(self, engine: Engine, defaults: KeyLimits | None = None):
        super().__init__(engine)
        self.defaults = defaults or KeyLimits()

    def count_request(self, owner: str) -> RequestWindow:
        """Count a request of the owner in the current minute, which begins with the first request after the last."""
        count = request_windows.c.request_count
        has_ended = request_windows.c.started_at <= unix_now() - REQUEST_WINDOW_SECONDS
        insertion = self.insert_into(request_windows).values(owner=owner, started_at=unix_now(), request_count=1)
        update = {
            "started_at": case((has_ended, unix_now()), else_=request_windows.c.started_at),
            "request_count": case((has_ended, 1), else_=count + 1),
        }
        upsert = insertion.on_conflict_do_update(index_elements=[request_windows.c.owner], set_=update)
        seconds_left = request_windows.c.started_at + REQUEST_WINDOW_SECONDS - unix_now()
        row = self.fetch_one(upsert.returning(count, seconds_left.label("seconds_left")))
        assert row is not None
        return RequestWindow(request_count=row.request_count, seconds_left=max(0.0, row.seconds_left))

    @contextmanager
    def reserve_bytes(self, owner: str, size_bytes: int) -> Iterator[None]:
        """Count bytes that are stored within the context; they are not counted if that fails.

        Raises LimitReached if the key may not store them today.
        """
        self.count_bytes(owner, size_bytes)
        try:
            yield
        except BaseException:
            self.add_usage(owner, stored_bytes=-size_bytes)
            raise

    def count_bytes(self, owner: str, size_bytes: int) -> None:
        """Count bytes that are about to be stored. Raises LimitReached if the key may not store them today."""
        limit = build_limit(owner, "stored_bytes_per_day", self.defaults)
        addition = self.build_addition([(owner, {"stored_bytes": 0})])
        used = usage_days.c.stored_bytes
        self.fetch_all(addition)  # so that there is a row
        is_today = and_(usage_days.c.owner == owner, usage_days.c.day == unix_day())
        fits = or_(limit == 0, used + size_bytes <= limit)
        reservation = usage_days.update().where(is_today, fits).values(stored_bytes=used + size_bytes)
        if self.fetch_one(reservation.returning(used)) is None:
            row = self.fetch_one(select(limit))
            raise build_daily_error("stored-bytes", row[0] if row else 0)

    def check_daily_limits(self, owner: str) -> None:
        """Raise LimitReached if the key has used up a share of the day."""
        columns = [
            expression.label(f"{kind}_{used_column}")
            for limit_column, used_column, _ in DAILY_LIMITS
            for kind, expression in (
                ("limit", build_limit(owner, limit_column, self.defaults)),
                ("used", build_used_today(owner, used_column)),
            )
        ]
        row = self.fetch_one(select(*columns))
        assert row is not None
        for _, used_column, name in DAILY_LIMITS:
            limit, used = getattr(row, f"limit_{used_column}"), getattr(row, f"used_{used_column}")
            if 0 < limit <= used:
                raise build_daily_error(name, limit)

    def list_usage(self, owner: str | None, num_days: int) -> list[UsageRecord]:
        """Return the use of the last `num_days` days, of one owner or of all, the newest day first."""
        is_recent = usage_days.c.day > unix_day() - num_days
        query = select(usage_days).where(is_recent if owner is None else and_(is_recent, usage_days.c.owner == owner))
        rows = self.fetch_all(query.order_by(usage_days.c.day.desc(), usage_days.c.owner))
        return [record_from_row(UsageRecord, row) for row in rows]

    def delete_old_usage(self) -> None:
        """Forget what was used more than USAGE_LIFETIME_DAYS ago."""
        self.fetch_all(delete(usage_days).where(usage_days.c.day < unix_day() - USAGE_LIFETIME_DAYS))
