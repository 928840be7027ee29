"""Anchor map: a fixed linear map from one backbone type's taps into the space that all types share.

It is fitted by the coordinator on anchors, a small public set of texts that runs through every backbone (METHOD.md,
"Consistency"). Unlike a trained `Alignment` it never sees a label, so devices with few classes cannot pull their type's
space away from the others'; and as it never changes, a device fetches it once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from side_tuning.network.summary import TapModule

CLAMP = 10.0  # standard deviations, as in `Alignment`


@dataclass(frozen=True)
class AnchorMapConfig:
    """Everything that fixes the shapes of an `AnchorMap`."""

    width_in: int
    width_out: int
    blocks: int
    summary_width: int = 0  # as of an `AlignmentConfig`
    summary_width_out: int = 0


class AnchorMap(TapModule):
    """Activations `(N, B, d)` or `(N, B, T, d)` to shared inputs `(N, B, r)` or `(N, B, T, r)`; every block feeds every block.

    With a summary: `(N, B, k + T, d)` to `(N, B, l + T, r)`, the first l rows being the folded shared vector of the summary.
    """

    config: AnchorMapConfig
    summary: AnchorMap | None
    mean: Tensor
    spread: Tensor
    matrix: Tensor

    def __init__(self, width_in: int, width_out: int, blocks: int, summary_width: int = 0, summary_width_out: int = 0) -> None:
        super().__init__()
        self.config = AnchorMapConfig(width_in, width_out, blocks, summary_width, summary_width_out)
        self.summary = AnchorMap(summary_width, summary_width_out, blocks) if summary_width else None
        self.register_buffer("mean", torch.zeros(blocks, width_in))
        self.register_buffer("spread", torch.ones(blocks, width_in))
        # Half precision: its error is far below the codec's.
        self.register_buffer("matrix", torch.zeros(blocks * width_in, blocks * width_out, dtype=torch.float16))

    def with_summary(self, summary: AnchorMap) -> AnchorMap:
        """The same map, with `summary` for the folded rows before the tokens."""
        config, of_summary = self.config, summary.config
        both = AnchorMap(config.width_in, config.width_out, config.blocks, of_summary.width_in, of_summary.width_out)
        own = {**self.state_dict(), **{f"summary.{name}": tensor for name, tensor in summary.state_dict().items()}}
        both.load_state_dict(own)
        return both

    def observe(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Nothing: the statistics are those of the anchors, for good."""

    def _aligned(self, x: Tensor) -> Tensor:
        blocks, width_in, width_out = self.config.blocks, self.config.width_in, self.config.width_out
        if x.shape[1] != blocks or x.shape[-1] != width_in:
            raise ValueError(f"activations of shape {tuple(x.shape)} do not fit {blocks} blocks of width {width_in}")
        rows = x if x.dim() == 3 else x.transpose(1, 2)  # (N, B, d) or (N, T, B, d)
        rows = ((rows - self.mean) / self.spread).clamp(-CLAMP, CLAMP)
        shared = rows.flatten(-2) @ self.matrix.to(rows.dtype)
        shared = shared.view(*shared.shape[:-1], blocks, width_out)
        return shared if x.dim() == 3 else shared.transpose(1, 2)
