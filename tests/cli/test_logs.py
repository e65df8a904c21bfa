"""The log of a process: text or JSON, with times that have a zone, and without the set-up of other libraries."""

import json
import logging
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from omnivideo.cli.logs import JSONLogFormatter, TextLogFormatter

PROGRAM = """
import logging, sys
logging.basicConfig(level=logging.ERROR, format="someone else: %(message)s")  # as a library might do before
from omnivideo.cli.logs import configure_logging
from omnivideo.settings import load_settings
configure_logging("api", load_settings(), with_traces=False)
logging.getLogger("omnivideo.api").info("GET %s", "/v1/videos", extra={"status": 200})
logging.getLogger("omnivideo.api").debug("details")
logging.getLogger("uvicorn.error").info("started", extra={"color_message": "\\x1b[36mstarted\\x1b[0m"})
"""


def run_program(**environment: str) -> list[str]:
    """Return the lines that the program writes to stderr."""
    root = str(Path(__file__).parents[2])
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": root, "HOME": "/nonexistent"} | environment
    completed = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True)
    return completed.stderr.splitlines()


def test_a_process_logs_json_where_there_is_no_terminal():
    lines = [json.loads(line) for line in run_program(OMNIVIDEO_LOG_FORMAT="auto")]
    assert [(line["message"], line.get("status")) for line in lines] == [("GET /v1/videos", 200), ("started", None)]
    for line in lines:
        assert datetime.fromisoformat(line["time"]).tzinfo is not None
        assert "color_message" not in line and "\x1b" not in json.dumps(line)


def test_format_and_level_are_settings():
    lines = run_program(OMNIVIDEO_LOG_FORMAT="text", OMNIVIDEO_LOG_LEVEL="debug")
    assert [line.split("  ")[-1] for line in lines] == ["GET /v1/videos", "details", "started"]
    assert datetime.fromisoformat(lines[0].split()[0]).tzinfo is not None
    assert run_program(OMNIVIDEO_LOG_LEVEL="error") == []


@pytest.mark.parametrize("formatter", [JSONLogFormatter(), TextLogFormatter()])
def test_a_traceback_has_no_words_of_a_request(formatter, caplog):
    words = "what a user has said"
    try:
        try:
            raise KeyError(words)
        except KeyError as error:
            raise ValueError(words.upper()) from error
    except ValueError:
        record = logging.LogRecord("omnivideo", logging.ERROR, "", 0, "it failed", (), sys.exc_info())
    caplog.set_level(logging.INFO)
    text = formatter.format(record)
    assert all(part in text for part in ("it failed", "builtins.KeyError", "builtins.ValueError", __file__))
    assert words not in text and words.upper() not in text
    record.exc_text = None  # the formatter's cache
    caplog.set_level(logging.DEBUG)
    assert f"ValueError: {words.upper()}" in formatter.format(record)


def test_fields_have_no_terminal_codes():
    record = logging.makeLogRecord({"msg": "\x1b[31mred\x1b[0m", "route": "\x1b[1m/v1\x1b[0m"})
    fields = json.loads(JSONLogFormatter().format(record))
    assert (fields["message"], fields["route"]) == ("red", "/v1")
