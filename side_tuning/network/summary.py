"""The summary of a sample in `sequence` mode: its pooled vector in full width, folded into rows in front of its tokens.

Tokens travel through a map of low rank, which costs many classes dear: what is left of 384 numbers in 64 is not enough to
tell 64 intents apart (docs/lab-notes.md). One vector in full width a sample gives that back. In the ladder it is a row
like a token's, the one that the others are gathered into and that the head reads.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from side_tuning.wire.messages import folded_rows


class Widths(Protocol):
    """What the configuration of a `TapModule` says at the least."""

    @property
    def width_in(self) -> int: ...
    @property
    def width_out(self) -> int: ...
    @property
    def summary_width(self) -> int: ...  # 0: samples have no summary


class TapModule(nn.Module):
    """Base of what takes taps to side inputs: where samples have a summary, `summary`, of the same kind, takes that."""

    config: Widths
    summary: TapModule | None

    def forward(self, x: Tensor) -> Tensor:
        if self.summary is None:
            return self._aligned(x)
        summaries, tokens = self.split(x)
        return self._joined(self.summary(summaries), self._aligned(tokens))

    def _aligned(self, x: Tensor) -> Tensor:
        """Rows (N, B, d) or (N, B, T, d), no summary among them, to what they become."""
        raise NotImplementedError

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Taps (N, B, k + T, width_in) to the summaries (N, B, summary_width) and the token rows (N, B, T, width_in)."""
        k = folded_rows(self.config.summary_width, self.config.width_in)
        if x.dim() != 4 or x.shape[2] < k:
            raise ValueError(f"activations of shape {tuple(x.shape)} do not begin with the {k} rows of a summary")
        return x[:, :, :k].flatten(2)[..., : self.config.summary_width], x[:, :, k:]

    def token_mask(self, mask: Tensor) -> Tensor:
        """Mask (N, k + T) of what comes in to (N, T), of the token rows alone."""
        return mask[:, folded_rows(self.config.summary_width, self.config.width_in) :]

    def ladder_mask(self, mask: Tensor | None) -> Tensor | None:
        """Mask (N, k + T) of what comes in to the one of what goes out; without a summary they are alike."""
        if mask is None or self.summary is None:
            return mask
        return F.pad(self.token_mask(mask), (folded_rows(self.summary.config.width_out, self.config.width_out), 0), value=True)

    def _joined(self, summaries: Tensor, tokens: Tensor) -> Tensor:
        """What the summaries (N, B, v) and the token rows (N, B, T, w) became to (N, B, k + T, w); k is 1 where v is w."""
        N, B, width = summaries.shape
        folded = F.pad(summaries, (0, -width % tokens.shape[-1])).view(N, B, -1, tokens.shape[-1])
        return torch.cat([folded, tokens], dim=2)
