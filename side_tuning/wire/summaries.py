"""The rows of a tap in `sequence` mode with a summary: each sample's pooled vector, folded to the rank's width, then its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from side_tuning.wire.messages import folded_rows

Floats = np.ndarray[Any, Any]


def join_summaries(summaries: Floats, rows: Floats, tokens: Sequence[int]) -> Floats:
    """Summaries (samples, v) and token rows (sum(tokens), w) to the rows of a tap; the last of each summary is filled up with zeros."""
    width = rows.shape[1]
    folded = np.pad(summaries, ((0, 0), (0, -summaries.shape[1] % width))).reshape(len(summaries), -1, width)
    parts = np.split(rows, np.cumsum(tokens)[:-1])
    return np.concatenate([part for pair in zip(folded, parts, strict=True) for part in pair])


def split_summaries(rows: Floats, tokens: Sequence[int], summary_width: int) -> tuple[Floats, Floats]:
    """Inverse of `join_summaries`, for one tap or several: (rows, ..., w) to (samples, ..., v) and (sum(tokens), ..., w)."""
    k = folded_rows(summary_width, rows.shape[-1])
    ends = np.cumsum(np.asarray(tokens, np.int64) + k)
    if not len(ends) or ends[-1] != len(rows):
        raise ValueError(f"{len(rows)} rows, but {len(tokens)} samples of {sum(tokens)} tokens and {k} rows of a summary each")
    first = (ends - np.asarray(tokens) - k)[:, None] + np.arange(k)  # (samples, k)
    folded = np.moveaxis(rows[first], 1, -2)  # (samples, ..., k, w)
    summaries = folded.reshape(*folded.shape[:-2], -1)[..., :summary_width]
    return summaries, np.delete(rows, first.ravel(), axis=0)
