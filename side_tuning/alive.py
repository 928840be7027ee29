"""The alive file: touched while a program's loops go round, looked at by health checks.

A look must be cheap, since containers do it every few seconds: no store, no broker, nothing heavy is imported.
"""

from __future__ import annotations

import time
from pathlib import Path


def touch_alive(path: Path) -> None:
    """Say "alive now". Raises OSError where the file cannot be made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def alive_trouble(path: Path, max_age_seconds: float) -> str:
    """Why the program that touches `path` does not count as alive; empty if it does."""
    try:
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return f"{path} does not exist: the program has not started, or has ended; start it, or give its --config"
    except OSError as error:
        return f"{path} cannot be looked at: {error.strerror}; make it accessible to this user"
    if age > max_age_seconds:
        return f"{path} was touched {age:.0f} s ago, more than {max_age_seconds:g} s: the program hangs or was killed; restart it"
    return ""
