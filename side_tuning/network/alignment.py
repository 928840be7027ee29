"""Alignment: brings the tapped activations of one backbone type into the side network's width.

Per block: running normalisation, then a trainable projection; then a learned soft layer map over the blocks. One
`Alignment` serves every device with the same backbone (METHOD.md: keyed by type, never by device).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from side_tuning.network.summary import TapModule

LOW_RANK_ABOVE = 1024  # widths above this are projected through a bottleneck
CLAMP = 10.0  # standard deviations; one stray channel must not carry a whole vector away
DIAGONAL_AT_START = 0.99  # weight of the own block in the soft layer map
SLOWEST_RATE = 1e-5  # per row: after 100,000 rows the statistics follow slowly instead of cumulating


@dataclass(frozen=True)
class AlignmentConfig:
    """Everything that fixes the shapes of an `Alignment`."""

    width_in: int
    side_width: int
    blocks: int
    summary_width: int = 0  # of the vectors whose folded rows come first; 0: there are none
    summary_width_out: int = 0  # that they are brought to; other than the side width only before a ladder with an entry

    @property
    def width_out(self) -> int:
        return self.side_width

    @property
    def bottleneck(self) -> int | None:
        """Rank of the projection where the width is large, None where it is a plain matrix."""
        return max(16, self.side_width // 2) if self.width_in > LOW_RANK_ABOVE else None


class Alignment(TapModule):
    """Activations `(N, B, d)` or `(N, B, T, d)` to side inputs `(N, B, s)` or `(N, B, T, s)`.

    With a summary: `(N, B, k + T, d)`, the first k rows being the folded summary, to `(N, B, l + T, s)`; l is 1 where
    summaries are brought to the side width.
    """

    config: AlignmentConfig
    summary: Alignment | None
    mean: Tensor
    variance: Tensor
    rows: Tensor

    def __init__(self, width_in: int, side_width: int, blocks: int, summary_width: int = 0, summary_width_out: int = 0) -> None:
        super().__init__()
        self.config = AlignmentConfig(width_in, side_width, blocks, summary_width, summary_width_out)
        self.summary = Alignment(summary_width, summary_width_out, blocks) if summary_width else None
        self.input_dropout = 0.0
        # Statistics start as one imaginary row with mean 0 and variance 1, so a first single row is no division by zero.
        self.register_buffer("mean", torch.zeros(blocks, width_in))
        self.register_buffer("variance", torch.ones(blocks, width_in))
        self.register_buffer("rows", torch.ones((), dtype=torch.int64))
        bottleneck = self.config.bottleneck
        if bottleneck is None:
            self.narrow = None
            self.project = nn.Parameter(torch.empty(blocks, width_in, side_width))
        else:
            self.narrow = nn.Parameter(torch.empty(blocks, width_in, bottleneck))
            self.project = nn.Parameter(torch.empty(blocks, bottleneck, side_width))
        self.bias = nn.Parameter(torch.zeros(blocks, side_width))
        off_diagonal = math.log(DIAGONAL_AT_START / (1 - DIAGONAL_AT_START) * max(1, blocks - 1))
        self.layer_logits = nn.Parameter(torch.empty(blocks, blocks))
        if not self.layer_logits.is_meta:  # arithmetic on meta tensors makes torch load 70 MB of Python operators
            with torch.no_grad():
                self.layer_logits.copy_(torch.eye(blocks) * off_diagonal)
        self.reset_projection(torch.Generator().manual_seed(0))

    def drop_inputs(self, share: float) -> None:
        """In training, zero this share of the normalised channels; against over-fitting the wide projection."""
        self.input_dropout = share
        if self.summary is not None:
            self.summary.drop_inputs(share)

    def reset_projection(self, generator: torch.Generator) -> None:
        """Draw the projections anew: unit-variance inputs give unit-variance outputs."""
        if self.summary is not None:
            self.summary.reset_projection(generator)
        with torch.no_grad():
            for weight in (self.narrow, self.project):
                if weight is not None and not weight.is_meta:
                    weight.normal_(0.0, weight.shape[1] ** -0.5, generator=generator)

    @torch.no_grad()
    def observe(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Let real rows of `x` into the running statistics: cumulative first, then slow.

        Args:
            x: (N, B, d), or (N, B, T, d) with `mask` (N, T) true at real tokens.
            mask: padding never counts.

        """
        if self.summary is not None:
            summaries, x = self.split(x)
            self.summary.observe(summaries)
            mask = None if mask is None else self.token_mask(mask)
        rows = x.transpose(0, 1) if mask is None else x.permute(0, 2, 1, 3)[mask].transpose(0, 1)  # (B, n, d)
        n = rows.shape[1]
        if n == 0:
            return
        self.rows += n
        rate = max(n / float(self.rows), min(0.5, n * SLOWEST_RATE))
        batch_mean = rows.mean(1)
        shift = batch_mean - self.mean
        within = (rows - batch_mean.unsqueeze(1)).square().mean(1)
        self.variance.mul_(1 - rate).add_(rate * within).add_(rate * (1 - rate) * shift.square())
        self.mean.add_(rate * shift)

    def layer_map(self) -> Tensor:
        """(B, B); row b says how much each tapped layer gives to block b."""
        return torch.softmax(self.layer_logits, dim=-1)

    def _aligned(self, x: Tensor) -> Tensor:
        """Align with the running statistics, in training as on a device: both see the same numbers."""
        blocks, width = self.config.blocks, self.config.width_in
        if x.shape[1] != blocks or x.shape[-1] != width:
            raise ValueError(f"activations of shape {tuple(x.shape)} do not fit {blocks} blocks of width {width}")
        shape = (blocks, 1, width) if x.dim() == 4 else (blocks, width)
        # The floor is relative, so that backbones with large and small activations are treated alike.
        spread = (self.variance + 1e-5 * self.variance.mean(-1, keepdim=True) + 1e-12).sqrt()
        x = ((x - self.mean.view(shape)) / spread.view(shape)).clamp(-CLAMP, CLAMP)
        x = F.dropout(x, self.input_dropout, self.training)
        if self.narrow is not None:
            x = torch.einsum("nb...d,bdr->nb...r", x, self.narrow)
        x = torch.einsum("nb...r,brs->nb...s", x, self.project)
        x = x + self.bias.view((blocks, 1, -1) if x.dim() == 4 else (blocks, -1))
        return torch.einsum("cb,nb...s->nc...s", self.layer_map(), x)
