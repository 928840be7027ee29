"""The side network of a language model: a causal ladder that all backbone types share, and what each type has of its own.

    z_0 = tokens(e);  z_b = Block_b(g_b * z_{b-1} + (1 - g_b) * x_b),  b = 1..B
    h   = m * last + (1 - m) * up(z_B),   m = sigmoid(mix), per channel, 0.73 at the start
    logits = frozen head(frozen norm(h))

x_b are the aligned taps and e the backbone's own frozen token embeddings, which cost no bytes since the token ids travel
(METHOD.md, "Side network"; gates after LST, arXiv 2206.06522, and QST, ACL 2024). `up` starts at zero and the norm undoes a
common factor, so that an untrained side network changes nothing. The ladder knows side widths only: backbones of other
widths, depths or tokenizers share it, each with its `LanguageAlignment`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from side_tuning.network.alignment import Alignment
from side_tuning.network.side_network import GATE_TEMPERATURE

MIX_AT_START = 0.73  # of the backbone's last hidden state

KeyValues = tuple[Tensor, Tensor]  # of one block, each (N, heads, T, side_width / heads)


@dataclass(frozen=True)
class LanguageLadderConfig:
    """Everything that fixes the shapes and the arithmetic of a `LanguageLadder`."""

    side_width: int
    blocks: int
    heads: int = 4
    expansion: int = 2  # hidden width of the MLPs, in side widths
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.side_width % self.heads:
            raise ValueError(f"side width {self.side_width} is no multiple of {self.heads} heads; choose another side width")


@dataclass(frozen=True)
class LanguageAlignmentConfig:
    """Everything that fixes the shapes of a `LanguageAlignment`."""

    width_in: int  # of every tap: the plan's rank, or the backbone's width where that is less
    token_width: int  # of the frozen token embeddings
    width: int  # of the backbone's hidden states
    side_width: int
    blocks: int

    @property
    def width_out(self) -> int:
        return self.side_width

    @property
    def summary_width(self) -> int:
        return 0  # a language model's samples are rows


class CausalBlock(nn.Module):
    """Pre-norm causal self-attention, then a pre-norm MLP.

    No positions are added: the backbone's hidden states carry them.
    """

    def __init__(self, config: LanguageLadderConfig) -> None:
        super().__init__()
        s = config.side_width
        self.heads = config.heads
        self.norm = nn.LayerNorm(s)
        self.query_key_value = nn.Linear(s, 3 * s)
        self.out = nn.Linear(s, s)
        self.mlp_norm = nn.LayerNorm(s)
        self.up = nn.Linear(s, s * config.expansion)
        self.down = nn.Linear(s * config.expansion, s)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, h: Tensor, past: KeyValues | None = None) -> tuple[Tensor, KeyValues]:
        """(N, T, s) to the same, and the keys and values of all rows so far.

        Padding on the right needs no mask: no row looks to its right.
        """
        N, T, s = h.shape
        qkv = self.query_key_value(self.norm(h)).view(N, T, 3, self.heads, s // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, T, s / heads)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        mask = None
        if T > 1:  # row t of the new ones sees all of the past and the new ones up to t
            mask = torch.ones(T, k.shape[2], dtype=torch.bool, device=h.device).tril(k.shape[2] - T)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        h = h + self.dropout(self.out(mixed.transpose(1, 2).reshape(N, T, s)))
        h = h + self.dropout(self.down(F.gelu(self.up(self.mlp_norm(h)))))
        return h, (k, v)


class LanguageLadder(nn.Module):
    """The part that every backbone type shares."""

    def __init__(self, config: LanguageLadderConfig) -> None:
        super().__init__()
        self.config = config
        self.gate_logits = nn.Parameter(torch.zeros(config.blocks))
        self.blocks = nn.ModuleList(CausalBlock(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.side_width)

    def forward(self, x: Tensor, tokens: Tensor, past: list[KeyValues] | None = None) -> tuple[Tensor, list[KeyValues]]:
        """Run the ladder over new rows.

        Args:
            x: aligned taps, (N, B, T, s).
            tokens: aligned token embeddings, (N, T, s).
            past: what an earlier call returned for the rows before these; None at the beginning.

        Returns:
            Normalised (N, T, s), and each block's keys and values of all rows so far.

        """
        wanted = (self.config.blocks, self.config.side_width)
        if x.dim() != 4 or (x.shape[1], x.shape[-1]) != wanted:
            raise ValueError(f"side inputs of shape {tuple(x.shape)} do not fit {wanted[0]} blocks of width {wanted[1]}")
        gates = torch.sigmoid(self.gate_logits / GATE_TEMPERATURE)
        z, kept = tokens, []
        for b, block in enumerate(self.blocks):
            z, seen = block(gates[b] * z + (1 - gates[b]) * x[:, b], None if past is None else past[b])
            kept.append(seen)
        return self.norm(z), kept


class LanguageAlignment(nn.Module):
    """What one backbone type has of its own: its taps and tokens into the side width, and back into its hidden states."""

    def __init__(self, config: LanguageAlignmentConfig) -> None:
        super().__init__()
        self.config = config
        self.taps = Alignment(config.width_in, config.side_width, config.blocks)
        self.tokens = Alignment(config.token_width, config.side_width, 1)
        self.up = nn.Linear(config.side_width, config.width, bias=False)
        self.mix_logits = nn.Parameter(torch.empty(config.width))
        if not self.mix_logits.is_meta:
            nn.init.zeros_(self.up.weight)
            nn.init.constant_(self.mix_logits, math.log(MIX_AT_START / (1 - MIX_AT_START)))

    def reset_projection(self, generator: torch.Generator) -> None:
        self.taps.reset_projection(generator)
        self.tokens.reset_projection(generator)

    @torch.no_grad()
    def observe(self, x: Tensor, embedded: Tensor, mask: Tensor) -> None:
        """Let real rows into the running statistics; shapes as for `enter`, `mask` (N, T) true at real rows."""
        self.taps.observe(x, mask)
        self.tokens.observe(embedded.unsqueeze(1), mask)

    def enter(self, x: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """Taps (N, B, T, r) and token embeddings (N, T, e) to what the ladder takes: (N, B, T, s) and (N, T, s)."""
        return self.taps(x), self.tokens(embedded.unsqueeze(1)).squeeze(1)

    def leave(self, z: Tensor, last: Tensor) -> Tensor:
        """Ladder output (..., s) and last hidden states (..., d) to the hidden states (..., d) that the frozen head reads."""
        mix = torch.sigmoid(self.mix_logits)
        return mix * last + (1 - mix) * self.up(z)
