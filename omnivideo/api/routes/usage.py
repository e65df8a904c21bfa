"""What a key has used by day, and what it may use."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel

from omnivideo.api.access import Access, require_scope
from omnivideo.api.dependencies import ID_DESCRIPTION, ID_PATTERN, ContextDep, OwnerDep
from omnivideo.api.errors import ERROR_RESPONSES
from omnivideo.api.request_body import ServiceRoute
from omnivideo.records import KeyLimits, UsageRecord

router = APIRouter(route_class=ServiceRoute, prefix="/v1/usage", tags=["usage"], responses=ERROR_RESPONSES)
ALL_KEYS = "all"
OptionalKeyId = Annotated[str | None, Query(pattern=ID_PATTERN, description=ID_DESCRIPTION)]


class UsageDay(BaseModel):
    """What a key has used on a day (UTC).

    `steps` are denoising steps, `device_seconds` the time of workers, also for clips that have failed. Tokens are those
    of the language model: of requests' texts, and of answers with their reasoning. `stored_bytes` were written on that
    day, whether or not they were deleted since.
    """

    date: str
    key: str
    clips: int
    images: int
    steps: int
    device_seconds: float
    prompt_tokens: int
    answer_tokens: int
    stored_bytes: int


class UsageLimits(BaseModel):
    """What the key of the request may use; null is without a limit."""

    requests_per_minute: int | None
    open_jobs: int | None
    device_seconds_per_day: float | None
    stored_bytes_per_day: int | None


class UsageReport(BaseModel):
    object: Literal["list"] = "list"
    data: list[UsageDay]
    limits: UsageLimits


@router.get("")
def get_usage(
    request: Request,
    context: ContextDep,
    owner: OwnerDep,
    days: Annotated[int, Query(ge=1, le=400)] = 30,
    key: OptionalKeyId = None,
) -> UsageReport:
    """Return what your key has used on each of the last days on which it was used, the newest first.

    A key that may administer can name another key, or `all`.
    """
    access: Access = request.state.access
    if key not in (None, owner):
        require_scope(access.key, "administer")
    selected = None if key == ALL_KEYS else key or owner
    data = [to_usage_day(record) for record in context.usage.list_usage(selected, days)]
    return UsageReport(data=data, limits=to_usage_limits(access.limits))


def to_usage_day(record: UsageRecord) -> UsageDay:
    fields = record.model_dump(exclude={"owner", "day", "device_seconds"})
    return UsageDay(date=record.date, key=record.owner, device_seconds=round(record.device_seconds, 3), **fields)


def to_usage_limits(limits: KeyLimits) -> UsageLimits:
    return UsageLimits(**{name: value or None for name, value in limits.model_dump().items()})
