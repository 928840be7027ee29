"""What keeps a card from being written, in words for the person who holds it."""

from __future__ import annotations


class FlashError(RuntimeError):
    """The card cannot be made; the text says what was wrong, with which value, and what to do."""
