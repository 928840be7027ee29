"""Sends parts of backbones to the devices that ask for them, in the gateway's spare time.

A part is published once for all who wait for it at that moment, never retained. Rules: no device has more than a few wishes
open, so nothing piles up; devices take turns; storing frames goes first; never faster than
publishing.backbone_bytes_per_second.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from coordinator.backbone_offers import BackboneShelf
from side_tuning.backbone_manifest import BackboneError
from side_tuning.broker_connection import BrokerConnection, Message, PayloadTooLarge, PublishHandle
from side_tuning.repeats import Repeats
from side_tuning.wire import topics
from side_tuning.wire.backbone_messages import MAX_PARTS_ASKED, PartRequest
from side_tuning.wire.bounded import FrameError

logger = logging.getLogger(__name__)

MAX_DEVICES = 4096  # waiting at once; who comes later asks again
GATHER_SECONDS = 0.02  # devices that ask for the same within this time share
PARTS_UNDER_WAY = 8  # 256 KiB: receipts get through in between
ACK_SECONDS = 30.0
BUSY_SECONDS = 1.0  # the longest that a part waits for frames to be stored
IDLE_SECONDS = 0.5

Wish = tuple[str, int]  # fingerprint, part


class Wishes:
    """Who waits for which parts. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: dict[str, dict[Wish, None]] = {}  # device -> its wishes in order; the first device is next in turn

    def ask(self, device: str, wishes: Iterable[Wish], *, afresh: bool) -> None:
        """Note what a device wants, `afresh` in place of what it wanted before. What is too much is forgotten."""
        with self._lock:
            if device not in self._of and len(self._of) >= MAX_DEVICES:
                return
            before = {} if afresh else self._of.get(device, {})
            if wanted := dict(list({**before, **dict.fromkeys(wishes)}.items())[:MAX_PARTS_ASKED]):
                self._of[device] = wanted
            else:
                self._of.pop(device, None)

    def take(self) -> Wish | None:
        """The next part to publish; with that it is settled for everybody who waits for it."""
        with self._lock:
            if not self._of:
                return None
            device, wanted = next(iter(self._of.items()))
            wish = next(iter(wanted))
            for other, theirs in list(self._of.items()):
                theirs.pop(wish, None)
                if not theirs:
                    del self._of[other]
            if device in self._of:
                self._of[device] = self._of.pop(device)  # to the end of the queue
            return wish


class BackboneDesk:
    """Takes requests (`offer`, from the network thread) and answers them (`run`, a thread of its own)."""

    def __init__(self, shelf: BackboneShelf, connection: BrokerConnection, bytes_per_second: float, busy: Callable[[], bool]) -> None:
        self._shelf = shelf
        self._connection = connection
        self._bytes_per_second = bytes_per_second
        self._busy = busy
        self._wishes = Wishes()
        self._news = threading.Event()
        self._under_way: deque[PublishHandle] = deque()
        self._refusals = Repeats()
        self.parts_sent = 0
        self.ticked_at = time.monotonic()

    def offer(self, message: Message) -> None:
        """Take in a request. One that is not understood is told and forgotten; the device repeats what is not answered."""
        try:
            device = topics.parse_topic(message.topic).owner
            request = PartRequest.from_bytes(message.payload)
        except FrameError as error:
            self._tell(f"a request for parts of a backbone was not understood: {error}")
            return
        self._wishes.ask(device, ((request.fingerprint, index) for index in request.parts), afresh=request.afresh)
        self._news.set()

    def run(self, stop: threading.Event) -> None:
        """Until `stop`."""
        while not stop.is_set():
            self.ticked_at = time.monotonic()
            if self._news.wait(IDLE_SECONDS):
                self._news.clear()
                stop.wait(GATHER_SECONDS)
                self._serve(stop)

    def _serve(self, stop: threading.Event) -> None:
        due_at = time.monotonic()
        while not stop.is_set() and (wish := self._wishes.take()) is not None:
            self.ticked_at = time.monotonic()
            size = self._send(*wish)
            due_at = max(due_at, self.ticked_at) + size / self._bytes_per_second
            if (ahead := due_at - time.monotonic()) > 0:
                stop.wait(ahead)
            deadline = time.monotonic() + BUSY_SECONDS
            while self._busy() and time.monotonic() < deadline and not stop.wait(0.02):
                pass

    def _send(self, fingerprint: str, index: int) -> int:
        """Publish one part; returns its bytes, 0 if it could not be."""
        try:
            backbone = self._shelf.find(fingerprint)
        except BackboneError as error:
            self._tell(str(error))
            return 0
        if index >= len(backbone.parts):
            self._tell(f"part {index} of backbone {fingerprint} was asked for, which has {len(backbone.parts)}")
            return 0
        try:
            content = backbone.read(index)
            handle = self._connection.publish(topics.backbone_part(fingerprint, index), content)
        except BackboneError as error:
            self._shelf.drop(fingerprint)
            self._tell(str(error))
            return 0
        except PayloadTooLarge as error:
            self._shelf.drop(fingerprint)  # to be cut smaller
            self._tell(str(error))
            return 0
        self.parts_sent += 1
        self._under_way.append(handle)
        while len(self._under_way) > PARTS_UNDER_WAY:
            self._under_way.popleft().wait(ACK_SECONDS)
        return len(content)

    def _tell(self, words: str) -> None:
        level = logging.WARNING if self._refusals.count(words) == 1 else logging.DEBUG
        logger.log(level, "%s", words)
