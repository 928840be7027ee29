"""Running statistics must be those of the rows seen, and the projection must match a slow reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from side_tuning.network.alignment import Alignment, AlignmentConfig


def test_statistics_cumulate_over_uneven_batches() -> None:
    """Equal to mean and variance over every row, and one imaginary start row with mean 0 and variance 1."""
    rows = np.random.default_rng(0).normal(3.0, 2.0, size=(500, 2, 5)).astype(np.float32)
    alignment = Alignment(5, 4, 2)
    for part in np.split(rows, [1, 2, 60, 300]):
        alignment.observe(torch.from_numpy(part))
    mean = rows.sum(0, dtype=np.float64) / 501
    variance = (((rows - mean) ** 2).sum(0, dtype=np.float64) + 1 + mean**2) / 501
    assert int(alignment.rows) == 501
    assert np.allclose(alignment.mean.numpy(), mean, atol=1e-4)
    assert np.allclose(alignment.variance.numpy(), variance, rtol=1e-4)


def test_statistics_never_count_padding() -> None:
    x = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, True, False, False], [True, False, False, False], [True] * 4])
    x.permute(0, 2, 1, 3)[~mask] = 1e6
    x = torch.where(mask[:, None, :, None], x, 1e6)
    padded, plain = Alignment(5, 4, 2), Alignment(5, 4, 2)
    padded.observe(x, mask)
    plain.observe(x.permute(0, 2, 1, 3)[mask])
    assert torch.allclose(padded.mean, plain.mean, atol=1e-6)
    assert torch.allclose(padded.variance, plain.variance, atol=1e-6)


def test_statistics_follow_slowly_once_many_rows_are_seen() -> None:
    alignment = Alignment(3, 4, 1)
    alignment.rows.fill_(10_000_000)
    alignment.observe(torch.full((1000, 1, 3), 5.0))
    assert torch.allclose(alignment.mean, torch.full((1, 3), 0.05), atol=1e-4)  # 1000 rows x 1e-5


def test_forward_equals_the_formula_row_by_row() -> None:
    generator = torch.Generator().manual_seed(4)
    alignment = Alignment(5, 4, 3)
    with torch.no_grad():
        alignment.layer_logits.normal_(generator=generator)
        alignment.bias.normal_(generator=generator)
    x = torch.randn(6, 3, 5, generator=generator) * 3 + 1
    alignment.observe(x)
    spread = torch.sqrt(alignment.variance + 1e-5 * alignment.variance.mean(1, keepdim=True) + 1e-12)
    for n in range(6):
        projected = [((x[n, b] - alignment.mean[b]) / spread[b]) @ alignment.project[b] + alignment.bias[b] for b in range(3)]
        for b in range(3):
            weights = torch.exp(alignment.layer_logits[b]) / torch.exp(alignment.layer_logits[b]).sum()
            expected = sum(weights[c] * projected[c] for c in range(3))
            assert torch.allclose(alignment(x)[n, b], expected, atol=1e-5)


def test_sequence_rows_align_as_single_rows_do() -> None:
    alignment = Alignment(5, 4, 2)
    x = torch.randn(3, 2, 7, 5, generator=torch.Generator().manual_seed(1))
    one_token_at_a_time = torch.stack([alignment(x[:, :, t]) for t in range(7)], dim=2)
    assert torch.allclose(alignment(x), one_token_at_a_time, atol=1e-6)


@pytest.mark.parametrize("blocks", [1, 2, 3, 12])
def test_soft_layer_map_starts_at_the_identity(blocks: int) -> None:
    layer_map = Alignment(5, 4, blocks).layer_map()
    assert torch.allclose(layer_map.sum(1), torch.ones(blocks))
    assert (layer_map.diagonal() > 0.98).all()


def test_scale_of_the_backbone_does_not_matter() -> None:
    x = torch.randn(400, 2, 5, generator=torch.Generator().manual_seed(2))
    small, large = Alignment(5, 4, 2), Alignment(5, 4, 2)
    small.rows.fill_(0)
    large.rows.fill_(0)
    small.observe(0.01 * x)
    large.observe(1000 * x)
    assert torch.allclose(small(0.01 * x), large(1000 * x), atol=1e-3)


def test_a_first_single_row_is_no_division_by_zero() -> None:
    alignment = Alignment(5, 4, 2)
    row = torch.full((1, 2, 5), 1e4)
    alignment.observe(row)
    assert torch.isfinite(alignment(row)).all()


def test_large_widths_go_through_a_bottleneck() -> None:
    assert AlignmentConfig(1024, 128, 3).bottleneck is None
    assert AlignmentConfig(4096, 128, 3).bottleneck == 64
    alignment = Alignment(2048, 64, 2)
    assert alignment.narrow is not None
    assert alignment(torch.randn(3, 2, 2048)).shape == (3, 2, 64)
    assert alignment(torch.randn(3, 2, 9, 2048)).shape == (3, 2, 9, 64)


def test_wrong_width_is_named() -> None:
    with pytest.raises(ValueError, match="2 blocks of width 5"):
        Alignment(5, 4, 2)(torch.zeros(1, 2, 6))
