"""What keeps a hostile asker from filling memory, disk or processor: how often it is heard, where it waits, how often it is told of."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from side_tuning.broker_connection import Message

ASKERS = 4096  # remembered at once; forgetting one only means that it is heard once more
HEARD_EVERY_SECONDS = 1.0
FIRST_AGAIN_SECONDS = 60.0
LONGEST_AGAIN_SECONDS = 3600.0
ROWS_PER_MINUTE = 60


class Gate:
    """Lets each asker through once a second. Used by the network thread alone."""

    def __init__(self, every_seconds: float = HEARD_EVERY_SECONDS) -> None:
        self._every_seconds = every_seconds
        self._heard: OrderedDict[str, float] = OrderedDict()
        self.turned_away = 0

    def admit(self, asker: str, now: float) -> bool:
        """`now` is monotonic."""
        if now - self._heard.get(asker, float("-inf")) < self._every_seconds:
            self.turned_away += 1
            return False
        self._heard[asker] = now
        self._heard.move_to_end(asker)
        if len(self._heard) > ASKERS:
            self._heard.popitem(last=False)
        return True


class Waiting:
    """Requests in the order of their askers' arrival: one an asker, its newest, and bounded."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._messages: OrderedDict[str, Message] = OrderedDict()
        self._changed = threading.Condition()
        self.dropped = 0  # came while there was no room; their askers ask again

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, message: Message) -> None:
        """Called by the network thread; never blocks."""
        with self._changed:
            if message.topic not in self._messages and len(self._messages) >= self._most:
                self.dropped += 1
                return
            self._messages[message.topic] = message
            self._changed.notify()

    def take(self, wait_seconds: float) -> Message | None:
        with self._changed:
            if not self._messages:
                self._changed.wait(wait_seconds)
            return self._messages.popitem(last=False)[1] if self._messages else None


@dataclass
class _Told:
    at: float
    again_seconds: float
    since: int = 0  # refusals that were not told of


class Refusals:
    """Which refusals become audit rows: the first of an asker and reason, then one in a while that tells how many there were."""

    def __init__(self) -> None:
        self._told: OrderedDict[tuple[str, str], _Told] = OrderedDict()
        self._minute = float("-inf")
        self._rows = 0
        self.untold = 0

    def count(self, asker: str, reason: str, now: float) -> int | None:
        """How many refusals of this kind there were since the last row, this one included; None: no row is due."""
        told = self._told.get((asker, reason))
        if told is not None and now < told.at + told.again_seconds:
            told.since += 1
            return None
        if not self._room(now):
            self.untold += 1
            return None
        again = FIRST_AGAIN_SECONDS
        if told is not None and now < told.at + 2 * told.again_seconds:  # it goes on and on
            again = min(2 * told.again_seconds, LONGEST_AGAIN_SECONDS)
        self._told[asker, reason] = _Told(now, again)
        self._told.move_to_end((asker, reason))
        if len(self._told) > ASKERS:
            self._told.popitem(last=False)
        return 1 if told is None else told.since + 1

    def _room(self, now: float) -> bool:
        if now >= self._minute + 60:
            self._minute, self._rows = now, 0
        self._rows += 1
        return self._rows <= ROWS_PER_MINUTE
