"""The commands of the service with an empty home folder: what they start, print and refuse."""

import gc
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from fastapi import FastAPI

from omnivideo.cli import serve, service
from omnivideo.cli.main import main
from omnivideo.settings import load_settings
from omnivideo.wiring import ServiceWiring
from tests.support.servers import free_port, wait_for


@pytest.fixture
def run_cli(monkeypatch, capsys, tmp_path):
    """Return a function that runs a command line and returns its exit code, stdout and stderr."""
    monkeypatch.setenv("OMNIVIDEO_HOME", str(tmp_path / "home"))
    for module in (serve, service):
        monkeypatch.setattr(module, "configure_logging", lambda *arguments, **options: None)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["omnivideo", *arguments])
        with pytest.raises(SystemExit) as raised:
            main()
        printed = capsys.readouterr()
        return raised.value.code or 0, printed.out, printed.err

    yield run
    gc.unfreeze()


def test_serve_builds_the_application_and_closes_its_wiring(run_cli, monkeypatch, weights):
    served, closed, collections = [], [], []

    def run_server(create_application, *arguments) -> None:
        served.append(create_application())
        started_at = time.thread_time()
        gc.collect()
        collections.append(time.thread_time() - started_at)

    monkeypatch.setattr(serve, "run_server", run_server)
    monkeypatch.setattr(serve, "limit_exit_time", lambda: None)  # it would end the process of the tests
    close = ServiceWiring.close
    monkeypatch.setattr(ServiceWiring, "close", lambda wiring: closed.append(wiring) or close(wiring))
    assert run_cli("serve", "--weights", str(weights), "--port", str(free_port()))[0] == 0
    (application,) = served
    assert isinstance(application, FastAPI) and "/v1/videos" in application.openapi()["paths"]
    (wiring,) = closed
    assert wiring.close_callbacks == []
    assert max(collections) < 0.1  # s in which no request is answered; all objects of torch took 0.7 s


def test_serve_refuses_other_hosts_without_a_key(run_cli):
    code, _, err = run_cli("serve", "--host", "0.0.0.0")
    assert code == 2 and "OMNIVIDEO_ADMIN_KEY: it is empty" in err


def test_worker_needs_a_broker(run_cli):
    code, _, err = run_cli("worker")
    assert code == 2 and "OMNIVIDEO_BROKER: it is empty" in err


def test_migrate_and_sweep_work_on_an_empty_home(run_cli, weights, monkeypatch):
    monkeypatch.setenv("OMNIVIDEO_WEIGHTS", str(weights))
    assert run_cli("migrate")[:2] == (0, "the database has the latest schema\n")
    assert run_cli("sweep")[:2] == (0, "0 artifacts removed\n")


def test_keys_are_created_listed_and_revoked(run_cli):
    key_id, key = run_cli("keys", "add", "ann")[1].split()
    assert key.startswith("ov_")
    assert run_cli("keys", "list")[1] == f"{key_id}  ann\n"
    assert run_cli("keys", "revoke", key_id)[:2] == (0, "revoked\n")
    assert run_cli("keys", "list")[1] == f"{key_id}  ann  revoked\n"
    code, _, err = run_cli("keys", "revoke", "key_unknown")
    assert code == 2 and "key: there is no key 'key_unknown'" in err


def test_a_key_is_limited_and_its_use_is_shown(run_cli, tmp_path):
    options = ("--requests-per-minute", "60", "--device-seconds-per-day", "none", "--scopes", "read,administer")
    key_id, _ = run_cli("keys", "add", "ann", "--expires-in-days", "7", *options)[1].split()
    described = f"{key_id}  ann  scopes read,administer  requests_per_minute 60  device_seconds_per_day none  expires "
    assert run_cli("keys", "list")[1].startswith(described)
    limited = run_cli("keys", "limit", key_id, "--requests-per-minute", "default", "--expires-in-days", "0",
                      "--stored-bytes-per-day", "1000000")  # fmt: skip
    assert limited[:2] == (
        0, f"{key_id}  ann  scopes read,administer  device_seconds_per_day none  stored_bytes_per_day 1000000\n"
    )  # fmt: skip
    for arguments, message in (
        (("--open-jobs", "-1"), "open-jobs: it is '-1'; allowed: 1 to 1000000, none, default"),
        (("--scopes", "write"), "scopes: it is 'write'; allowed: read, generate, administer, with commas between"),
    ):
        code, _, err = run_cli("keys", "limit", key_id, *arguments)
        assert code == 2 and message in err
    assert "key: there is no key 'key_unknown'" in run_cli("keys", "limit", "key_unknown")[2]
    wiring = ServiceWiring(load_settings(home=tmp_path / "home"))
    wiring.usage.add_usage(key_id, clips=2, steps=40, device_seconds=12.25, stored_bytes=345)
    wiring.close()
    for arguments in ((), (key_id,)):
        header, row = run_cli("keys", "usage", *arguments)[1].splitlines()
        assert header.split()[:3] == ["date", "key", "clips"]
        assert row.split()[1:] == [key_id, "2", "0", "40", "12.2", "0", "0", "345"]
    assert len(run_cli("keys", "usage", "key_unknown")[1].splitlines()) == 1


def test_a_key_without_an_admin_key_leaves_the_service_open(run_cli, monkeypatch):
    assert "warning: OMNIVIDEO_ADMIN_KEY is empty, so the service answers everyone" in run_cli("keys", "add", "ann")[2]
    monkeypatch.setenv("OMNIVIDEO_ADMIN_KEY", "a-key-for-the-tests")
    assert run_cli("keys", "add", "ben")[2] == ""


def test_nothing_is_started_where_the_port_is_taken(run_cli, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for command in (["serve"], ["mllm", "serve", "--engine", "transformers"]):
            code, _, err = run_cli(*command, "--port", port)
            assert (code, err) == (2, f"error: port: another process listens on {port}; give another with --port\n")
    assert not (tmp_path / "home").exists()  # no database, so no job was claimed
    code, _, err = run_cli("serve", "--host", "no.such.host.invalid")
    assert code == 2 and ("host: " in err or "OMNIVIDEO_ADMIN_KEY" in err)


def test_misspelt_options_of_the_log_are_refused(run_cli):
    code, _, err = run_cli("serve", "--log-level", "loud")
    assert code == 2 and "OMNIVIDEO_LOG_LEVEL: allowed: debug, info, warning, error" in err


SERVER_PROGRAM = """
import sys
from starlette.applications import Starlette
from omnivideo.cli.service import listen, run_server
try:
    run_server(Starlette, listen("127.0.0.1", int(sys.argv[1])))
finally:
    print("closed", flush=True)
"""


@pytest.mark.parametrize("stop_signal", [signal.SIGTERM, signal.SIGINT])
def test_what_follows_the_server_runs_after_a_stop_signal(stop_signal):
    """uvicorn sends itself the signal again, which ended the process before the wiring was closed."""
    port = free_port()
    command = [sys.executable, "-c", SERVER_PROGRAM, str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=dict(os.environ))
    try:
        wait_for(port, process)
        process.send_signal(stop_signal)
        output, _ = process.communicate(timeout=20)
        assert output == b"closed\n" and process.returncode == 0
    finally:
        process.kill()
