"""The token ids that travel with the taps of a language model: labels of the rows, and their own embeddings' names.

A sample with n rows has n + 1 ids: what stood at each row, then the token after the last row. Row i is trained to
predict id i + 1; rows left out of the context (`context_every`) come before the first row that is trained, so the ids
that follow each other in the loss followed each other in the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from side_tuning.wire.bounded import FrameError


@dataclass(frozen=True)
class TokenIds:
    """Unsigned little-endian ids of `bytes_each` bytes, sample after sample."""

    bytes_each: Literal[2, 4]
    data: bytes

    @classmethod
    def of(cls, sequences: Sequence[np.ndarray], vocabulary: int) -> TokenIds:
        """Pack one array of ids per sample; `vocabulary` says how many bytes an id takes."""
        joined = np.concatenate(sequences) if sequences else np.empty(0, np.int64)
        if joined.size and not 0 <= joined.min() <= joined.max() < vocabulary:
            raise FrameError(f"token ids from {joined.min()} to {joined.max()} in a vocabulary of {vocabulary}")
        if vocabulary <= 2**16:
            return cls(2, joined.astype("<u2").tobytes())
        return cls(4, joined.astype("<u4").tobytes())

    def sequences(self, tokens: Sequence[int]) -> list[np.ndarray]:
        """Each sample's ids, (tokens + 1,) int64.

        Args:
            tokens: rows of each sample, as the frame states them.

        Raises:
            FrameError: the counts do not make up the data.

        """
        ids = np.frombuffer(self.data, f"<u{self.bytes_each}").astype(np.int64)
        ends = np.cumsum(np.asarray(tokens, np.int64) + 1)
        if len(ids) != (int(ends[-1]) if len(ends) else 0):
            raise FrameError(f"{len(ids)} token ids do not fit samples of {sum(tokens)} tokens")
        return np.split(ids, ends[:-1]) if len(ends) else []
