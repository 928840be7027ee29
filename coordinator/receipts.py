"""Receipts out to the devices: cumulative, retained, at most one per device and interval.

With QoS 0: a device that missed one sends again what it has no receipt for, and that brings the next.
"""

from __future__ import annotations

import threading
import time

from coordinator.store.engine import Store
from coordinator.store.errors import StoreUnavailable
from coordinator.store.receipts import receipts_for
from side_tuning.broker_connection import BrokerConnection
from side_tuning.wire import topics

NEVER = float("inf")


class ReceiptDesk:
    """Remembers which spools have news; `publish_due` tells their devices. Marks may come from any thread."""

    def __init__(self, store: Store, connection: BrokerConnection, interval_seconds: float) -> None:
        self._store = store
        self._connection = connection
        self._interval_seconds = interval_seconds
        self._lock = threading.Lock()
        self._marked: dict[tuple[str, str], None] = {}  # ordered: of two spools of one device the newer mark is sent last
        self._current: dict[str, str] = {}  # device -> the spool it last wrote from
        self._next_at = 0.0

    def mark(self, device: str, spool: str) -> None:
        """There may be news for `spool`. A repeat tells a device that missed an earlier receipt."""
        with self._lock:
            self._marked.pop((device, spool), None)
            self._marked[device, spool] = None
            self._current[device] = spool

    def mark_all(self) -> None:
        """Every device heard of since the start: after a reconnect the broker may know no receipts any more."""
        with self._lock:
            for key in self._current.items():
                self._marked.setdefault(key)

    def due_in(self) -> float:
        """Seconds until `publish_due` has something to do."""
        if not self._marked or not self._connection.connected:
            return NEVER
        return max(0.0, self._next_at - time.monotonic())

    def publish_due(self, *, now: bool = False) -> None:
        if not self._marked or not (now or time.monotonic() >= self._next_at) or not self._connection.connected:
            return
        with self._lock:
            marked, self._marked = self._marked, {}
        self._next_at = time.monotonic() + self._interval_seconds
        try:
            with self._store.read() as session:
                receipts = receipts_for(session, marked)
        except StoreUnavailable:
            self._restore(marked)
            return
        told = [(topics.receipt(device), receipts[device, spool].to_bytes()) for device, spool in marked if (device, spool) in receipts]
        self._connection.publish_all(told, retain=True)

    def _restore(self, marked: dict[tuple[str, str], None]) -> None:
        with self._lock:
            self._marked = {**marked, **self._marked}
