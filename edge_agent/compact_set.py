"""A set of keys that only grows, at 8 bytes per key: millions of sample ids fit on a small device.

Known weakness: it holds 64-bit hashes, so two different keys are taken for one with probability n**2 / 2**65
(3e-8 for a million keys). Accepted: the price would be one sample not sent, and the memory saved is tenfold.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

DIGEST_BYTES = 8
_MERGE_AT = 4096  # recent keys kept in a plain set before they join the sorted array


def digest_of(key: str) -> int:
    """The 64-bit hash under which `key` is kept."""
    return int.from_bytes(blake2b(key.encode(), digest_size=DIGEST_BYTES).digest(), "little")


class CompactSet:
    """Digests in a sorted array, plus a small set of recent ones that is merged in from time to time."""

    def __init__(self, packed: bytes = b"") -> None:
        """Start with `packed`, digests as little-endian 64-bit numbers one after the other."""
        self._sorted: NDArray[np.uint64] = np.unique(np.frombuffer(packed, dtype="<u8"))
        self._recent: set[int] = set()

    def __contains__(self, digest: int) -> bool:
        if digest in self._recent:
            return True
        place = int(np.searchsorted(self._sorted, np.uint64(digest)))
        return place < len(self._sorted) and int(self._sorted[place]) == digest

    def __len__(self) -> int:
        return len(self._sorted) + len(self._recent)

    def add(self, digests: Iterable[int]) -> None:
        self._recent.update(digest for digest in digests if digest not in self)
        if len(self._recent) >= _MERGE_AT:
            recent = np.fromiter(self._recent, dtype="<u8", count=len(self._recent))
            self._sorted = np.union1d(self._sorted, recent)
            self._recent = set()


def pack_digests(digests: Iterable[int]) -> bytes:
    """The form that `CompactSet(packed)` reads."""
    return b"".join(digest.to_bytes(DIGEST_BYTES, "little") for digest in digests)
