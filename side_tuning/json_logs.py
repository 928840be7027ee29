"""Log lines as JSON objects, one per line, for those who collect logs. Standard library alone."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone


class JsonFormatter(logging.Formatter):
    """`time` (UTC, ISO 8601), `level`, `program`, `logger`, `message` and, where there is one, `exception` (a traceback)."""

    def __init__(self, program: str) -> None:
        super().__init__()
        self._program = program

    def format(self, record: logging.LogRecord) -> str:
        content = {
            "time": _iso(record.created),
            "level": record.levelname.lower(),
            "program": self._program,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            content["stack"] = self.formatStack(record.stack_info)
        return json.dumps(content, ensure_ascii=False)


def json_handler(program: str) -> logging.Handler:
    """Writes to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(program))
    return handler


def logs_are_json() -> bool:
    """Whether this program's log was set up with `json_handler`."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
