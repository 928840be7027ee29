"""What passes between a broker connection and its callers: messages, the fate of a publish, a payload's refusal."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

logger = logging.getLogger(__name__)


class PayloadTooLarge(ValueError):  # noqa: N818 - reads as what happened
    """The broker stated (or showed) a packet limit that this payload exceeds; sending it would only end the connection."""


@dataclass(frozen=True)
class Message:
    """A received message. `epoch` says on which connection it came, so that it is acknowledged there or nowhere."""

    topic: str
    payload: bytes
    retain: bool
    epoch: int
    mid: int
    qos: int
    properties: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Connected:
    """What is known of a new connection at the moment the broker accepts it."""

    epoch: int
    session_present: bool
    protocol: Literal["5", "3.1.1"]
    keepalive_seconds: int


class PublishHandle:
    """The fate of one publish: `sent` once the broker acknowledged it, `failed` once that can no longer happen.

    A PUBACK says that the broker took the message, never that it is stored (FIELD: PUBACK is no durability receipt).
    """

    def __init__(self, payload_bytes: int, on_done: Callable[[PublishHandle], None] | None) -> None:
        self.payload_bytes = payload_bytes
        self.sent_at = time.monotonic()
        self.done_at: float | None = None
        self.rc = "in flight"  # then "success", or why it failed, in words
        self._finished = threading.Event()
        self._on_done = on_done

    @property
    def sent(self) -> bool:
        return self.rc == "success"

    @property
    def failed(self) -> bool:
        return self._finished.is_set() and not self.sent

    def wait(self, timeout_seconds: float) -> bool:
        """True if the broker acknowledged the message within the time."""
        self._finished.wait(timeout_seconds)
        return self.sent

    def finish(self, rc: str) -> None:
        if self._finished.is_set():
            return
        self.rc = rc
        self.done_at = time.monotonic()
        self._finished.set()
        if self._on_done is not None:
            try:
                self._on_done(self)
            except Exception:
                logger.exception("the callback of a finished publish raised")
