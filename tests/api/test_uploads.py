"""Large bodies are admitted against a budget: what does not fit waits, or is refused with the time to try again."""

import anyio
import pytest

from omnivideo.api import bulkheads
from omnivideo.api.bulkheads import UploadBudget
from omnivideo.errors import PoolBusy

MIB = 2**20
FORM, JSON = b"multipart/form-data; boundary=x", b"application/json"


class Peak:
    """The largest number of bytes that were held at the same time."""

    def __init__(self, budget: UploadBudget):
        self.budget, self.max_bytes, self.count = budget, 0, 0

    async def upload(self, body_bytes: int, content_type: bytes = FORM) -> None:
        async with self.budget.admit(body_bytes, content_type):
            self.max_bytes = max(self.max_bytes, self.budget.used_bytes)
            await anyio.sleep(0.01)
            self.count += 1


def run_uploads(max_bytes: int, sizes: list[tuple[int, bytes]]) -> Peak:
    async def run() -> Peak:
        peak = Peak(UploadBudget(max_bytes))
        async with anyio.create_task_group() as group:
            for body_bytes, content_type in sizes:
                group.start_soon(peak.upload, body_bytes, content_type)
        assert peak.budget.used_bytes == 0
        return peak

    return anyio.run(run)


def test_six_uploads_wait_for_each_other():
    peak = run_uploads(400 * MIB, [(190 * MIB, FORM)] * 6)
    assert peak.count == 6 and peak.max_bytes == 380 * MIB


def test_a_json_body_counts_with_its_copies():
    peak = run_uploads(100 * MIB, [(20 * MIB, JSON)] * 3)
    assert peak.count == 3 and peak.max_bytes == 80 * MIB


def test_one_body_above_the_budget_is_admitted_alone():
    peak = run_uploads(100 * MIB, [(200 * MIB, FORM), (60 * MIB, FORM), (MIB, FORM)])
    assert peak.count == 3 and peak.max_bytes == 200 * MIB


def test_a_body_that_does_not_fit_in_time_is_refused(monkeypatch):
    monkeypatch.setattr(bulkheads, "MAX_UPLOAD_WAIT_SECONDS", 0.05)

    async def run() -> None:
        budget = UploadBudget(100 * MIB)
        async with budget.admit(90 * MIB, FORM):
            with pytest.raises(PoolBusy, match="too many large uploads") as raised:
                async with budget.admit(90 * MIB, FORM):
                    raise AssertionError("it was admitted")
            assert raised.value.retry_after_seconds > 0
        async with budget.admit(90 * MIB, FORM):
            assert budget.used_bytes == 90 * MIB

    anyio.run(run)
