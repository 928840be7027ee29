"""The side network: a gated ladder over aligned activations, with a classification head.

    z_0 = 0;  z_b = Block_b(g_b * z_{b-1} + (1 - g_b) * x_b),  g_b = sigmoid(a_b / T),  T = 0.1, a_b = 0 at the start
    logits = Head(Norm(pool(z_B)))

Block_b is a pre-norm residual block: an MLP for `pooled` taps, a small transformer layer for `sequence` taps. Where samples
have a summary (`side_tuning.network.summary`), pool takes its row; else the mean over tokens. The ladder knows
tapped widths and block numbers, never the backbone. Where the inputs come through anchor maps, its `entry`, one alignment
that all backbone types share, takes them to the side width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from side_tuning.network.alignment import Alignment
from side_tuning.network.anchor_map import AnchorMap
from side_tuning.wire.messages import Mode

GATE_TEMPERATURE = 0.1


@dataclass(frozen=True)
class SideNetworkConfig:
    """Everything that fixes the shapes and the arithmetic of a `SideNetwork`."""

    side_width: int
    blocks: int
    classes: int
    mode: Mode
    heads: int = 4  # `sequence` mode
    expansion: int = 2  # hidden width of the MLPs, in side widths
    dropout: float = 0.1
    entry_width: int = 0  # of inputs that come through anchor maps; 0: they come aligned, in the side width
    summary: bool = False  # `sequence` mode: samples have a summary, and the head reads what becomes of it alone
    entry_summary_width: int = 0  # of summaries that come through anchor maps, folded to `entry_width`

    @property
    def width_in(self) -> int:
        return self.entry_width or self.side_width

    @property
    def summary_width(self) -> int:
        """Of a summary as it comes in; 0 without one."""
        return (self.entry_summary_width or self.side_width) if self.summary else 0

    def __post_init__(self) -> None:
        if self.mode == "sequence" and self.side_width % self.heads:
            raise ValueError(f"side width {self.side_width} is no multiple of {self.heads} heads; choose another side width")
        if self.summary and self.mode != "sequence":
            raise ValueError(f"a summary in {self.mode} mode; only samples in sequence mode have one")
        if (self.entry_summary_width > 0) != (self.summary and self.entry_width > 0):
            raise ValueError(f"an entry_summary_width of {self.entry_summary_width} with an entry_width of {self.entry_width} and summary {self.summary}")


class MlpBlock(nn.Module):
    """Pre-norm residual MLP."""

    def __init__(self, config: SideNetworkConfig) -> None:
        super().__init__()
        hidden = config.side_width * config.expansion
        self.norm = nn.LayerNorm(config.side_width)
        self.up = nn.Linear(config.side_width, hidden)
        self.down = nn.Linear(hidden, config.side_width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, h: Tensor, mask: Tensor | None) -> Tensor:
        return h + self.dropout(self.down(self.dropout(F.gelu(self.up(self.norm(h))))))


class TransformerBlock(nn.Module):
    """Pre-norm self-attention over the real tokens, then the MLP.

    No positions are added: the backbone's hidden states carry them.
    """

    def __init__(self, config: SideNetworkConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm = nn.LayerNorm(config.side_width)
        self.query_key_value = nn.Linear(config.side_width, 3 * config.side_width)
        self.out = nn.Linear(config.side_width, config.side_width)
        self.dropout = nn.Dropout(config.dropout)
        self.mlp = MlpBlock(config)

    def forward(self, h: Tensor, mask: Tensor | None, wanted: int | None = None) -> Tensor:
        """(N, T, s) to the first `wanted` of its rows, or all of them: (N, wanted, s)."""
        N, T, s = h.shape
        normed, weight, bias = self.norm(h), self.query_key_value.weight, self.query_key_value.bias
        h = h[:, :wanted]
        q = F.linear(normed[:, :wanted], weight[:s], bias[:s]).view(N, -1, self.heads, s // self.heads).transpose(1, 2)
        k, v = F.linear(normed, weight[s:], bias[s:]).view(N, T, 2, self.heads, s // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None, :])
        return self.mlp(h + self.dropout(self.out(mixed.transpose(1, 2).reshape(h.shape))), mask)


class SideNetwork(nn.Module):
    """Aligned or anchored taps `(N, B, s)`, or `(N, B, T, s)` with a mask `(N, T)`, to logits `(N, classes)`."""

    def __init__(self, config: SideNetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.entry = None
        if config.entry_width:
            self.entry = Alignment(config.entry_width, config.side_width, config.blocks, config.entry_summary_width, config.side_width)
        self.gate_logits = nn.Parameter(torch.zeros(config.blocks))
        block = MlpBlock if config.mode == "pooled" else TransformerBlock
        self.blocks = nn.ModuleList(block(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.side_width)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.side_width, config.classes)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        wanted = (self.config.blocks, self.config.width_in)
        if (x.shape[1], x.shape[-1]) != wanted or x.dim() != (3 if self.config.mode == "pooled" else 4):
            raise ValueError(f"side inputs of shape {tuple(x.shape)} do not fit {wanted[0]} blocks of width {wanted[1]}")
        if self.entry is not None:
            x, mask = self.entry(x), self.entry.ladder_mask(mask)
        z = torch.zeros_like(x[:, 0])
        gates = torch.sigmoid(self.gate_logits / GATE_TEMPERATURE)
        for b, block in enumerate(self.blocks):
            h = gates[b] * z + (1 - gates[b]) * x[:, b]
            read_by_head = self.config.summary and b == len(self.blocks) - 1  # of the last block's rows the first alone
            z = block(h, mask, 1) if read_by_head else block(h, mask)
        return self.head(self.dropout(self.norm(self._pool(z, mask))))

    def _pool(self, z: Tensor, mask: Tensor | None) -> Tensor:
        if self.config.mode == "pooled":
            return z
        if self.config.summary:
            return z[:, 0]
        if mask is None:
            return z.mean(1)
        real = mask.unsqueeze(-1).to(z.dtype)
        # where(), not a product: whatever stands in the padding, even inf, must not reach the sum.
        return torch.where(mask.unsqueeze(-1), z, 0.0).sum(1) / real.sum(1).clamp(min=1.0)


def block_inputs(taps: dict[int, np.ndarray], layers_per_block: tuple[int, ...]) -> np.ndarray:
    """Stack taps `(N, d)` or `(N, T, d)` into `(N, B, ...)`; a layer that stands for two blocks is repeated."""
    missing = sorted(set(layers_per_block) - set(taps))
    if missing:
        raise ValueError(f"taps of layers {missing} are missing; there are taps of layers {sorted(taps)}")
    return np.stack([taps[layer] for layer in layers_per_block], axis=1)


def pad_tokens(rows: np.ndarray, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Token rows of several samples `(sum(tokens), ...)` to `(N, T, ...)` and the mask `(N, T)`, true at real tokens."""
    if sum(tokens) != len(rows):
        raise ValueError(f"{len(rows)} token rows, but the samples count {sum(tokens)} tokens")
    counts = np.asarray(tokens)
    mask = np.arange(max(tokens, default=0)) < counts[:, None]
    padded = np.zeros((*mask.shape, *rows.shape[1:]), rows.dtype)
    padded[mask] = rows
    return padded, mask


def predict_logits(alignment: Alignment | AnchorMap, ladder: SideNetwork, inputs: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Logits `(N, classes)` for block inputs `(N, B, d)` or `(N, B, T, d)`; the device and the evaluation both call this."""
    at = ladder.head.weight.device
    was_training = ladder.training
    ladder.eval()
    with torch.inference_mode():
        x = torch.from_numpy(np.ascontiguousarray(inputs, np.float32)).to(at)
        real = None if mask is None else torch.from_numpy(mask).to(at)
        logits = ladder(alignment(x), alignment.ladder_mask(real)).cpu().numpy()
    ladder.train(was_training)
    return logits
