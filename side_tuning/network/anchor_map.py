"""Anchor map: a fixed linear map from one backbone type's taps into the space that all types share.

It is fitted by the coordinator on anchors, a small public set of texts that runs through every backbone (METHOD.md,
"Consistency"). Unlike a trained `Alignment` it never sees a label, so devices with few classes cannot pull their type's
space away from the others'; and as it never changes, a device fetches it once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

CLAMP = 10.0  # standard deviations, as in `Alignment`


@dataclass(frozen=True)
class AnchorMapConfig:
    """Everything that fixes the shapes of an `AnchorMap`."""

    width_in: int
    width_out: int
    blocks: int


class AnchorMap(nn.Module):
    """Activations `(N, B, d)` or `(N, B, T, d)` to shared inputs `(N, B, r)` or `(N, B, T, r)`; every block feeds every block."""

    mean: Tensor
    spread: Tensor
    matrix: Tensor

    def __init__(self, width_in: int, width_out: int, blocks: int) -> None:
        super().__init__()
        self.config = AnchorMapConfig(width_in, width_out, blocks)
        self.register_buffer("mean", torch.zeros(blocks, width_in))
        self.register_buffer("spread", torch.ones(blocks, width_in))
        # Half precision: it is most of what a device fetches, and its error is far below the codec's.
        self.register_buffer("matrix", torch.zeros(blocks * width_in, blocks * width_out, dtype=torch.float16))

    def observe(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Nothing: the statistics are those of the anchors, for good."""

    def forward(self, x: Tensor) -> Tensor:
        blocks, width_in, width_out = self.config.blocks, self.config.width_in, self.config.width_out
        if x.shape[1] != blocks or x.shape[-1] != width_in:
            raise ValueError(f"activations of shape {tuple(x.shape)} do not fit {blocks} blocks of width {width_in}")
        rows = x if x.dim() == 3 else x.transpose(1, 2)  # (N, B, d) or (N, T, B, d)
        rows = ((rows - self.mean) / self.spread).clamp(-CLAMP, CLAMP)
        shared = rows.flatten(-2) @ self.matrix.to(rows.dtype)
        shared = shared.view(*shared.shape[:-1], blocks, width_out)
        return shared if x.dim() == 3 else shared.transpose(1, 2)
