"""Layers that compute with quantized weights as optimum-quanto stores them, in plain torch operations.

They give what quanto's own layers give, up to float noise (1e-6 of an output). Quanto itself stays off the device: it
is slow to import, and its int4 layers fail under `inference_mode` on torch 2.13 ("Cannot set version_counter for inference tensor").
Nothing here needs a compiler.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and one scale per output."""

    data: Tensor  # (out, in) int8
    scale: Tensor  # (out, 1)
    bias: Tensor | None

    def __init__(self, data: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        if data.dtype != torch.int8 or data.ndim != 2 or scale.shape != (data.shape[0], 1):
            raise ValueError(f"int8 weights {tuple(data.shape)} {data.dtype} with scales {tuple(scale.shape)}")
        self.register_buffer("data", data)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        # The scales go onto the outputs: fewer than the weights, and an integer becomes a float without an error.
        out = F.linear(x, self.data.to(x.dtype))
        scale = self.scale.flatten()
        return out.mul_(scale) if self.bias is None else torch.addcmul(self.bias, out, scale)


class Int4Linear(nn.Module):
    """A linear layer with int4 weights, scale and shift per group of inputs.

    Row i of `data` holds group i in its low half-bytes and group i + rows in its high ones.
    """

    data: Tensor  # (groups / 2, group) uint8
    scale: Tensor  # (groups, 1)
    shift: Tensor  # (groups, 1)
    bias: Tensor | None

    def __init__(self, data: Tensor, scale: Tensor, shift: Tensor, bias: Tensor | None, outputs: int) -> None:
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
        self.register_buffer("data", data)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        groups = torch.cat((self.data & 15, self.data >> 4))[: self.scale.shape[0]]
        weight = (self.scale * groups).sub_(self.shift)
        out = F.linear(x, weight.view(self.outputs, -1))
        return out if self.bias is None else out + self.bias


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
