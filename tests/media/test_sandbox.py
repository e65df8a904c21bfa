"""The process that decodes media of users; each test is named after an attack on the parent."""

import json
import os
import pickle
import subprocess
import sys
import threading
import time

import pytest

from omnivideo.errors import DecodingBusy, UnreadableMedia
from omnivideo.media import sandbox
from omnivideo.media.ingest import ingest_media
from omnivideo.media.limits import MediaLimits
from omnivideo.media.sandbox import ProcessLimits
from omnivideo.storage.objects.memory import MemoryObjectStore
from tests.support.foreign_media import encode_clip, ingest_refusal
from tests.support.openai_service import wait_until


@pytest.fixture
def replace_child_reader(monkeypatch):
    """Return a function that replaces the reader in the child's program by an expression."""

    def replaced(reader: str) -> None:
        program = sandbox.CHILD_PROGRAM.replace(
            "sandbox.run_in_child()", f"sandbox.build_report = lambda limits: {reader}; "
        )
        monkeypatch.setattr(sandbox, "CHILD_PROGRAM", program + "sandbox.run_in_child()")

    return replaced


TRUE = {"width": 48, "height": 64, "frames": 9, "fps": 8.0, "kind": "video"}


def test_attack_child_that_exhausts_memory(replace_child_reader, noise_mp4):
    replace_child_reader(f"(bytearray(2**30), {TRUE})[1]")
    assert (
        ingest_media(
            MemoryObjectStore(), noise_mp4, "user", process_limits=ProcessLimits(max_memory_bytes=2**31)
        ).frames
        == 9
    )
    assert "needs more memory than is available" in ingest_refusal(
        noise_mp4, process_limits=ProcessLimits(max_memory_bytes=2**26)
    )


def test_attack_child_that_sleeps(replace_child_reader, noise_mp4):
    replace_child_reader("__import__('time').sleep(60)")
    assert "its decoder is stuck" in ingest_refusal(noise_mp4, process_limits=ProcessLimits(idle_seconds=0.6))


def test_attack_child_that_computes_without_end(replace_child_reader, noise_mp4):
    replace_child_reader("sum(0 for _ in iter(int, 1))")
    text = ingest_refusal(noise_mp4, process_limits=ProcessLimits(cpu_seconds=1))
    assert "takes more than 1 seconds of CPU time to read; allowed: a shorter or smaller source" in text


def test_attack_child_that_outlives_its_parent(noise_mp4, monkeypatch, replace_child_reader):
    replace_child_reader("__import__('time').sleep(60)")
    monkeypatch.setattr(sandbox, "read_report", lambda process, watch: process.stdout.read())
    with pytest.raises(DecodingBusy, match="too busy"):
        sandbox.measure_in_sandbox(noise_mp4, process_limits=ProcessLimits(wall_seconds=0.3))


def test_a_process_that_gets_no_cpu_is_waited_for(noise_mp4, monkeypatch):
    """A process that is ready to run, but is given no CPU, is neither refused nor taken for stuck."""
    watch = sandbox.ProcessWatch(os.getpid(), ProcessLimits(idle_seconds=0.05))
    monkeypatch.setattr(watch, "read_threads", lambda: (7, True))
    for _ in range(3):
        watch.check_activity()
        time.sleep(0.1)
    monkeypatch.setattr(watch, "read_threads", lambda: (7, False))
    time.sleep(0.1)
    with pytest.raises(TimeoutError):
        watch.check_activity()


def test_a_busy_machine_takes_longer_and_refuses_nothing(monkeypatch):
    """As many processes as CPUs compete with the reader, and the limit of CPU time is just above the need."""
    clip = encode_clip(times=range(300))
    spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        started_at = time.monotonic()
        limits = ProcessLimits(cpu_seconds=3, idle_seconds=1)
        assert sandbox.measure_in_sandbox(clip, process_limits=limits).frames == 300
        assert time.monotonic() - started_at < limits.wall_seconds
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


@pytest.mark.parametrize("signal", [6, 9, 11])
def test_attack_child_that_crashes(replace_child_reader, noise_mp4, signal):
    replace_child_reader(f"sandbox.os.kill(sandbox.os.getpid(), {signal})")
    assert "is damaged" in ingest_refusal(noise_mp4)


def test_attack_child_that_floods_its_output(replace_child_reader, noise_mp4):
    replace_child_reader("[sandbox.os.write(1, bytes(65536)) for _ in iter(int, 1)]")
    assert "is damaged" in ingest_refusal(noise_mp4)


def test_attack_child_that_lies(replace_child_reader, noise_mp4):
    replace_child_reader(repr(TRUE))
    assert ingest_media(MemoryObjectStore(), noise_mp4, "user").frames == 9
    for lie in (
        {"width": -1}, {"height": "64"}, {"frames": True}, {"fps": float("nan")}, {"fps": float("inf")}, {"fps": None},
        {"kind": "../x"}, {"kind": "image"}, {"frames": 10**9}, {"width": 10**9}, {"more": 1},
    ):  # fmt: skip
        said = json.dumps(TRUE | lie).encode()
        with pytest.raises(UnreadableMedia):
            sandbox.parse_report(said, 0, MediaLimits(), ProcessLimits())


@pytest.mark.parametrize(
    "said", [b"", b"[]", b"[" * 4000, b"null", b"\xff", pickle.dumps({"width": 1}), b'{"refused": 1}']
)
def test_attack_invalid_report(said):
    with pytest.raises(UnreadableMedia, match="is damaged"):
        sandbox.parse_report(said, 0, MediaLimits(), ProcessLimits())


def test_a_refusal_cannot_break_the_line():
    with pytest.raises(UnreadableMedia) as caught:
        sandbox.parse_report(json.dumps({"refused": "a\nb" + "c" * 9000}).encode(), 0, MediaLimits(), ProcessLimits())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_attack_child_that_looks_for_secrets_files_and_descriptors(
    replace_child_reader, noise_mp4, monkeypatch, tmp_path
):
    monkeypatch.setenv("OMNIVIDEO_DATABASE", "postgresql://secret")
    with (tmp_path / "secret").open("wb") as held:
        os.set_inheritable(held.fileno(), True)
        replace_child_reader(
            "{'refused': ' '.join([*sorted(sandbox.os.environ), *sandbox.os.listdir('/proc/self/fd'), "
            "*(str(sandbox.resource.getrlimit(what)[1]) for what in (1, 4, 7))])}"
        )
        told = ingest_refusal(noise_mp4).removeprefix("source: 'clip.mp4' ").split()
    assert set(told) <= {"LC_CTYPE", "LD_LIBRARY_PATH", *sandbox.build_child_environment(), *"01236", "16"}
    assert told[-3:] == ["0", "0", "16"]  # limits of file size, core dump size and open files


def test_attack_child_that_writes_a_file(replace_child_reader, noise_mp4, tmp_path):
    replace_child_reader(f"sandbox.Path({str(tmp_path / 'a')!r}).write_bytes(b'owned')")
    ingest_refusal(noise_mp4)
    assert (tmp_path / "a").read_bytes() == b""


def test_a_process_that_cannot_be_started_is_reported(noise_mp4, monkeypatch):
    monkeypatch.setattr(sandbox.sys, "executable", "/none/python")
    with pytest.raises(DecodingBusy, match="no process can be started"):
        sandbox.measure_in_sandbox(noise_mp4)


def test_owners_get_processes_in_turn():
    slots, order = sandbox.FairSlots(1), []

    def work(owner: str) -> None:
        assert slots.acquire(owner, 20)
        order.append(owner)
        slots.release()

    assert slots.acquire("first", 0)
    threads = []
    for number, owner in enumerate("aaabbc"):
        threads.append(threading.Thread(target=work, args=(owner,)))
        threads[-1].start()
        wait_until(lambda number=number: sum(map(len, slots.waiting.values())) == number + 1)
    assert not slots.acquire("a", 0.01)  # it leaves the line
    slots.release()
    for thread in threads:
        thread.join(20)
    assert order == ["a", "b", "c", "a", "b", "a"] and (slots.num_free, slots.waiting) == (1, {})


def test_too_many_processes_at_once_are_refused(noise_mp4, monkeypatch):
    monkeypatch.setattr(sandbox, "PROCESS_SLOTS", sandbox.FairSlots(1))
    with sandbox.acquire_process_slot(1), pytest.raises(DecodingBusy, match="too many are being read at once"):
        sandbox.measure_in_sandbox(noise_mp4, process_limits=ProcessLimits(slot_seconds=0.05))
    assert sandbox.measure_in_sandbox(noise_mp4).frames == 9
