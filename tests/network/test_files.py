"""A ladder or alignment file is used only if every tensor fits its configuration and is finite."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from side_tuning.network.alignment import Alignment
from side_tuning.network.anchor_map import AnchorMap
from side_tuning.network.files import (
    DEFLATED,
    NetworkFileError,
    load_alignment,
    load_ladder,
    save_alignment,
    save_ladder,
)
from side_tuning.network.side_network import SideNetwork, SideNetworkConfig
from side_tuning.wire.messages import CodecName

LADDER = {"kind": "ladder", "side_width": 8, "blocks": 2, "classes": 3, "mode": "pooled", "heads": 4, "expansion": 2, "dropout": 0.1}


def ladder_file(changes: dict[str, torch.Tensor | None] | None = None, **config: object) -> bytes:
    tensors = dict(SideNetwork(SideNetworkConfig(8, 2, 3, "pooled")).state_dict())
    for name, tensor in (changes or {}).items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    return save(tensors, {"config": json.dumps({**LADDER, **config})})


@pytest.mark.parametrize("mode", ["pooled", "sequence"])
def test_ladder_comes_back_bit_for_bit(tmp_path: Path, mode: str) -> None:
    ladder = SideNetwork(SideNetworkConfig(8, 2, 3, mode, heads=2, dropout=0.25))
    data = save_ladder(ladder, tmp_path / "ladder.safetensors")
    for source in (data, tmp_path / "ladder.safetensors"):
        loaded = load_ladder(source)
        assert loaded.config == ladder.config
        assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in ladder.state_dict().items())
        assert not loaded.training


@pytest.mark.parametrize(("width", "summary_width"), [(6, 0), (2048, 0), (6, 15)])
def test_alignment_comes_back_bit_for_bit(width: int, summary_width: int) -> None:
    alignment = Alignment(width, 8, 2, summary_width, 11 if summary_width else 0)
    alignment.observe(torch.randn(5, 2, 4, width), torch.ones(5, 4, dtype=torch.bool))
    loaded = load_alignment(save_alignment(alignment))
    assert loaded.config == alignment.config
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in alignment.state_dict().items())


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (ladder_file({"head.weight": torch.zeros(4, 8)}), "head.weight"),
        (ladder_file({"head.weight": torch.zeros(3, 8, dtype=torch.float16)}), "head.weight"),
        (ladder_file({"head.weight": torch.full((3, 8), float("nan"))}), "not finite"),
        (ladder_file({"norm.bias": torch.full((8,), float("inf"))}), "not finite"),
        (ladder_file({"head.bias": None}), "head.bias"),
        (ladder_file({"stray": torch.zeros(1)}), "stray"),
        (ladder_file(side_width=16), "gate|norm|head|blocks"),
        (ladder_file(side_width=1 << 40), "side_width"),
        (ladder_file(blocks=0), "blocks"),
        (ladder_file(classes="3"), "classes"),
        (ladder_file(mode="other"), "mode"),
        (ladder_file(dropout=2.0), "dropout"),
        (ladder_file(mode="sequence", heads=3), "heads"),
        (ladder_file(summary=True), "summary"),
        (ladder_file(summary=1), "summary is 1"),
        (ladder_file(kind="alignment"), "kind"),
        (save(dict(SideNetwork(SideNetworkConfig(8, 2, 3, "pooled")).state_dict())), "configuration"),
        (b"", "0 bytes"),
        (b"\xff" * 100, "100 bytes"),
        (b"[" * 5000, "no safetensors"),
        ((4000).to_bytes(8, "little") + b"[" * 4000, "configuration"),
    ],
)
def test_ladder_files_that_do_not_fit_are_refused(data: bytes, why: str) -> None:
    with pytest.raises(NetworkFileError, match=why):
        load_ladder(data)


@pytest.mark.parametrize(("precision", "share", "lost"), [("fp16", 0.55, 1e-3), ("int8", 0.32, 0.01), ("int4", 0.2, 0.12)])
def test_rounded_files_are_small_and_near(precision: CodecName, share: float, lost: float) -> None:
    ladder = SideNetwork(SideNetworkConfig(64, 2, 64, "pooled", entry_width=128))
    alignment = Alignment(384, 64, 2)
    alignment.observe(1e4 * torch.randn(5, 2, 384))
    anchor_map = AnchorMap(384, 64, 2)
    anchor_map.matrix.copy_(torch.randn(anchor_map.matrix.shape))
    assert len(save_ladder(ladder, precision=precision)) < share * len(save_ladder(ladder))
    assert len(save_alignment(alignment, precision=precision)) < share * len(save_alignment(alignment))
    pairs = [(ladder, load_ladder(save_ladder(ladder, precision=precision)))]
    pairs += [(one, load_alignment(save_alignment(one, precision=precision))) for one in (alignment, anchor_map)]
    for exact, loaded in pairs:
        assert loaded.config == exact.config
        for name, wanted in exact.state_dict().items():
            found = loaded.state_dict()[name]
            assert found.dtype == wanted.dtype
            if not wanted.is_floating_point():
                assert torch.equal(found, wanted), name
            elif wanted.dim() < 2 or name in {"mean", "variance", "spread", "layer_logits"}:
                assert ((found - wanted).abs() <= 2**-12 * wanted.abs()).all(), name
            else:
                assert (found.float() - wanted.float()).norm() <= lost * wanted.float().norm(), name


def inflated(data: bytes) -> bytes:
    assert data.startswith(DEFLATED)
    return zlib.decompress(data.removeprefix(DEFLATED))


def test_deflated_files_that_are_damaged_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = save_ladder(SideNetwork(SideNetworkConfig(64, 2, 64, "pooled")), precision="int4")
    assert len(data) < 0.95 * len(inflated(data))
    for length in range(0, len(data), 997):
        with pytest.raises(NetworkFileError):
            load_ladder(data[:length])
    for damaged, why in ((data + b"x", "behind its end"), (data[:2000] + bytes([data[2000] ^ 1]) + data[2001:], "damaged|cut off")):
        with pytest.raises(NetworkFileError, match=why):
            load_ladder(damaged)
    monkeypatch.setattr("side_tuning.network.files.MAX_BLOB_BYTES", len(data) + 1)  # enough for what came, not for what it holds
    with pytest.raises(NetworkFileError, match="holds more than"):
        load_ladder(data)


def test_rounded_files_that_do_not_fit_are_refused() -> None:
    alignment = Alignment(384, 8, 2)
    tensors = load(inflated(save_alignment(alignment, precision="int8")))
    config = {"kind": "alignment", "width_in": 384, "side_width": 8, "blocks": 2, "precision": "int8"}

    def file(project: torch.Tensor, **changes: object) -> bytes:
        return save({**tensors, "project": project}, {"config": json.dumps({**config, **changes})})

    load_alignment(file(tensors["project"]))
    with pytest.raises(NetworkFileError, match=r"int3.*update this program"):
        load_alignment(file(tensors["project"], precision="int3"))
    with pytest.raises(NetworkFileError, match="project"):
        load_alignment(file(tensors["project"], precision="int4"))
    with pytest.raises(NetworkFileError, match="project"):
        load_alignment(file(tensors["project"][:-1].clone()))
    with pytest.raises(NetworkFileError, match="project"):
        load_alignment(file(alignment.state_dict()["project"]))
    with pytest.raises(NetworkFileError, match=r"project.*NaN"):
        load_alignment(file(torch.full_like(tensors["project"], 0xFF)))


def test_truncated_files_are_refused_at_every_length() -> None:
    data = ladder_file()
    for length in range(0, len(data), 37):
        with pytest.raises(NetworkFileError):
            load_ladder(data[:length])


def test_alignment_with_a_negative_variance_is_refused() -> None:
    alignment = Alignment(6, 8, 2)
    alignment.variance.fill_(-1.0)
    with pytest.raises(NetworkFileError, match="variance"):
        load_alignment(save_alignment(alignment))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NetworkFileError, match="absent"):
        load_ladder(tmp_path / "absent.safetensors")
