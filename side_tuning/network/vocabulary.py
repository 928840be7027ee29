"""Loss over a large vocabulary in bounded memory, through a frozen head.

Logits of a batch at once would take rows x vocabulary floats: 4096 rows of a 150,000-token vocabulary 2.5 GB, and as much
again for their gradient. Since the head is frozen, only the gradient with respect to its input is wanted, and that can be
computed with the loss, a few rows at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

LOGITS_AT_A_TIME = 1 << 24  # 64 MB
VOCABULARY_AT_A_TIME = 1 << 14  # entries whose int8 rows are floats at one time


class Vocabulary(Protocol):
    """The frozen matrix (V, e) of a language model's head."""

    @property
    def size(self) -> int: ...

    def rows(self, start: int, end: int) -> Tensor:
        """Entries `start` to `end` as float32, (end - start, e)."""


@dataclass
class FloatVocabulary:
    """Entries kept as they are, (V, e)."""

    weight: Tensor

    @property
    def size(self) -> int:
        return int(self.weight.shape[0])

    def rows(self, start: int, end: int) -> Tensor:
        return self.weight[start:end].float()


@dataclass
class Int8Vocabulary:
    """Entries of int8, (V, e), with one scale each, (V, 1)."""

    data: Tensor
    scale: Tensor

    @property
    def size(self) -> int:
        return int(self.data.shape[0])

    def rows(self, start: int, end: int) -> Tensor:
        return self.data[start:end].float() * self.scale[start:end].float()


def token_losses(h: Tensor, vocabulary: Vocabulary, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What each row loses, without gradients.

    Args:
        h: what the head's matrix is applied to, (n, e).
        vocabulary: the matrix.
        targets: (n,) token ids.

    Returns:
        Cross entropies in nats (n,), and whether the target was the most probable token (n,) bool.

    """
    losses, right = torch.empty(len(h), device=h.device), torch.empty(len(h), dtype=torch.bool, device=h.device)
    with torch.no_grad():
        for rows in _slices(len(h), vocabulary):
            logits = logits_of(h[rows], vocabulary)
            losses[rows] = F.cross_entropy(logits, targets[rows], reduction="none")
            right[rows] = logits.argmax(-1) == targets[rows]
    return losses, right


def mean_loss(h: Tensor, vocabulary: Vocabulary, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats with its gradient for `h`; arguments as for `token_losses`."""
    loss: Tensor = _FrozenHeadLoss.apply(h, vocabulary, targets)  # type: ignore[no-untyped-call]
    return loss


class _FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, vocabulary: Vocabulary, targets: Tensor) -> Tensor:
        gradient = torch.empty_like(h)
        total = h.new_zeros(())
        for rows in _slices(len(h), vocabulary):
            logits = logits_of(h[rows], vocabulary)
            total += F.cross_entropy(logits, targets[rows], reduction="sum")
            odds = torch.softmax(logits, dim=-1)
            odds[torch.arange(len(odds), device=h.device), targets[rows]] -= 1.0
            part = torch.zeros_like(h[rows])
            for start in range(0, vocabulary.size, VOCABULARY_AT_A_TIME):
                end = min(vocabulary.size, start + VOCABULARY_AT_A_TIME)
                part += odds[:, start:end] @ vocabulary.rows(start, end)
            gradient[rows] = part / len(h)
        ctx.save_for_backward(gradient)
        return total / len(h)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None


def _slices(rows: int, vocabulary: Vocabulary) -> list[slice]:
    size = max(1, LOGITS_AT_A_TIME // vocabulary.size)
    return [slice(start, min(rows, start + size)) for start in range(0, rows, size)]


def logits_of(h: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Logits (n, V) of a few rows (n, e)."""
    if vocabulary.size <= VOCABULARY_AT_A_TIME:
        return h @ vocabulary.rows(0, vocabulary.size).T
    logits = h.new_empty(len(h), vocabulary.size)
    for start in range(0, vocabulary.size, VOCABULARY_AT_A_TIME):
        end = min(vocabulary.size, start + VOCABULARY_AT_A_TIME)
        torch.mm(h, vocabulary.rows(start, end).T, out=logits[:, start:end])
    return logits
