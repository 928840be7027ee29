"""What travels about backbones survives the trip, and nothing senseless or oversized gets in."""

from __future__ import annotations

from dataclasses import replace

import msgpack
import pytest

from side_tuning.wire.backbone_messages import (
    DIGEST_BYTES,
    MAX_BACKBONE_BYTES,
    MAX_PARTS,
    MAX_PARTS_ASKED,
    BackboneListing,
    BackboneOffer,
    Part,
    PartRequest,
    digest_of,
)
from side_tuning.wire.bounded import FrameError

FINGERPRINT = "ab" * 16
OFFER = BackboneOffer("kitchen", FINGERPRINT, "cd" * 32, 12_345)
LISTING = BackboneListing(FINGERPRINT, "{}", (("config.json", 0), ("model.safetensors", 2500), ("tokenizer.json", 1024)), 1024, bytes(4 * DIGEST_BYTES))


def test_they_survive_the_trip():
    for message in (OFFER, replace(OFFER, listing_sha256="", size=0, refusal="no room"), LISTING, PartRequest(FINGERPRINT, (3, 1), afresh=True)):
        assert type(message).from_bytes(message.to_bytes()) == message


def test_no_part_reaches_over_a_files_end():
    assert LISTING.parts() == [
        Part(0, "model.safetensors", 0, 1024), Part(1, "model.safetensors", 1024, 1024), Part(2, "model.safetensors", 2048, 452), Part(3, "tokenizer.json", 0, 1024),
    ]
    digests = b"".join(digest_of(bytes([n])) for n in range(4))
    assert [replace(LISTING, digests=digests).digest(n) for n in range(4)] == [digest_of(bytes([n])) for n in range(4)]


WRONG = [
    (replace(OFFER, fingerprint="../../etc"), "fingerprint"),
    (replace(OFFER, size=MAX_BACKBONE_BYTES + 1), "size"),
    (replace(OFFER, listing_sha256="cd"), "listing_sha256"),
    (replace(OFFER, refusal="x" * 1001), "refusal"),
    (replace(LISTING, files=(("../up.json", 1),)), "no name and size"),
    (replace(LISTING, files=(("/etc/passwd", 1),)), "no name and size"),
    (replace(LISTING, files=(("config.json", -1),)), "not 0 to"),
    (replace(LISTING, files=(("config.json", True),)), "not 0 to"),
    (replace(LISTING, files=(("config.json", 1), ("config.json", 1))), "twice"),
    (replace(LISTING, files=tuple((f"a{n}.json", 1) for n in range(17))), "files"),
    (replace(LISTING, files=(("a.bin", MAX_BACKBONE_BYTES), ("b.bin", 1)), part_bytes=1024 * 1024), "in all"),
    (replace(LISTING, part_bytes=0), "part_bytes"),
    (replace(LISTING, digests=bytes(3 * DIGEST_BYTES)), "digests for 4 parts"),
    (replace(LISTING, digests=bytes((MAX_PARTS + 1) * DIGEST_BYTES)), "digests"),
    (PartRequest(FINGERPRINT, (-1,)), "parts"),
    (PartRequest(FINGERPRINT, (MAX_PARTS,)), "parts"),
    (PartRequest(FINGERPRINT, tuple(range(MAX_PARTS_ASKED + 1))), "parts"),
    (PartRequest("zz", (1,)), "fingerprint"),
]


@pytest.mark.parametrize(("message", "words"), WRONG)
def test_what_is_wrong_is_named(message, words):
    with pytest.raises(FrameError, match=words):
        type(message).from_bytes(message.to_bytes())


@pytest.mark.parametrize("kind", [BackboneOffer, BackboneListing, PartRequest])
@pytest.mark.parametrize("payload", [b"", b"\xc1", b"\x80", msgpack.packb([1]), bytes(300_000), b"\xdf\xff\xff\xff\xff"])
def test_bytes_that_are_none_of_them(kind, payload):
    with pytest.raises(FrameError):
        kind.from_bytes(payload)
