"""The bounded queue between the network thread, which must never block, and the writer, which commits.

When full, a message loses its payload but keeps its place: it is acknowledged in its turn, unstored, and its device
sends it again for want of a receipt. Left unacknowledged it would stall the messages behind it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from datetime import datetime

from side_tuning.broker_connection import Message


@dataclass(frozen=True)
class Arrived:
    """A message with its arrival time. `dropped`: the queue was full, only the acknowledgement is left to do."""

    message: Message
    received_at: datetime
    dropped: bool = False


class Intake:
    """First in, first out; bounded by messages and by bytes."""

    def __init__(self, max_messages: int, max_bytes: int) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._waiting: deque[Arrived] = deque()
        self._bytes = 0
        self._dropped = 0
        self._closed = False
        self._changed = threading.Condition()

    @property
    def dropped(self) -> int:
        """Messages that came while the queue was full."""
        return self._dropped

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def oldest_at(self) -> datetime | None:
        """When the first of those that wait came; None if nothing waits."""
        with self._changed:
            return self._waiting[0].received_at if self._waiting else None

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, message: Message, received_at: datetime) -> None:
        """Called by the network thread; never blocks."""
        with self._changed:
            if self._closed:
                return  # neither stored nor acknowledged: the broker keeps it for the next start
            size = len(message.payload)
            full = len(self._waiting) >= self._max_messages or (bool(self._waiting) and self._bytes + size > self._max_bytes)
            if full:
                self._dropped += 1
                message = Message(message.topic, b"", message.retain, message.epoch, message.mid, message.qos)
            else:
                self._bytes += size
            self._waiting.append(Arrived(message, received_at, full))
            self._changed.notify()

    def take(self, most: int, *, wait_seconds: float, gather_seconds: float) -> list[Arrived]:
        """Up to `most` messages: waits for a first one, then gathers while more keep coming within `gather_seconds`.

        It stops gathering as soon as nothing came for a fifth of that time, so a broker that holds back messages until
        earlier ones are acknowledged costs little.
        """
        with self._changed:
            if not self._waiting and not self._closed:
                self._changed.wait(wait_seconds)
            if not self._waiting:
                return []
            deadline = time.monotonic() + gather_seconds
            while len(self._waiting) < most and not self._closed:
                before = len(self._waiting)
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(min(left, gather_seconds / 5))
                if len(self._waiting) == before:
                    break
            taken = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
            self._bytes -= sum(len(arrived.message.payload) for arrived in taken)
            return taken

    def close(self) -> None:
        """Take nothing more in; what waits can still be taken out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
