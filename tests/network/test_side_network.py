"""The ladder must compute METHOD.md's formula, and padding must not change a result."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from side_tuning.network.alignment import Alignment
from side_tuning.network.side_network import (
    SideNetwork,
    SideNetworkConfig,
    block_inputs,
    pad_tokens,
    predict_logits,
)


def seeded_ladder(config: SideNetworkConfig) -> SideNetwork:
    generator = torch.Generator().manual_seed(5)
    ladder = SideNetwork(config).eval()
    with torch.no_grad():
        for parameter in ladder.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return ladder


def slow_norm(row: torch.Tensor, norm: torch.nn.LayerNorm) -> torch.Tensor:
    centred = row - row.mean()
    return centred / torch.sqrt((centred**2).mean() + norm.eps) * norm.weight + norm.bias


def slow_mlp(block: torch.nn.Module, row: torch.Tensor) -> torch.Tensor:
    return row + block.down(F.gelu(block.up(slow_norm(row, block.norm))))


def test_pooled_ladder_equals_the_formula_row_by_row() -> None:
    ladder = seeded_ladder(SideNetworkConfig(8, 3, 5, "pooled"))
    x = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(1))
    for n in range(4):
        z = torch.zeros(8)
        for b in range(3):
            gate = 1 / (1 + torch.exp(-ladder.gate_logits[b] / 0.1))
            z = slow_mlp(ladder.blocks[b], gate * z + (1 - gate) * x[n, b])
        expected = ladder.head(slow_norm(z, ladder.norm))
        assert torch.allclose(ladder(x)[n], expected, atol=1e-5)


def test_sequence_ladder_equals_the_formula_token_by_token() -> None:
    config = SideNetworkConfig(8, 2, 3, "sequence", heads=2)
    ladder = seeded_ladder(config)
    x = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(2))
    z = torch.zeros(5, 8)
    for b, block in enumerate(ladder.blocks):
        gate = torch.sigmoid(ladder.gate_logits[b] / 0.1)
        h = gate * z + (1 - gate) * x[0, b]
        q, k, v = torch.stack([block.query_key_value(slow_norm(row, block.norm)) for row in h]).split(8, dim=-1)
        mixed = torch.zeros(5, 8)
        for head in range(2):
            part = slice(4 * head, 4 * head + 4)
            for i in range(5):
                weights = torch.softmax(torch.stack([q[i, part] @ k[j, part] / 2.0 for j in range(5)]), 0)
                mixed[i, part] = sum(weights[j] * v[j, part] for j in range(5))
        h = h + block.out(mixed)
        z = torch.stack([slow_mlp(block.mlp, row) for row in h])
    expected = ladder.head(slow_norm(z.mean(0), ladder.norm))
    assert torch.allclose(ladder(x)[0], expected, atol=1e-5)
    assert torch.allclose(ladder(x, torch.ones(1, 5, dtype=torch.bool))[0], expected, atol=1e-5)


def test_padding_changes_nothing_whatever_it_holds() -> None:
    ladder = seeded_ladder(SideNetworkConfig(8, 2, 3, "sequence", heads=2))
    x = torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(3))
    alone = ladder(x)
    for rubbish in (0.0, 1e4):
        padded = torch.cat([x, torch.full((1, 2, 6, 8), rubbish)], dim=2)
        mask = torch.arange(10).unsqueeze(0) < 4
        assert torch.allclose(ladder(padded, mask), alone, atol=1e-6)


def test_gates_start_half_open() -> None:
    ladder = SideNetwork(SideNetworkConfig(8, 3, 5, "pooled"))
    assert torch.equal(torch.sigmoid(ladder.gate_logits / 0.1), torch.full((3,), 0.5))


def test_a_layer_that_stands_for_two_blocks_is_repeated() -> None:
    taps = {1: np.zeros((3, 4), np.float32), 2: np.ones((3, 4), np.float32)}
    stacked = block_inputs(taps, (1, 2, 2))
    assert stacked.shape == (3, 3, 4)
    assert np.array_equal(stacked[:, 1], stacked[:, 2])
    with pytest.raises(ValueError, match=r"\[3\]"):
        block_inputs(taps, (1, 3))


def test_token_rows_are_padded_with_a_mask() -> None:
    rows = np.arange(5 * 2, dtype=np.float32).reshape(5, 2)
    padded, mask = pad_tokens(rows, [2, 3])
    assert mask.tolist() == [[True, True, False], [True, True, True]]
    assert np.array_equal(padded[mask], rows)
    assert not padded[~mask].any()
    with pytest.raises(ValueError, match="5 token rows"):
        pad_tokens(rows, [2, 2])


def test_predictions_are_the_same_in_any_company() -> None:
    """A device predicts one by one, the coordinator in batches."""
    ladder = seeded_ladder(SideNetworkConfig(8, 2, 3, "pooled", dropout=0.5)).train()
    alignment = Alignment(6, 8, 2)
    x = np.random.default_rng(0).normal(size=(7, 2, 6)).astype(np.float32)
    together = predict_logits(alignment, ladder, x)
    one_by_one = np.concatenate([predict_logits(alignment, ladder, x[n : n + 1]) for n in range(7)])
    assert np.allclose(together, one_by_one, atol=1e-6)
    assert ladder.training


def test_inputs_of_the_wrong_shape_are_named() -> None:
    ladder = SideNetwork(SideNetworkConfig(8, 3, 5, "pooled"))
    with pytest.raises(ValueError, match="3 blocks of width 8"):
        ladder(torch.zeros(2, 2, 8))
    with pytest.raises(ValueError, match="heads"):
        SideNetworkConfig(10, 2, 2, "sequence", heads=4)
