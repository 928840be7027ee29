"""Layers that compute with quantized weights as optimum-quanto stores them, in plain torch operations.

They give what quanto's own layers give, up to float noise (1e-6 of an output). Quanto itself stays off the device: it
is slow to import, and its int4 layers fail under `inference_mode` on torch 2.13 ("Cannot set version_counter for inference tensor").
Nothing here needs a compiler.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Scratch:
    """Memory for one layer's weights as floats, used by all layers of a model in turn: new memory for each costs as much as a small batch."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def take(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """A matrix (rows, columns) with anything in it, good until the next call."""
        if self._memory.numel() < rows * columns or self._memory.dtype != dtype:
            self._memory = torch.empty(0)  # the old one goes first
            self._memory = torch.empty(rows * columns, dtype=dtype)
        return self._memory[: rows * columns].view(rows, columns)


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and one scale per output. For forward passes only: the floats do not stay."""

    data: Tensor  # (out, in) int8
    scale: Tensor  # (out, 1)
    bias: Tensor | None

    def __init__(self, data: Tensor, scale: Tensor, bias: Tensor | None, scratch: Scratch | None = None) -> None:
        super().__init__()
        if data.dtype != torch.int8 or data.ndim != 2 or scale.shape != (data.shape[0], 1):
            raise ValueError(f"int8 weights {tuple(data.shape)} {data.dtype} with scales {tuple(scale.shape)}")
        self.scratch = scratch or Scratch()
        self.register_buffer("data", data)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        # The scales go onto the outputs: fewer than the weights, and an integer becomes a float without an error.
        out = F.linear(x, self.scratch.take(self.data.shape[0], self.data.shape[1], x.dtype).copy_(self.data))
        scale = self.scale.flatten()
        return out.mul_(scale) if self.bias is None else torch.addcmul(self.bias, out, scale, out=out)


class Int4Linear(nn.Module):
    """A linear layer with int4 weights, scale and shift per group of inputs. For forward passes only.

    Row i of `data` holds group i in its low half-bytes and group i + rows in its high ones.
    """

    data: Tensor  # (groups / 2, group) uint8
    scale: Tensor  # (groups, 1)
    shift: Tensor  # (groups, 1)
    bias: Tensor | None

    def __init__(  # noqa: PLR0917 - as stored
        self, data: Tensor, scale: Tensor, shift: Tensor, bias: Tensor | None, outputs: int, scratch: Scratch | None = None
    ) -> None:
        super().__init__()
        groups = scale.shape[0]
        if (
            data.dtype != torch.uint8
            or data.ndim != 2
            or data.shape[0] != (groups + 1) // 2
            or scale.shape != (groups, 1)
            or shift.shape != scale.shape
            or groups % outputs
        ):
            raise ValueError(f"int4 weights {tuple(data.shape)} {data.dtype} with scales {tuple(scale.shape)}")
        self.outputs = outputs
        self.scratch = scratch or Scratch()
        self.register_buffer("data", data)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        rows, group = self.data.shape
        groups = self.scratch.take(2 * rows, group, x.dtype)
        groups[:rows].copy_(self.data & 15)
        groups[rows:].copy_(self.data >> 4)
        weight = groups[: self.scale.shape[0]].mul_(self.scale).sub_(self.shift)
        out = F.linear(x, weight.view(self.outputs, -1))
        return out if self.bias is None else out.add_(self.bias)


class Int8Embedding(nn.Module):
    """An embedding table of int8 rows with one scale each; only the rows looked up become floats."""

    data: Tensor  # (rows, width) int8
    scale: Tensor  # (rows, 1)

    def __init__(self, data: Tensor, scale: Tensor) -> None:
        super().__init__()
        if data.dtype != torch.int8 or data.ndim != 2 or scale.shape != (data.shape[0], 1):
            raise ValueError(f"int8 rows {tuple(data.shape)} {data.dtype} with scales {tuple(scale.shape)}")
        self.register_buffer("data", data)
        self.register_buffer("scale", scale)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.data).to(self.scale.dtype) * F.embedding(ids, self.scale)

    @staticmethod
    def quantize(table: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and scales for a float table; a row of zeros stays zeros."""
        scale = table.abs().amax(dim=1, keepdim=True) / 127
        data = torch.where(scale > 0, table / scale, torch.zeros_like(table)).round().to(torch.int8)
        return data, scale
