"""What keeps a card from being written, in words for the person who holds it."""

from __future__ import annotations


class FlashError(RuntimeError):
    """The card cannot be made; each problem says what was wrong, with which value, and what to do."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems
