"""From a plan and texts to the rows that are sent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edge_agent.backbone import Backbone
from edge_agent.taps import PlanError, check_plan, compute_taps, to_wire_taps
from side_tuning.wire.codecs import decode_vectors
from side_tuning.wire.messages import TapPlan
from tests.backbones.conftest import Prepared
from tests.backbones.models import SENTENCES

PLAN = TapPlan(version=3, labels=("yes", "no"), blocks=2, max_tokens=32)


@pytest.fixture
def backbone(prepared: Prepared) -> Backbone:
    return Backbone.load(prepared("bert", "int8"))


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_pooled_taps_are_one_row_per_sample(pooling: Any, backbone: Backbone) -> None:
    taps = compute_taps(backbone, SENTENCES, replace(PLAN, pooling=pooling))
    assert list(taps.values) == [2, 4]
    assert taps.maps == {2: None, 4: None}
    for row, text in enumerate(SENTENCES):
        states = backbone.hidden_states([text], [4], 32).states[4][0].numpy()
        assert taps.tokens[row] == len(states)
        expected = {"mean": states.mean(0), "first": states[0], "last": states[-1]}[pooling]
        assert np.allclose(taps.values[4][row], expected, atol=1e-4)


def test_sequence_taps_are_the_real_tokens_through_the_map(backbone: Backbone) -> None:
    plan = replace(PLAN, mode="sequence", rank=16)
    taps = compute_taps(backbone, SENTENCES, plan)
    assert taps.values[2].shape == (sum(taps.tokens), 16)
    assert taps.maps == {2: backbone.manifest.maps[2], 4: backbone.manifest.maps[4]}
    start = sum(taps.tokens[:2])
    states = backbone.hidden_states([SENTENCES[2]], [4], 32).states[4][0].numpy()
    expected = states @ backbone.map_matrix(4, 16)
    assert np.allclose(taps.values[4][start : start + len(states)], expected, atol=1e-4)


@pytest.mark.parametrize("mode", ["pooled", "sequence"])
def test_wire_taps_decode_to_the_same_rows(mode: Any, backbone: Backbone) -> None:
    plan = replace(PLAN, mode=mode, codec="int8")
    taps = compute_taps(backbone, SENTENCES, plan)
    for tap in to_wire_taps(taps, plan):
        values = taps.values[tap.layer]
        found = decode_vectors(tap.data, tap.rows, tap.width, tap.codec, tap.group)
        assert np.linalg.norm(found - values) < 0.02 * np.linalg.norm(values)
        assert (tap.rows, tap.width) == values.shape
        assert tap.map == taps.maps[tap.layer]


def test_more_blocks_than_layers_send_each_layer_once(backbone: Backbone) -> None:
    assert list(compute_taps(backbone, SENTENCES, replace(PLAN, blocks=8)).values) == [1, 2, 3, 4]


def test_plans_that_cannot_run_are_refused(backbone: Backbone) -> None:
    with pytest.raises(PlanError, match=r"rank 65.*64 columns: lower the plan's rank"):
        check_plan(replace(PLAN, mode="sequence", rank=65), replace(backbone.manifest, width=96, map_rank=64))
    check_plan(replace(PLAN, mode="sequence", rank=65), replace(backbone.manifest, width=48, map_rank=48))  # the whole width
    check_plan(replace(PLAN, mode="pooled", rank=65), backbone.manifest)  # no map in this mode
    with pytest.raises(PlanError, match="keeps 500 tokens"):
        compute_taps(backbone, SENTENCES, replace(PLAN, max_tokens=500))
