"""How a backbone travels: the signed offer, the listing that it vouches for, and what a device asks for.

An offer is small and names one device (or the fleet); the listing, with a digest for each part, is the same for all devices with
that backbone. So one signature covers every byte, and the broker keeps the long message once.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from side_tuning.wire.bounded import FrameError, unpack_bounded
from side_tuning.wire.messages import (
    MAX_MANIFEST_BYTES,
    MAX_MESSAGE_BYTES,
    Fields,
    check_fingerprint,
    pack_message,
)

MAX_BACKBONE_BYTES = 2 * 1024**3
MAX_PARTS = 8192
MAX_PART_BYTES = 1024 * 1024
MAX_FILES = 16
MAX_PARTS_ASKED = 64
DIGEST_BYTES = 16  # of a SHA-256, as in a fingerprint
_FILE_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}\.[a-z]{1,16}")  # never a separator, never hidden
_SHA256 = re.compile(r"[0-9a-f]{64}")


def digest_of(part: bytes) -> bytes:
    """What a listing says of a part."""
    return hashlib.sha256(part).digest()[:DIGEST_BYTES]


@dataclass(frozen=True)
class BackboneOffer:
    """Which backbone `owner` (a device or "fleet") is to run, if it has none. `refusal` says why it cannot be sent."""

    owner: str
    fingerprint: str
    listing_sha256: str = ""
    size: int = 0
    refusal: str = ""

    SIGNATURE_DOMAIN = b"mobillm-fleet backbone v1\0"

    def to_bytes(self) -> bytes:
        return pack_message(self)

    @classmethod
    def from_bytes(cls, payload: bytes) -> BackboneOffer:
        fields = Fields(unpack_bounded(payload, max_bytes=MAX_MESSAGE_BYTES), "backbone offer")
        offer = cls(
            owner=fields.text("owner", 64),
            fingerprint=check_fingerprint(fields.text("fingerprint", 64)),
            listing_sha256=fields.text("listing_sha256", 64),
            size=fields.integer("size", 0, MAX_BACKBONE_BYTES),
            refusal=fields.text("refusal", 1000),
        )
        if not offer.refusal and not _SHA256.fullmatch(offer.listing_sha256):
            raise FrameError(f"backbone offer: listing_sha256 {offer.listing_sha256!r:.80} is not 64 hexadecimal digits")
        return offer


@dataclass(frozen=True)
class Part:
    """Part `index` of a backbone: a stretch of one file."""

    index: int
    file: str
    offset: int
    size: int


@dataclass(frozen=True)
class BackboneListing:
    """The files of a backbone and the digest of each part, file after file; no part reaches over a file's end."""

    fingerprint: str
    manifest: str  # the text of manifest.json, which says whether this program can use the rest at all
    files: tuple[tuple[str, int], ...]  # name, bytes
    part_bytes: int
    digests: bytes  # DIGEST_BYTES for each part

    @property
    def size(self) -> int:
        return sum(size for _, size in self.files)

    def parts(self) -> list[Part]:
        found: list[Part] = []
        for name, size in self.files:
            for offset in range(0, size, self.part_bytes):
                found.append(Part(len(found), name, offset, min(self.part_bytes, size - offset)))
        return found

    def digest(self, index: int) -> bytes:
        return self.digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]

    def to_bytes(self) -> bytes:
        return pack_message(self)

    @classmethod
    def from_bytes(cls, payload: bytes) -> BackboneListing:
        fields = Fields(unpack_bounded(payload, max_bytes=MAX_MANIFEST_BYTES), "backbone listing")
        files: list[tuple[str, int]] = []
        for entry in fields.items("files", MAX_FILES):
            if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str) or not _FILE_NAME.fullmatch(entry[0]):
                raise FrameError(f"backbone listing: {entry!r:.80} is no name and size of a file")
            if not isinstance(entry[1], int) or isinstance(entry[1], bool) or not 0 <= entry[1] <= MAX_BACKBONE_BYTES:
                raise FrameError(f"backbone listing: {entry[0]} has {entry[1]!r:.80} bytes, not 0 to {MAX_BACKBONE_BYTES}")
            files.append((entry[0], entry[1]))
        if len({name for name, _ in files}) != len(files):
            raise FrameError("backbone listing: a file stands there twice")
        listing = cls(
            fingerprint=check_fingerprint(fields.text("fingerprint", 64)),
            manifest=fields.text("manifest", MAX_MESSAGE_BYTES),
            files=tuple(files),
            part_bytes=fields.integer("part_bytes", 1024, MAX_PART_BYTES),
            digests=fields.binary("digests", MAX_PARTS * DIGEST_BYTES),
        )
        if listing.size > MAX_BACKBONE_BYTES:
            raise FrameError(f"backbone listing: {listing.size} bytes in all, more than {MAX_BACKBONE_BYTES}")
        count = sum(-(-size // listing.part_bytes) for _, size in files)
        if len(listing.digests) != count * DIGEST_BYTES:
            raise FrameError(f"backbone listing: {len(listing.digests)} bytes of digests for {count} parts")
        return listing


@dataclass(frozen=True)
class PartRequest:
    """Parts that a device wants; `afresh`: in place of all that it asked for before."""

    fingerprint: str
    parts: tuple[int, ...]
    afresh: bool = False

    def to_bytes(self) -> bytes:
        return pack_message(self)

    @classmethod
    def from_bytes(cls, payload: bytes) -> PartRequest:
        fields = Fields(unpack_bounded(payload, max_bytes=4096), "part request")
        parts = fields.items("parts", MAX_PARTS_ASKED)
        if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < MAX_PARTS for n in parts):
            raise FrameError(f"part request: parts holds something that is not a whole number from 0 to {MAX_PARTS - 1}")
        return cls(check_fingerprint(fields.text("fingerprint", 64)), tuple(dict.fromkeys(parts)), fields.flag("afresh"))
