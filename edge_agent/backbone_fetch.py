"""Fetch the backbone that the coordinator offers: signed offer, listing, missing parts, fingerprint, rename.

Rules: nothing unsigned is interpreted; parts are asked for within a window of about a second of what the link carries, so that
nothing queues at the broker; each part is checked as it comes, and one that is wrong is asked for again. `step` is the loop's
body and never blocks for long; `receive` is called by the network thread.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge_agent.backbone_files import IncomingBackbone
from edge_agent.health import disk_free_bytes
from side_tuning.backbone_manifest import BackboneError
from side_tuning.broker_connection import BrokerConnection, Message
from side_tuning.signatures import SignatureError, verify_offer
from side_tuning.wire import topics
from side_tuning.wire.backbone_messages import BackboneListing, BackboneOffer, PartRequest
from side_tuning.wire.bounded import FrameError
from side_tuning.wire.messages import SignedManifest

logger = logging.getLogger(__name__)

FIRST_WINDOW = 2
LARGEST_WINDOW = 32  # parts under way; a request can name twice as many
WINDOW_SECONDS = 1.0
RATE_SECONDS = 10.0  # the rate is that of the last so many
ASK_AGAIN_SECONDS = 5.0  # doubled each time that nothing came of it
LONGEST_ASK_AGAIN_SECONDS = 300.0
BAD_PART_SECONDS = 1.0
TRY_AGAIN_SECONDS = 30.0  # after trouble with the disk
DISK_RESERVE_BYTES = 32 * 1024 * 1024  # stays free for spool and checkpoints
INBOX_MESSAGES = 4 * LARGEST_WINDOW


class Pace:
    """How fast parts come in, and how many may be under way because of that. Pure arithmetic."""

    def __init__(self) -> None:
        self._arrivals: deque[tuple[float, int]] = deque()

    def arrived(self, size: int, now: float) -> None:
        self._arrivals.append((now, size))
        while len(self._arrivals) > 2 and now - self._arrivals[0][0] > RATE_SECONDS:
            self._arrivals.popleft()

    @property
    def bytes_per_second(self) -> float | None:
        """Over the last few seconds; None until two parts have come."""
        if len(self._arrivals) < 2:
            return None
        span = self._arrivals[-1][0] - self._arrivals[0][0]
        return sum(size for _, size in list(self._arrivals)[1:]) / max(span, 1e-3)

    def window(self, part_bytes: int) -> int:
        rate = self.bytes_per_second
        if rate is None:
            return FIRST_WINDOW
        return max(1, min(LARGEST_WINDOW, -int(-rate * WINDOW_SECONDS // part_bytes)))


class BackboneFetcher:
    """One download, whatever it takes: offers may change, the link may break, the disk may be full for a while."""

    def __init__(
        self,
        connection: BrokerConnection,
        device: str,
        place: Path,
        public_key: Ed25519PublicKey | None,
        *,
        unusable: dict[str, str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare.

        Args:
            connection: subscribed to `subscriptions(device)`; its messages go to `receive`.
            device: this device's name.
            place: where the backbone is to stand.
            public_key: the coordinator's.
            unusable: fingerprints that are not worth fetching, with the reason.
            clock: monotonic seconds.

        """
        self._connection = connection
        self._device = device
        self._public_key = public_key
        self._unusable = unusable
        self._clock = clock
        self._inbox: queue.Queue[Message] = queue.Queue(maxsize=INBOX_MESSAGES)  # what does not fit is asked for again
        self._offers: dict[str, BackboneOffer] = {}
        self._offer: BackboneOffer | None = None
        self._listing: BackboneListing | None = None
        self._listing_payload = b""
        self._asked: dict[str, int] = {}  # topic -> part
        self._damaged: set[int] = set()  # of these, what came wrong
        self._files = IncomingBackbone(place)
        self._pace = Pace()
        self._epoch = 0
        self._patience = ASK_AGAIN_SECONDS
        self._repeat_at = 0.0
        self._try_again_at: float | None = None
        self.trouble = ""  # why nothing is being fetched, or what was refused last
        self.bad_parts = 0

    @staticmethod
    def subscriptions(device: str) -> list[str]:
        return [topics.device_backbone(device), topics.fleet_backbone()]

    def receive(self, message: Message) -> None:
        with suppress(queue.Full):
            self._inbox.put_nowait(message)

    def step(self, wait_seconds: float) -> bool:
        """Take what came within `wait_seconds`, ask for what is missing; True once the backbone is in its place."""
        try:
            with suppress(queue.Empty):
                self._take(self._inbox.get(timeout=wait_seconds))
                while True:
                    self._take(self._inbox.get_nowait())
            if self._try_again_at is not None and self._clock() >= self._try_again_at:
                self._try_again_at = None
                self._begin()
            if self._listing is None or self._try_again_at is not None:
                return False
            if not self._files.missing:
                self._files.install()
                return True
            self._ask()
        except BackboneError as error:  # the same again would not help
            assert self._listing is not None, "only a listing can be wrong"
            self._stop_asking()
            self._unusable[self._listing.fingerprint] = str(error)
            self._listing = None
            self._refuse(str(error))
        except OSError as error:
            self._wait_for_disk(f"{self._files.folder} cannot be written: {error}; make room or repair the disk")
        return False

    @property
    def words(self) -> str:
        """The state of things, for people."""
        if not self._connection.connected:
            return f"waiting for the broker, to fetch a backbone: {self._connection.last_error or 'connecting'}"
        if self._offer is None:
            return self.trouble or (
                "no backbone on this device, and the coordinator offers none: `coordinator backbone assign FINGERPRINT` sends one "
                f"(or put a prepared folder at {self._files.place})"
            )
        name = self._offer.fingerprint
        if self._listing is None or self._try_again_at is not None:
            return self.trouble or f"fetching backbone {name[:8]}: waiting for the list of its parts"
        total, missing = len(self._files.parts), len(self._files.missing)
        return f"fetching backbone {name[:8]}: {total - missing} of {total} parts{self._speed()}"

    def _speed(self) -> str:
        rate = self._pace.bytes_per_second
        if rate is None or not self._files.missing:
            return ""
        seconds = self._files.missing_bytes() / rate
        left = f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
        return f", {rate / 1e6:.1f} MB/s, {left} left" if rate >= 1e5 else f", {rate / 1e3:.1f} kB/s, {left} left"

    def _refuse(self, words: str) -> None:
        if words != self.trouble:
            logger.error("%s", words)
        self.trouble = words[:1000]

    # What comes in.

    def _take(self, message: Message) -> None:
        if message.topic in self._asked:
            self._take_part(message)
        elif message.topic in self.subscriptions(self._device):
            self._take_offer(message)
        elif self._offer is not None and message.topic == topics.backbone_listing(self._offer.fingerprint):
            self._take_listing(message.payload)

    def _take_offer(self, message: Message) -> None:
        if not message.payload:
            self._offers.pop(message.topic, None)
        else:
            try:
                self._offers[message.topic] = self._verify(message)
            except (FrameError, SignatureError, BackboneError) as error:
                self._refuse(str(error))
                return
        own, fleet = self.subscriptions(self._device)
        chosen = self._offers.get(own) or self._offers.get(fleet)
        if chosen == self._offer:
            return  # retained: it comes again with every connection
        self._stop_asking()
        if self._offer is not None:
            self._connection.unsubscribe(topics.backbone_listing(self._offer.fingerprint))
        self._offer, self._listing, self._try_again_at, self.trouble = chosen, None, None, ""
        if chosen is None:
            return
        if chosen.refusal:
            self._refuse(f"the coordinator cannot send backbone {chosen.fingerprint}: {chosen.refusal}")
        elif chosen.fingerprint in self._unusable:
            self._refuse(self._unusable[chosen.fingerprint])
        else:
            logger.info("backbone %s is offered, %d bytes", chosen.fingerprint, chosen.size)
            self._connection.subscribe(topics.backbone_listing(chosen.fingerprint))

    def _verify(self, message: Message) -> BackboneOffer:
        if self._public_key is None:
            raise BackboneError("a backbone was offered, but no key to check it: set checkpoint.public_key_file")
        offer = verify_offer(SignedManifest.from_bytes(message.payload), self._public_key)
        owner = topics.parse_topic(message.topic).owner
        if offer.owner != owner:
            raise BackboneError(f"an offer for {offer.owner!r} came on the topic of {owner!r}; it is not followed")
        return offer

    def _take_listing(self, payload: bytes) -> None:
        offer = self._offer
        if offer is None or offer.refusal or offer.fingerprint in self._unusable or self._listing is not None:
            return
        if hashlib.sha256(payload).hexdigest() != offer.listing_sha256:
            self._refuse(f"the list of backbone {offer.fingerprint}'s parts is not the one that was signed; waiting for the right one")
            return
        try:
            listing = BackboneListing.from_bytes(payload)
        except FrameError as error:
            self._refuse(f"backbone {offer.fingerprint} cannot be fetched: {error}; update this program")
            return
        if (listing.fingerprint, listing.size) != (offer.fingerprint, offer.size):
            self._refuse(f"the list of backbone {offer.fingerprint}'s parts is another's; register it again on the coordinator")
            return
        self._listing, self._listing_payload = listing, payload
        self._begin()

    def _begin(self) -> None:
        assert self._listing is not None, "a listing comes first"
        self._files.begin(self._listing, self._listing_payload)
        needed, free = self._files.missing_bytes() + DISK_RESERVE_BYTES, disk_free_bytes(self._files.folder)
        if free is not None and free < needed:
            self._wait_for_disk(
                f"backbone {self._listing.fingerprint} needs {needed / 1e6:,.0f} MB on the disk of {self._files.folder.parent}, {free / 1e6:,.0f} MB "
                "are free; make room, or assign a smaller one"
            )
            return
        self.trouble = ""
        self._patience, self._epoch = ASK_AGAIN_SECONDS, 0
        logger.info("%d of %d parts of backbone %s are to be fetched", len(self._files.missing), len(self._files.parts), self._listing.fingerprint)

    def _wait_for_disk(self, words: str) -> None:
        self._stop_asking()
        self._refuse(words)
        self._try_again_at = self._clock() + TRY_AGAIN_SECONDS

    def _take_part(self, message: Message) -> None:
        index = self._asked[message.topic]
        if not self._files.keep(index, message.payload):
            self.bad_parts += 1
            logger.log(logging.WARNING if self.bad_parts == 1 else logging.DEBUG, "part %d came damaged; asking for it again", index)
            if not self._damaged:
                self._repeat_at = min(self._repeat_at, self._clock() + BAD_PART_SECONDS)
            self._damaged.add(index)
            return
        now = self._clock()
        self._pace.arrived(len(message.payload), now)
        del self._asked[message.topic]
        self._connection.unsubscribe(message.topic)
        rate = self._pace.bytes_per_second
        assert self._listing is not None, "parts are asked for by a listing"
        self._patience = max(ASK_AGAIN_SECONDS, 4 * self._listing.part_bytes / rate if rate else 0.0)
        self._damaged.discard(index)
        if not self._damaged:
            self._repeat_at = now + self._patience

    # What is asked for.

    def _ask(self) -> None:
        if not self._connection.connected:
            return
        assert self._listing is not None, "parts are asked for by a listing"
        now, epoch = self._clock(), self._connection.epoch
        afresh = epoch != self._epoch  # what was under way on the connection before is lost
        if not afresh and self._asked and now >= self._repeat_at:
            afresh = True
            self._patience = min(self._patience * 2, LONGEST_ASK_AGAIN_SECONDS)
        window = self._pace.window(self._listing.part_bytes)
        new: list[int] = []
        if len(self._asked) <= window // 2:
            asked = set(self._asked.values())
            new = [index for index in self._files.missing if index not in asked][: window - len(self._asked)]
        if not new and not afresh:
            return
        for index in new:
            topic = topics.backbone_part(self._listing.fingerprint, index)
            self._asked[topic] = index
            self._connection.subscribe(topic)  # before the request, on the same connection: the answer cannot overtake it
        wanted = tuple(self._asked.values()) if afresh else tuple(new)
        request = PartRequest(self._listing.fingerprint, wanted, afresh)
        # QoS 0: a request that waited somewhere would be stale.
        self._connection.publish(topics.backbone_request(self._device), request.to_bytes(), qos=0)
        self._epoch = epoch
        if afresh or not self._damaged:
            self._damaged.clear()
            self._repeat_at = now + self._patience

    def _stop_asking(self) -> None:
        for topic in self._asked:
            self._connection.unsubscribe(topic)
        self._asked.clear()
        self._damaged.clear()
