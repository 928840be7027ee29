"""From the spool to the coordinator: a window of unreceipted frames, sent in order, resent until receipted.

Rules: a frame leaves the spool only on the coordinator's receipt, never on a PUBACK (the broker may drop what it
acknowledged); duplicates are harmless at the receiver, so when in doubt a frame is sent again; the network thread only
notes what happened and wakes the loop.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from edge_agent.link import Link
from edge_agent.spool import Spool
from side_tuning.broker_connection import BrokerConnection, Connected, PayloadTooLarge, PublishHandle
from side_tuning.repeats import Repeats
from side_tuning.wire import topics
from side_tuning.wire.bounded import FrameError
from side_tuning.wire.messages import Receipt

logger = logging.getLogger(__name__)

RECEIPT_GRACE_SECONDS = 1.0  # after a connect: the retained receipt may spare us most of the resending
LOST_AFTER_LATER = 3  # frames sent later and receipted before one is taken for lost (reordering between gateways)
LONGEST_BACKOFF = 16  # times resend_seconds, while the coordinator is away
IDLE_SECONDS = 1.0


@dataclass
class _Unreceipted:
    """A frame of the window. `turn` counts all sends of this publisher, so it orders them."""

    sequence: int
    size: int
    payload: bytes | None  # None after the first send: a resend reads it from the spool, the window stays small
    sends: int = 0
    epoch: int = 0
    sent_at: float = 0.0
    turn: int = 0
    under_way: PublishHandle | None = None  # handed to the broker, not acknowledged by it


class Publisher:
    """Owns the window; `run` is its thread, everything else may be called from any thread."""

    def __init__(
        self,
        connection: BrokerConnection,
        spool: Spool,
        device: str,
        *,
        window_frames: int = 16,
        resend_seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connection = connection
        self._spool = spool
        self._topic = topics.activations(device)
        self._window_frames = window_frames
        self._resend_seconds = resend_seconds
        self._clock = clock
        self._window: dict[int, _Unreceipted] = {}  # by sequence, ascending
        self._cursor = 0  # highest sequence ever taken into the window
        self._turn = 0
        self._resume_at = 0.0
        self._uncounted_bytes = 0  # handed over but not yet counted in the spool
        self._asked_keepalive = 0
        self._wake = threading.Event()
        self._receipts: deque[bytes] = deque(maxlen=64)  # cumulative: an overwritten one is contained in the next
        self._finished: deque[PublishHandle] = deque()
        self.link = Link(connection.settings.keepalive_seconds)
        self._refusal = ""
        self._rejections = Repeats()
        self._too_large = ""
        self._retry_set_aside = False
        self._set_aside: set[int] = set()  # frames too large for this broker; they stay in the spool
        self.receipted_frames = 0
        self.last_receipt_at: float | None = None
        self.ticked_at = clock()
        self.freed = threading.Event()  # set whenever a receipt made room in the spool

    @property
    def error(self) -> str:
        """What keeps frames from being sent, in words; empty if nothing does."""
        return self._refusal or (self._too_large if self._set_aside else "")

    # Called by the network thread and the intake.

    def wake(self) -> None:
        """Something was appended to the spool."""
        self._wake.set()

    def offer_receipt(self, payload: bytes) -> None:
        self._receipts.append(payload)
        self._wake.set()

    def connected(self, _connected: Connected) -> None:
        self._resume_at = self._clock() + RECEIPT_GRACE_SECONDS
        self._retry_set_aside = True
        self._wake.set()

    def frame_bytes(self, plan_bytes: int) -> int:
        """The size at which the intake should close frames on this link."""
        return self.link.frame_bytes(plan_bytes, self._connection.max_packet_bytes)

    # The loop.

    def run(self, stop: threading.Event) -> None:
        """Send and resend until `stop`."""
        while not stop.is_set():
            self.ticked_at = self._clock()
            self._wake.clear()
            self._take_acknowledgements()
            self._take_receipts()
            self._refill()
            wait_seconds = self._send()
            self._count_bytes()
            self._wake.wait(wait_seconds)
        self._count_bytes()

    def _take_acknowledgements(self) -> None:
        while self._finished:
            handle = self._finished.popleft()
            if handle.sent and handle.done_at is not None:
                self.link.acknowledged(handle.payload_bytes, handle.sent_at, handle.done_at)
                self._refusal = ""
            elif handle.rc.startswith("refused") and self._refusal != handle.rc:
                self._refusal = handle.rc
                logger.error("frames are %s; grant this device the topic %s at the broker", handle.rc, self._topic)
        under_way = [e.under_way for e in self._window.values() if e.under_way is not None]
        # The handles of a connection fail together, but one after the other: the first one speaks for all.
        broken_at = next((h.done_at for h in under_way if h.rc == "connection lost"), None)
        if broken_at is not None:
            unacknowledged = [h for h in under_way if not h.sent]
            self.link.stalled(sum(h.payload_bytes for h in unacknowledged), min(h.sent_at for h in unacknowledged), broken_at)
        for entry in self._window.values():
            if entry.under_way is not None and (entry.under_way.rc != "in flight" or broken_at is not None):
                entry.under_way = None

    def _take_receipts(self) -> None:
        newest: Receipt | None = None
        rejected: dict[int, str] = {}
        while self._receipts:
            try:
                receipt = Receipt.from_bytes(self._receipts.popleft())
            except FrameError as error:
                logger.error("a receipt was not understood: %s", error)
                continue
            if receipt.spool == self._spool.id:  # others are of an earlier life of this device's storage
                newest = receipt  # cumulative: it contains the ones before it
                rejected.update(receipt.rejected)
        if newest is None:
            return
        self._resume_at = 0.0
        self.last_receipt_at = self._clock()
        self._spool.acknowledge(newest)
        ahead = set(newest.stored_ahead)
        safe = [n for n in self._window if n <= newest.stored_through or n in ahead]
        for sequence in sorted(rejected.keys() & set(safe)):
            self._note_rejection(sequence, rejected[sequence])
        self._forget(safe)

    def _note_rejection(self, sequence: int, reason: str) -> None:
        count = self._rejections.count(reason)
        level = logging.ERROR if count == 1 else logging.DEBUG
        logger.log(level, "the coordinator rejected frame %d and keeps it (%d for this reason so far): %s", sequence, count, reason)

    def _forget(self, safe: list[int]) -> None:
        if not safe:
            return
        self.receipted_frames += len(safe)
        newest_turn = max(self._window[n].turn for n in safe)
        for sequence in safe:
            del self._window[sequence]
        for entry in self._window.values():
            if entry.turn and entry.turn + LOST_AFTER_LATER <= newest_turn:
                entry.epoch = 0  # later ones arrived: the broker dropped this one; send it again now
            entry.sends = min(entry.sends, 1)  # the coordinator is there: no more back-off
        self.freed.set()

    def _refill(self) -> None:
        if self._retry_set_aside:
            self._retry_set_aside = False
            again, self._set_aside = sorted(self._set_aside), set()
            for sequence in again:
                for frame in self._spool.pending(sequence - 1, 1):
                    self._window[frame.sequence] = _Unreceipted(frame.sequence, len(frame.payload), frame.payload)
        room = self._window_frames - len(self._window)
        if room <= 0:
            return
        for frame in self._spool.pending(self._cursor, room):
            self._window[frame.sequence] = _Unreceipted(frame.sequence, len(frame.payload), frame.payload)
            self._cursor = frame.sequence

    def _send(self) -> float:
        """Send what is due, in order, within the link's limit; returns how long there is nothing to do."""
        now = self._clock()
        self.link.keepalive_seconds = self._connection.keepalive_seconds
        if not self._connection.connected:
            return IDLE_SECONDS
        if now < self._resume_at:
            return self._resume_at - now
        epoch = self._connection.epoch
        in_flight = sum(e.size for e in self._window.values() if e.under_way is not None and e.epoch == epoch)
        wait_seconds = IDLE_SECONDS
        for _, entry in sorted(self._window.items()):
            due_in = self._due_in(entry, epoch, now)
            if due_in > 0:
                wait_seconds = min(wait_seconds, due_in)
                continue
            size = entry.size
            if in_flight and in_flight + size > self.link.in_flight_limit():
                return IDLE_SECONDS  # an acknowledgement wakes us
            if self._reconnecting_for(size):
                return IDLE_SECONDS
            if self._publish(entry, epoch, now):
                in_flight += size
        return wait_seconds

    def _due_in(self, entry: _Unreceipted, epoch: int, now: float) -> float:
        if entry.sends == 0 or entry.epoch != epoch:
            return 0.0
        if entry.under_way is not None:
            return IDLE_SECONDS  # still on its way to the broker: a second copy could only slow it down
        pause = self._resend_seconds * min(2 ** (entry.sends - 1), LONGEST_BACKOFF)
        return entry.sent_at + pause - now

    def _reconnecting_for(self, size: int) -> bool:
        """Reconnect with a longer keepalive where this frame could never be written within the present one."""
        configured = self._connection.settings.keepalive_seconds
        needed = self.link.keepalive_for(size, configured)
        self._connection.set_keepalive(needed)
        if self.link.fits(size) or needed <= max(self.link.keepalive_seconds, self._asked_keepalive):
            return False  # it fits, or the broker caps the keepalive: try all the same
        self._asked_keepalive = needed
        logger.warning("this link carries %.0f bytes/s: reconnecting with a keepalive of %d s", self.link.goodput or 0.0, needed)
        self._connection.reconnect()
        return True

    def _publish(self, entry: _Unreceipted, epoch: int, now: float) -> bool:
        payload = entry.payload or self._read_again(entry.sequence)
        if payload is None:
            del self._window[entry.sequence]  # dropped by the spool's policy in the meantime
            return False
        properties = {"spool": self._spool.id, "sequence": str(entry.sequence)}
        try:
            handle = self._connection.publish(self._topic, payload, properties=properties, on_done=self._note_finished)
        except PayloadTooLarge as error:
            # Kept in the spool: nothing is lost, and the next connection may have a higher limit.
            self._too_large = f"frame {entry.sequence} waits in the spool: {error}"
            logger.error("%s", self._too_large)
            self._set_aside.add(entry.sequence)
            del self._window[entry.sequence]
            return False
        if handle.rc in ("not connected", "connection lost"):
            return False
        self._turn += 1
        entry.sends += 1
        entry.epoch, entry.sent_at, entry.turn, entry.under_way = epoch, now, self._turn, handle
        entry.payload = None
        self._uncounted_bytes += len(payload)
        return True

    def _read_again(self, sequence: int) -> bytes | None:
        frames = self._spool.pending(sequence - 1, 1)
        return frames[0].payload if frames and frames[0].sequence == sequence else None

    def _note_finished(self, handle: PublishHandle) -> None:
        self._finished.append(handle)
        self._wake.set()

    def _count_bytes(self) -> None:
        if self._uncounted_bytes:
            self._spool.add_bytes_sent(self._uncounted_bytes)
            self._uncounted_bytes = 0
