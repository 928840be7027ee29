"""Which messages of a program are news: those that differ from earlier ones in more than numbers and hashes."""

from __future__ import annotations

import re

MAX_KINDS = 1000  # a peer could make up reasons for ever; later kinds count as one

_NUMBER_OR_HASH = re.compile(r"\b[0-9a-f]{8,}\b|\d+")


class Repeats:
    """Counts messages by kind, so that the first of a kind is logged loudly and the rest quietly."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def count(self, words: str) -> int:
        """How often this kind has come up, this time included; 1 is news."""
        kind = _NUMBER_OR_HASH.sub("#", words)
        if kind not in self._counts and len(self._counts) >= MAX_KINDS:
            kind = "others"
        self._counts[kind] = self._counts.get(kind, 0) + 1
        return self._counts[kind]
