"""Which backbones are offered to whom, as retained messages, and the parts of those that are kept here.

The artifact is hashed once per backbone; what cannot be sent is offered with the reason in place of a listing, so that the
device can say it too. Known weakness: the broker keeps a listing (at most some 130 KB) after the last offer that names it is taken back.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coordinator.backbone_library import find_artifact
from coordinator.store.assignments import assignments
from coordinator.store.engine import Store
from side_tuning.backbone_manifest import FINGERPRINTED, MANIFEST, BackboneError, check_artifact
from side_tuning.signatures import sign_offer
from side_tuning.wire import topics
from side_tuning.wire.backbone_messages import (
    DIGEST_BYTES,
    MAX_BACKBONE_BYTES,
    MAX_PARTS,
    BackboneListing,
    BackboneOffer,
    Part,
    digest_of,
)

logger = logging.getLogger(__name__)

PART_BYTES = 32_768  # within two keepalives (what paho gives a packet) even at 300 bytes/s
ENVELOPE_BYTES = 1024  # room in a packet for topic and properties
LOOK_AGAIN_SECONDS = 60.0  # at an artifact that could not be used


@dataclass(frozen=True)
class ShelvedBackbone:
    """A backbone that can be sent."""

    folder: Path
    listing: BackboneListing
    payload: bytes  # the listing as it is published
    parts: tuple[Part, ...]

    def read(self, index: int) -> bytes:
        """The bytes of a part.

        Raises:
            BackboneError: the file changed since it was listed.

        """
        part = self.parts[index]
        try:
            with (self.folder / part.file).open("rb") as file:
                file.seek(part.offset)
                content = file.read(part.size)
        except OSError as error:
            raise BackboneError(f"{self.folder / part.file} cannot be read: {error.strerror}") from error
        if digest_of(content) != self.listing.digest(index):
            raise BackboneError(f"{self.folder / part.file} changed or is damaged; register the backbone again from a good copy")
        return content


class BackboneShelf:
    """The backbones of the library that were asked for, read and cut. Used by two threads."""

    def __init__(self, data_directory: Path) -> None:
        self._data_directory = data_directory
        self._lock = threading.Lock()
        self._found: dict[str, ShelvedBackbone] = {}
        self._refused: dict[str, tuple[str, float]] = {}  # why not, and when that was found
        self.max_packet_bytes: int | None = None  # of the broker

    def find(self, fingerprint: str) -> ShelvedBackbone:
        """The backbone, ready to be sent.

        Raises:
            BackboneError: it cannot be; the text says why.

        """
        with self._lock:
            if fingerprint in self._found:
                return self._found[fingerprint]
            reason, at = self._refused.get(fingerprint, ("", 0.0))
            if reason and time.monotonic() - at < LOOK_AGAIN_SECONDS:
                raise BackboneError(reason)
            try:
                found = self._found[fingerprint] = self._read(fingerprint)
            except (BackboneError, OSError) as error:
                if len(self._refused) > MAX_PARTS:  # somebody asks for names at random
                    self._refused.clear()
                self._refused[fingerprint] = (str(error), time.monotonic())
                raise BackboneError(str(error)) from error
            self._refused.pop(fingerprint, None)
            return found

    def drop(self, fingerprint: str) -> None:
        """Look at its files anew the next time."""
        with self._lock:
            self._found.pop(fingerprint, None)

    def _read(self, fingerprint: str) -> ShelvedBackbone:
        folder = find_artifact(self._data_directory, fingerprint)
        if folder is None:
            raise BackboneError(f"backbone {fingerprint} is not kept on the coordinator; run `coordinator backbone register FOLDER` with its folder")
        check_artifact(folder)
        sizes = tuple((name, (folder / name).stat().st_size) for name in FINGERPRINTED)
        total, room = sum(size for _, size in sizes), self.max_packet_bytes
        if total > MAX_BACKBONE_BYTES:
            raise BackboneError(f"backbone {fingerprint} has {total:,} bytes, more than the {MAX_BACKBONE_BYTES:,} that can be sent; copy it by hand")
        part_bytes = PART_BYTES
        while total / part_bytes > MAX_PARTS - len(sizes):
            part_bytes *= 2
        if room is not None:
            part_bytes = min(part_bytes, max(room - ENVELOPE_BYTES, 1024))
        digests = bytearray()
        for name, _ in sizes:
            with (folder / name).open("rb") as file:
                while part := file.read(part_bytes):
                    digests += digest_of(part)
        listing = BackboneListing(fingerprint, (folder / MANIFEST).read_text(encoding="utf-8"), sizes, part_bytes, bytes(digests))
        payload = listing.to_bytes()
        if len(digests) > MAX_PARTS * DIGEST_BYTES or (room is not None and len(payload) + ENVELOPE_BYTES > room):
            raise BackboneError(
                f"backbone {fingerprint} does not fit through the broker, which takes packets of {room} bytes; raise max_packet_size there"
            )
        return ShelvedBackbone(folder, listing, payload, tuple(listing.parts()))


class BackboneOffers:
    """What the broker is to hold: an offer for each assignment, and each offered backbone's listing."""

    def __init__(self, store: Store, shelf: BackboneShelf, key: Ed25519PrivateKey) -> None:
        self._store = store
        self._shelf = shelf
        self._key = key
        self._signed: dict[BackboneOffer, bytes] = {}
        self._refusals: dict[str, str] = {}  # by fingerprint, as logged

    def messages(self, max_packet_bytes: int | None) -> list[tuple[str, bytes]]:
        """(topic, payload), a listing before the offers that name it; an empty payload clears the topic."""
        with self._store.read() as session:
            wanted = assignments(session)
        self._shelf.max_packet_bytes = max_packet_bytes
        listings: dict[str, bytes] = {}
        offers: list[tuple[str, bytes]] = []
        signed: dict[BackboneOffer, bytes] = {}
        for device, fingerprint in wanted.items():
            topic = topics.fleet_backbone() if device is None else topics.device_backbone(device)
            if not fingerprint:
                offers.append((topic, b""))
                continue
            offer = self._offer(device or topics.FLEET, fingerprint, listings)
            signed[offer] = self._signed.get(offer) or sign_offer(offer, self._key).to_bytes()
            offers.append((topic, signed[offer]))
        self._signed = signed
        return [(topics.backbone_listing(fingerprint), payload) for fingerprint, payload in listings.items()] + offers

    def _offer(self, owner: str, fingerprint: str, listings: dict[str, bytes]) -> BackboneOffer:
        try:
            found = self._shelf.find(fingerprint)
        except BackboneError as error:
            if self._refusals.get(fingerprint) != str(error):
                self._refusals[fingerprint] = str(error)
                logger.error("an assigned backbone cannot be sent: %s", error)
            return BackboneOffer(owner, fingerprint, refusal=str(error)[:1000])
        self._refusals.pop(fingerprint, None)
        listings[fingerprint] = found.payload
        return BackboneOffer(owner, fingerprint, hashlib.sha256(found.payload).hexdigest(), found.listing.size)
