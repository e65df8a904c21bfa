"""Batches at work: lines in, one line out for each, whoever dies in between.

What is known of a line is in the database: its jobs, under ids that follow from batch and line, and then its outcome,
which is written once.  A runner holds nothing else that matters, so another one goes on where it was: jobs that are
there are not asked for again, lines that have an outcome are left alone.
"""

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Collection
from typing import Any

from omnivideo.backends.lines import CHAT, Held, Outcome, Wire
from omnivideo.contracts import JobStatus
from omnivideo.errors import Busy, ModelAway, NotStored, OmniVideoError, StoreError
from omnivideo.ports import ObjectStore
from omnivideo.storage.jobs import Jobs
from omnivideo.storage.records import Records

log = logging.getLogger("omnivideo.batches")
MOST_LINES = 50_000
MOST_TROUBLE = 100  # wrong lines that are named
WINDOW = 86_400.0  # seconds after which a batch expires
HELD_MOST = 8  # batches that one runner works on at the same time
SLICE = 1.0  # seconds that a batch may submit before the others have their turn
SOME = 500  # outcomes that are written or read at once
LATER = (Busy, StoreError, ModelAway)  # no fault of the line: it is tried again
OURS = {"code": "internal", "message": "something went wrong on our side"}
Say = Callable[[str, dict[str, Any]], dict[str, Any]]


class BatchRunner:
    """Works batches off in a thread of this process.  Any number of processes may.

    `say` answers a chat line; `silent` is when another runner counts as lost, in seconds; `most` bounds the jobs that
    one batch has open.
    """

    def __init__(
        self, records: Records, jobs: Jobs, store: ObjectStore, tell: Callable[[], None], wire: Wire, say: Say,
        silent: float = 15.0, most: int = 200, pause: float = 0.2,
    ):  # fmt: skip
        self.records, self.jobs, self.store, self.tell, self.wire, self.say = records, jobs, store, tell, wire, say
        self.silent, self.most, self.pause = silent, most, pause
        self.name = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self.held: dict[str, Held] = {}
        self.over = threading.Event()
        self.threads = [
            threading.Thread(target=self.run, daemon=True, name="batches"),
            threading.Thread(target=self.beat, daemon=True, name="batches-beat"),
        ]

    def start(self) -> "BatchRunner":
        for thread in self.threads:
            thread.start()
        return self

    def stop(self) -> None:
        """Leaves what it holds to the next runner."""
        self.over.set()
        for thread in self.threads:
            thread.join()
        self.records.leave_batches(self.name)
        for batch_id in list(self.held):
            self.let_go(batch_id)

    def beat(self) -> None:
        """Lives while a line takes its time."""
        while not self.over.wait(self.silent / 4):
            try:
                self.records.beat_batches(self.name, list(self.held))
            except OmniVideoError as error:
                log.warning("%s", error)

    def run(self) -> None:
        while not self.over.wait(self.pause if self.held else 5 * self.pause):
            try:
                self.look()
            except OmniVideoError as error:
                log.warning("%s", error)
                self.over.wait(1.0)
            except Exception:
                log.exception("batches")
                self.over.wait(1.0)

    # ------------------------------------------------------------ one round

    def look(self) -> None:
        """Takes on what nobody works on, and brings each batch that it holds a little further."""
        while len(self.held) < HELD_MOST and (row := self.records.take_batch(self.name, self.silent)):
            self.take(row)
        for held in list(self.held.values()):
            try:
                self.further(held)
                held.faults = 0
            except LATER:
                raise
            except Exception:
                log.exception("batch %s", held.id)
                self.faulty(held)

    def take(self, row: Any) -> None:
        try:
            data = self.store.get(self.records.input_of(row.id))
        except NotStored:
            self.refuse(row, [{"code": "not_found", "message": "the input file is not here any more"}])
            return
        log.info("batch %s: %s", row.id, row.state)
        self.let_go(row.id)  # after a silence of our own somebody else may have had it
        self.held[row.id] = Held(row, data, self.records.lines_done(row.id))

    def faulty(self, held: Held) -> None:
        """A batch that we fail at three times in a row fails itself, and no other one has to wait for it."""
        held.faults += 1
        if held.faults == 3 and (row := self.records.held_batch(held.id, self.name)):
            self.refuse(row, [OURS])

    def further(self, held: Held) -> None:
        row = self.records.held_batch(held.id, self.name)
        if row is None:
            self.let_go(held.id)
        elif row.state == "validating":
            self.validate(held, row)
        elif row.state == "cancelling" and not row.counts["total"]:
            self.end(held, row, "cancelled")
        else:
            self.work(held, row)

    def work(self, held: Held, row: Any) -> None:
        if row.state == "cancelling":
            held.stopping = "batch_cancelled"
        elif row.state == "in_progress" and time.time() > row.made + WINDOW:
            held.stopping = "batch_expired"
        total = row.counts["total"]
        self.ask(held, total)
        self.collect(held, total)
        if len(held.done) == total:
            self.finish(held, row)

    def let_go(self, batch_id: str) -> None:
        if (held := self.held.pop(batch_id, None)) is not None:
            held.close()

    # ------------------------------------------------------------ validating

    def validate(self, held: Held, row: Any) -> None:
        """Every line is looked at before the first is worked on; what is wrong with them is said by line."""
        wrong: list[dict[str, Any]] = []
        seen: set[str] = set()
        total = 0
        for total, (number, data) in enumerate(held.lines(), start=1):
            if wrong_here := self.fault(number, data, held.endpoint, seen):
                wrong.append(wrong_here)
            if len(wrong) == MOST_TROUBLE or total > MOST_LINES:
                break
        if not 1 <= total <= MOST_LINES:
            wrong = [{"code": "too_many_lines" if total else "empty", "message": f"allowed: 1 to {MOST_LINES} lines"}]
        if wrong:
            self.refuse(row, wrong)
        else:
            self.records.move(row, "in_progress", self.name, counts=held.counts(total))

    def fault(self, number: int, data: bytes, endpoint: str, seen: set[str]) -> dict[str, Any] | None:
        try:
            custom_id, _, _ = self.wire.read(data, endpoint)
        except OmniVideoError as error:
            field = getattr(error, "field", None)
            return {"code": "invalid_line", "message": str(error), "line": number, "param": field}
        if custom_id in seen:
            text = f"custom_id: {custom_id[:100]!r} is an earlier line's, too"
            return {"code": "duplicate_custom_id", "message": text, "line": number, "param": "custom_id"}
        seen.add(custom_id)
        return None

    def refuse(self, row: Any, trouble: list[dict[str, Any]]) -> None:
        self.records.move(row, "failed", self.name, trouble=trouble)
        self.let_go(row.id)

    # ------------------------------------------------------------ asking

    def ask(self, held: Held, total: int) -> None:
        """Turns lines into jobs as long as there is room for them."""
        until, outcomes = time.monotonic() + SLICE, list[Outcome]()
        room = self.most - len(held.jobs())
        while room > 0 and time.monotonic() < until and len(outcomes) < SOME and (line := held.next()):
            try:
                outcome = self.asked(held, *line)
            except LATER as error:
                held.waits = line
                if isinstance(error, Busy):
                    break
                raise
            if outcome is not None:
                outcomes.append(outcome)
            room -= len(held.open.get(line[0], ("", []))[1])
            if held.endpoint == CHAT:  # which is not to be said again
                self.keep(held, total, outcomes)
                outcomes = []
        self.keep(held, total, outcomes)

    def asked(self, held: Held, number: int, data: bytes) -> Outcome | None:
        """Sees to the line's jobs; what became of it, where that is known at once."""
        custom_id, url, fields = self.wire.read(data, held.endpoint)
        try:
            if held.endpoint == CHAT:
                if held.stopping:
                    return held.stopped(number, custom_id)
                return held.answered(number, custom_id, 200, self.say(held.owner, fields))
            names = self.wire.names(url, fields, held.name(number))
            there = {status.id for status in self.jobs.statuses(names)}
            if len(there) < len(names):
                if held.stopping:
                    self.cancel(there)
                    return held.stopped(number, custom_id)
                self.submit(held, self.wire.orders(held.owner, url, fields, held.name(number)), there)
            held.open[number] = (custom_id, names)
            return None
        except LATER:
            raise
        except Exception as error:
            if not isinstance(error, OmniVideoError):
                log.exception("batch %s, line %d", held.id, number)
            return held.answered(number, custom_id, *self.wire.refusal(error))

    def submit(self, held: Held, orders: Collection[Any], there: set[str]) -> None:
        for order in orders:
            if order.job.id not in there and self.jobs.submit(order.job, held.owner, "batch", order.kind, order.meta):
                self.tell()

    def cancel(self, names: Collection[str]) -> None:
        for name in names:
            self.jobs.cancel(name)

    # ------------------------------------------------------------ collecting

    def collect(self, held: Held, total: int) -> None:
        """Writes down what became of the lines whose jobs have all ended."""
        if held.stopping:
            self.cancel(held.jobs())
        ended = {status.id: status for status in self.records.ended(held.jobs())}
        whole = [number for number, (_, names) in held.open.items() if all(name in ended for name in names)]
        outcomes = [self.outcome(held, number, [ended[name] for name in held.open[number][1]]) for number in whole]
        self.keep(held, total, outcomes)

    def outcome(self, held: Held, number: int, statuses: list[JobStatus]) -> Outcome:
        custom_id = held.open[number][0]
        if all(status.state == "done" for status in statuses):
            return held.answered(number, custom_id, 200, self.wire.answer(held.endpoint, statuses))
        if held.stopping and any(status.state == "cancelled" for status in statuses):
            return held.stopped(number, custom_id)
        return held.answered(number, custom_id, *self.wire.refusal(self.wire.trouble(statuses)))

    def keep(self, held: Held, total: int, outcomes: list[Outcome]) -> None:
        if not outcomes:
            return
        done = held.done | {number: ok for number, ok, _ in outcomes}
        self.records.keep_lines(held.id, outcomes)
        held.done = done
        self.records.count(held.id, held.counts(total))
        for number, _, _ in outcomes:
            held.open.pop(number, None)

    # ------------------------------------------------------------ finishing

    def finish(self, held: Held, row: Any) -> None:
        """The files, once; a runner that comes late makes the same ones, and changes nothing."""
        if row.state == "in_progress" and not held.stopping:
            self.records.move(row, "finalizing", self.name)
            return  # the next round goes on
        last = {"finalizing": "completed", "cancelling": "cancelled", "in_progress": "expired"}[row.state]
        self.end(held, row, last, output=self.write(held, True), errors=self.write(held, False))

    def end(self, held: Held, row: Any, state: str, **values: Any) -> None:
        # Counted anew: whoever wrote the last lines down may have died before it had counted them.
        if self.records.move(row, state, self.name, counts=held.counts(row.counts["total"]), **values):
            self.records.forget_lines(held.id)
            self.let_go(held.id)

    def write(self, held: Held, ok: bool) -> str | None:
        """The id of the file of the lines that went well, or of the others; None where there are none."""
        data, after = bytearray(), 0
        while some := self.records.lines(held.id, after, SOME):
            after = some[-1].number
            for line in some:
                data += json.dumps(line.answer).encode() + b"\n" if line.ok == ok else b""
        if not data:
            return None
        name = "output" if ok else "errors"
        row = self.records.add_file(
            held.owner, id=f"file-{held.name(0)}-{name}", name=f"{held.id}_{name}.jsonl", purpose="batch_output",
            bytes=len(data), key=self.store.put(bytes(data), "jsonl"), artifact=None,
        )  # fmt: skip
        return str(row.id)
