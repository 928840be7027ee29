"""Summaries before token rows: split and aligned as by hand, with padding that changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from side_tuning.network.alignment import Alignment
from side_tuning.network.anchor_map import AnchorMap
from side_tuning.network.side_network import SideNetwork, SideNetworkConfig, predict_logits
from side_tuning.wire.messages import folded_rows
from side_tuning.wire.summaries import join_summaries, split_summaries

BLOCKS, RANK, WIDTH, SIDE = 2, 4, 10, 8  # so a summary takes three rows, and two values of the third are empty
K = 3


def taps(samples: int = 3, tokens: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Summaries (N, B, WIDTH), token rows (N, B, T, RANK), and both as they are sent (N, B, K + T, RANK)."""
    generator = torch.Generator().manual_seed(0)
    summaries = torch.randn(samples, BLOCKS, WIDTH, generator=generator)
    rows = torch.randn(samples, BLOCKS, tokens, RANK, generator=generator)
    folded = torch.cat([summaries, torch.zeros(samples, BLOCKS, K * RANK - WIDTH)], dim=2).view(samples, BLOCKS, K, RANK)
    return summaries, rows, torch.cat([folded, rows], dim=2)


def anchor_map() -> AnchorMap:
    def filled(width: int, width_out: int) -> AnchorMap:
        one = AnchorMap(width, width_out, BLOCKS)
        one.matrix.copy_(torch.randn(one.matrix.shape, generator=torch.Generator().manual_seed(width)))
        return one

    return filled(RANK, 3).with_summary(filled(WIDTH, 5))  # two rows of three, and a value of the second is empty


def test_rows_that_a_summary_takes() -> None:
    assert [folded_rows(width, RANK) for width in (0, 1, 4, 5, 10)] == [0, 1, 1, 2, 3]


def test_joined_summaries_come_apart_again() -> None:
    summaries, rows, sent = taps(samples=3, tokens=5)
    together = sent.permute(0, 2, 1, 3).reshape(-1, BLOCKS, RANK).numpy()  # of several taps at once
    found = split_summaries(together, [5, 5, 5], WIDTH)
    assert np.array_equal(found[0], summaries)
    assert np.array_equal(found[1], rows.permute(0, 2, 1, 3).reshape(-1, BLOCKS, RANK))
    one_tap = join_summaries(summaries[:, 0].numpy(), rows[:, 0].reshape(-1, RANK).numpy(), [5, 5, 5])
    assert np.array_equal(one_tap, sent[:, 0].reshape(-1, RANK))
    uneven = join_summaries(summaries[:, 0].numpy(), one_tap[:6], [1, 3, 2])
    assert np.array_equal(split_summaries(uneven, [1, 3, 2], WIDTH)[1], one_tap[:6])
    with pytest.raises(ValueError, match="14 rows, but 3 samples of 6 tokens and 3 rows of a summary each"):
        split_summaries(uneven[:-1], [1, 3, 2], WIDTH)


def test_an_alignment_with_a_summary_is_two_alignments() -> None:
    summaries, rows, sent = taps()
    mask = torch.tensor([[True] * K + [True] * 5, [True] * K + [True] * 2 + [False] * 3, [True] * K + [True] + [False] * 4])
    both = Alignment(RANK, SIDE, BLOCKS, WIDTH, SIDE)
    both.observe(sent, mask)
    of_tokens, of_summaries = Alignment(RANK, SIDE, BLOCKS), Alignment(WIDTH, SIDE, BLOCKS)
    own = both.state_dict()
    of_tokens.load_state_dict({name: own[name] for name in of_tokens.state_dict()} | {"mean": of_tokens.mean, "variance": of_tokens.variance, "rows": of_tokens.rows})
    of_tokens.observe(rows, mask[:, K:])
    of_summaries.observe(summaries)
    of_summaries.project.data.copy_(own["summary.project"])
    with torch.no_grad():
        found = both(sent)
        expected = torch.cat([of_summaries(summaries).unsqueeze(2), of_tokens(rows)], dim=2)
    assert torch.allclose(found, expected, atol=1e-6)
    assert both.ladder_mask(mask).tolist() == [[True, *line] for line in mask[:, K:].tolist()]
    assert of_tokens.ladder_mask(mask) is mask


def test_an_anchor_map_with_a_summary_is_two_maps() -> None:
    summaries, rows, sent = taps()
    both = anchor_map()
    plain, of_summaries = AnchorMap(RANK, 3, BLOCKS), AnchorMap(WIDTH, 5, BLOCKS)
    plain.matrix.copy_(both.matrix)
    of_summaries.matrix.copy_(both.summary.matrix)
    found = both(sent)
    assert torch.equal(found[:, :, :2].flatten(2)[..., :5], of_summaries(summaries))
    assert not found[:, :, 1, 2].any()
    assert torch.equal(found[:, :, 2:], plain(rows))
    mask = torch.arange(K + 5).expand(3, K + 5) < K + 2
    assert both.ladder_mask(mask).tolist() == [[True, True, True, True, False, False, False]] * 3


@pytest.mark.parametrize("way", ["aligned", "anchored", "aligned among anchored"])
def test_padding_and_batch_mates_change_nothing(way: str) -> None:
    anchored = way != "aligned"
    config = SideNetworkConfig(SIDE, BLOCKS, 3, "sequence", heads=2, summary=True, entry_width=3 if anchored else 0, entry_summary_width=5 if anchored else 0)
    alignment = anchor_map() if way == "anchored" else Alignment(RANK, config.width_in, BLOCKS, WIDTH, config.summary_width)
    torch.manual_seed(0)
    ladder = SideNetwork(config)
    _, _, sent = taps()
    if ladder.entry is not None:
        ladder.entry.observe(alignment(sent), torch.ones(3, 7, dtype=torch.bool))
    padded = torch.cat([sent, torch.full((3, BLOCKS, 4, RANK), 50.0)], dim=2).numpy()
    mask = np.arange(K + 9)[None, :].repeat(3, axis=0) < K + 5
    together = predict_logits(alignment, ladder, padded, mask)
    alone = np.concatenate([predict_logits(alignment, ladder, sent[n : n + 1].numpy()) for n in range(3)])
    assert np.allclose(together, alone, atol=1e-5)


def test_tokens_and_summary_both_count() -> None:
    torch.manual_seed(0)
    alignment, ladder = Alignment(RANK, SIDE, BLOCKS, WIDTH, SIDE), SideNetwork(SideNetworkConfig(SIDE, BLOCKS, 3, "sequence", heads=2, summary=True))
    _, _, sent = taps()
    as_sent = predict_logits(alignment, ladder, sent.numpy())
    for row in (0, K - 1, K, K + 4):
        changed = sent.clone()
        changed[:, :, row, 0] += 5
        assert not np.allclose(predict_logits(alignment, ladder, changed.numpy()), as_sent)


def test_what_has_no_summary_is_refused() -> None:
    with pytest.raises(ValueError, match="do not begin with the 3 rows of a summary"):
        Alignment(RANK, SIDE, BLOCKS, WIDTH, SIDE)(torch.zeros(1, BLOCKS, 2, RANK))
    with pytest.raises(ValueError, match="do not begin with the 3 rows of a summary"):
        Alignment(RANK, SIDE, BLOCKS, WIDTH, SIDE)(torch.zeros(1, BLOCKS, RANK))
    with pytest.raises(ValueError, match="a summary in pooled mode"):
        SideNetworkConfig(SIDE, BLOCKS, 3, "pooled", summary=True)
