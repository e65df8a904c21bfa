"""The log of a service's process: text or JSON on stderr, and traces to an OpenTelemetry server.

A log never has a user's words. Of an unexpected exception it has the type and the places, but not the message, which
may quote a request; at the level "debug" it has both.
"""

import json
import logging
import math
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omnivideo.settings import ServiceSettings

MAX_REPETITIONS, REPETITION_SECONDS = 20, 10.0  # of log lines of one kind
TERMINAL_CODE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
VERBOSE_LOGGERS = ("httpx", "httpcore", "httpcore2", "alembic", "celery", "kombu", "amqp", "urllib3")


def format_time(seconds: float) -> str:
    """Return a time in seconds since 1970 as ISO 8601 with milliseconds and the offset of this machine's time zone."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="milliseconds")


ExceptionInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


def list_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception's first cause, then what was raised because of it, and so on to the exception itself."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None:
        yield from list_causes(cause)
    yield error


class WordlessFormatter(logging.Formatter):
    """Formats tracebacks without the messages of exceptions, unless the level is "debug"."""

    def formatException(self, ei: ExceptionInfo) -> str:
        if ei[1] is None or logging.getLogger().isEnabledFor(logging.DEBUG):
            return super().formatException(ei)
        parts = []
        for error in list_causes(ei[1]):
            places = "".join(traceback.format_tb(error.__traceback__))
            parts.append(f"Traceback (most recent call last):\n{places}{type(error).__module__}.{type(error).__name__}")
        return "\n\n".join(parts)


class TextLogFormatter(WordlessFormatter):
    """Formats each record as one line for people, and a traceback below it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s  %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return format_time(record.created)


class JSONLogFormatter(WordlessFormatter):
    """Formats each record as a JSON object on one line, with the fields of its `extra`."""

    # `color_message` is uvicorn's message for terminals.
    left_out_fields = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}

    def format(self, record: logging.LogRecord) -> str:
        fields = {"time": format_time(record.created), "level": record.levelname, "logger": record.name}
        fields |= {"message": record.getMessage()}
        fields |= {name: value for name, value in vars(record).items() if name not in self.left_out_fields}
        if record.exc_info:
            fields["trace"] = self.formatException(record.exc_info)
        texts = {name: TERMINAL_CODE.sub("", value) for name, value in fields.items() if isinstance(value, str)}
        return json.dumps(fields | texts, default=str)


class RepetitionFilter(logging.Filter):
    """Lets at most MAX_REPETITIONS warnings or errors of the same kind pass in REPETITION_SECONDS.

    A client that causes an error with every connection would otherwise fill the disk.
    """

    def __init__(self) -> None:
        super().__init__()
        self.window_started_at = -math.inf
        self.counts: Counter[tuple[str, str]] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        if time.monotonic() - self.window_started_at > REPETITION_SECONDS:
            self.window_started_at = time.monotonic()
            self.counts.clear()
        kind = (record.name, str(record.msg)[:200])
        self.counts[kind] += 1
        if self.counts[kind] == MAX_REPETITIONS:
            record.msg = f"{record.msg} (further lines like this are left out for {REPETITION_SECONDS:g} s)"
        return self.counts[kind] <= MAX_REPETITIONS


def select_formatter(settings: "ServiceSettings") -> type[logging.Formatter]:
    is_text = settings.log_format == "text" or (settings.log_format == "auto" and sys.stderr.isatty())
    return TextLogFormatter if is_text else JSONLogFormatter


def write_logging_configuration(settings: "ServiceSettings") -> str:
    """Write the same configuration to a temporary file, for a program that this process becomes; return its path."""
    level = settings.log_level.upper()
    handler = {"class": "logging.StreamHandler", "formatter": "ours", "filters": ["repetitions"]}
    configuration = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"ours": {"()": f"{__name__}.{select_formatter(settings).__name__}"}},
        "filters": {"repetitions": {"()": f"{__name__}.{RepetitionFilter.__name__}"}},
        "handlers": {"stderr": handler},
        "root": {"level": level, "handlers": ["stderr"]},
        "loggers": {name: {"level": "WARNING"} for name in VERBOSE_LOGGERS},
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json", prefix="omnivideo-logs-", delete=False) as file:
        json.dump(configuration, file)
    return file.name


def configure_logging(component: str, settings: "ServiceSettings", with_traces: bool = True) -> None:
    """Log to stderr as the settings say, and export traces if they say so.

    This replaces what a library, such as Celery, has set up before. Raises MissingDependency.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(RepetitionFilter())
    handler.setFormatter(select_formatter(settings)())
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)  # those of libraries would be lines of another format
    for verbose_logger in VERBOSE_LOGGERS:
        logging.getLogger(verbose_logger).setLevel(max(level, logging.WARNING))
    if with_traces and settings.traces == "otlp":
        from omnivideo.backends.tracing import export_traces

        export_traces(component)
