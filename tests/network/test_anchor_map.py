"""An anchor map is a clipped, standardised linear map; its file is refused where it could not be that."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save

from side_tuning.network.anchor_map import AnchorMap
from side_tuning.network.files import (
    NetworkFileError,
    load_alignment,
    load_ladder,
    save_alignment,
    save_ladder,
)
from side_tuning.network.side_network import SideNetwork, SideNetworkConfig

CONFIG = {"kind": "anchor-map", "width_in": 6, "width_out": 4, "blocks": 2}


def some_map() -> AnchorMap:
    anchor_map = AnchorMap(6, 4, 2)
    generator = torch.Generator().manual_seed(0)
    anchor_map.mean.copy_(torch.randn(2, 6, generator=generator))
    anchor_map.spread.copy_(torch.rand(2, 6, generator=generator) + 0.1)
    anchor_map.matrix.copy_(torch.randn(12, 8, generator=generator))
    return anchor_map


def by_hand(anchor_map: AnchorMap, taps: torch.Tensor) -> torch.Tensor:
    """(B, d) of one sample or token to (B, r), number by number."""
    shared = torch.zeros(2, 4)
    for c in range(2):
        for r in range(4):
            for b in range(2):
                for d in range(6):
                    x = (taps[b, d] - anchor_map.mean[b, d]) / anchor_map.spread[b, d]
                    shared[c, r] += min(max(float(x), -10.0), 10.0) * float(anchor_map.matrix[b * 6 + d, c * 4 + r])
    return shared


def test_pooled_and_sequence_taps_map_as_by_hand() -> None:
    anchor_map = some_map()
    x = torch.randn(3, 2, 5, 6, generator=torch.Generator().manual_seed(1))
    x[0, 0, 0, 0] = 1e6  # clipped
    expected = torch.stack([torch.stack([by_hand(anchor_map, x[n, :, t]) for t in range(5)], 1) for n in range(3)])
    assert torch.allclose(anchor_map(x), expected, atol=1e-4)
    for t in range(5):
        assert torch.allclose(anchor_map(x[:, :, t]), expected[:, :, t], atol=1e-4)


def test_other_shapes_are_refused() -> None:
    for shape in ((3, 2, 7), (3, 3, 6)):
        with pytest.raises(ValueError, match="do not fit 2 blocks of width 6"):
            some_map()(torch.zeros(shape))


def test_padding_changes_nothing() -> None:
    ladder = SideNetwork(SideNetworkConfig(8, 2, 3, "sequence", heads=2, entry_width=4)).eval()
    x = torch.randn(2, 2, 3, 6)
    padded = torch.cat([x, torch.full((2, 2, 4, 6), 50.0)], dim=2)
    mask = torch.arange(7).expand(2, 7) < 3
    with torch.no_grad():
        assert torch.allclose(ladder(some_map()(x)), ladder(some_map()(padded), mask), atol=1e-5)


def test_map_and_ladder_with_an_entry_come_back_bit_for_bit() -> None:
    anchor_map = some_map()
    loaded = load_alignment(save_alignment(anchor_map))
    assert isinstance(loaded, AnchorMap)
    assert loaded.config == anchor_map.config
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in anchor_map.state_dict().items())
    ladder = SideNetwork(SideNetworkConfig(8, 2, 3, "pooled", entry_width=4)).eval()
    again = load_ladder(save_ladder(ladder))
    assert again.config.width_in == 4
    with torch.no_grad():
        shared = anchor_map(torch.randn(5, 2, 6))
        assert torch.equal(ladder(shared), again(shared))
        with pytest.raises(ValueError, match="2 blocks of width 4"):
            ladder(torch.zeros(5, 2, 8))


@pytest.mark.parametrize(
    ("changes", "config", "why"),
    [
        ({"matrix": torch.zeros(12, 8)}, {}, "matrix"),
        ({"mean": torch.zeros(2, 6, dtype=torch.float16)}, {}, "mean"),
        ({"matrix": torch.zeros(8, 12, dtype=torch.float16)}, {}, "matrix"),
        ({"matrix": torch.full((12, 8), float("nan"), dtype=torch.float16)}, {}, "not finite"),
        ({"mean": torch.full((2, 6), float("inf"))}, {}, "not finite"),
        ({"spread": torch.zeros(2, 6)}, {}, "not above zero"),
        ({"spread": -torch.ones(2, 6)}, {}, "not above zero"),
        ({"stray": torch.zeros(1)}, {}, "stray"),
        ({}, {"width_out": 5}, "matrix"),
        ({}, {"width_out": 0}, "width_out"),
        ({}, {"width_in": 1 << 40}, "width_in"),
        ({}, {"blocks": "2"}, "blocks"),
        ({}, {"kind": "alignment", "side_width": 8}, "missing or not wanted"),
        ({}, {"kind": "ladder"}, "kind"),
    ],
)
def test_files_that_do_not_fit_are_refused(changes: dict[str, torch.Tensor], config: dict[str, object], why: str) -> None:
    data = save({**some_map().state_dict(), **changes}, {"config": json.dumps({**CONFIG, **config})})
    with pytest.raises(NetworkFileError, match=why):
        load_alignment(data)
