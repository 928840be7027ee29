"""The whole demonstration, as a person runs it: real broker, gateway, trainer and agents."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from coordinator.demonstration import corpus
from tests.backbones.models import stories_folder
from tests.brokers import needs_mosquitto
from tests.waiting import wait_until

FLEET_FIGURES = {
    "metric", "score", "worst_device_score", "samples_stored", "frames_stored", "frames_rejected", "duplicates", "bytes_per_sample",
    "checkpoints_published", "ledger_balanced", "seconds",
}  # fmt: skip
DEVICE_FIGURES = {
    "device", "backbone", "layers", "weights", "samples_produced", "samples_stored", "bytes_sent", "score", "on_device_score",
    "peak_rss_mb",
}  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.broker, pytest.mark.timeout(600)]


@pytest.fixture
def small_data(tmp_path: Path) -> Path:
    """Some of the shipped rows, as a user's own folder."""
    folder = tmp_path / "my-data"
    folder.mkdir()
    for source, name, rows in ((corpus.TRAIN_FILE, "train", 1200), (corpus.TEST_FILE, "test", 200)):
        with gzip.open(source, "rt", encoding="utf-8") as file:
            lines = [next(file) for _ in range(rows)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def demo(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "coordinator.cli", "demo", "--state", str(tmp_path / "state"), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "COLUMNS": "120"},
        # As from a terminal: a shell's background jobs, and all that they start, have it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - this test has no threads
    )  # fmt: skip


@pytest.mark.parametrize("broker", ["embedded", pytest.param("mosquitto", marks=needs_mosquitto)])
def test_a_fleet_learns_and_every_device_measures_what_the_coordinator_measured(tmp_path, small_data, broker):
    out = tmp_path / "out.json"
    compare = [] if broker == "embedded" else ["--no-compare"]
    process = demo(tmp_path, "--data", str(small_data), "--devices", "3", "--seconds", "60", "--broker", broker, "--json", str(out), *compare)
    said, complaints = process.communicate(timeout=500)
    assert process.returncode == 0, said + complaints
    report = json.loads(out.read_text())
    fleet, devices = report["fleet"], report["devices"]

    assert set(fleet) >= FLEET_FIGURES
    assert fleet["ledger_balanced"] is True
    assert (fleet["samples_stored"], fleet["frames_rejected"]) == (1280, 0)  # of 1,400 rows 120 are set aside as anchors
    assert 300 < fleet["bytes_per_sample"] < 700
    assert fleet["checkpoints_published"] >= 1
    assert fleet["score"] > 0.4  # a guess is right 5 % of the time
    assert fleet["worst_device_score"] == min(device["score"] for device in devices)
    if broker == "embedded":
        assert fleet["gateway_frames_per_second"] > 10
        assert abs(fleet["score"] - fleet["centralised_score"]) < 0.1
        assert fleet["per_device_score"] > 0.3

    assert [(device["layers"], device["weights"]) for device in devices] == [(6, "int8"), (4, "int8"), (3, "int4")]
    for device in devices:
        assert set(device) >= DEVICE_FIGURES
        assert device["samples_produced"] == device["samples_stored"] > 0
        assert abs(device["on_device_score"] - device["score"]) <= 0.005
        assert device["bytes_sent"] > 100_000
        assert 50 < device["peak_rss_mb"] < 1500
    assert "loses its power" in said
    assert "comes back" in said


def test_ctrl_c_ends_every_process_and_still_prints_the_table(tmp_path, small_data):
    process = demo(tmp_path, "--data", str(small_data), "--devices", "2", "--seconds", "300")
    children: list[psutil.Process] = []

    def samples_arrive() -> bool:
        line = process.stdout.readline()
        assert line or process.poll() is None, process.stderr.read()
        return "devices run their samples forward" in line

    wait_until(samples_arrive, 200, "the fleet runs")
    children += psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 5
    process.send_signal(signal.SIGINT)
    said, complaints = process.communicate(timeout=90)
    assert process.returncode == 130, complaints
    assert "ending every process" in said
    assert "loss ledger" in said
    assert "Traceback" not in complaints
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def test_unusable_data_is_told_in_a_line(tmp_path):
    process = demo(tmp_path, "--data", str(tmp_path / "nowhere"))
    _, complaints = process.communicate(timeout=100)
    assert process.returncode == 1
    assert complaints.startswith("demo: ")
    assert "is not a folder" in complaints
    assert "Traceback" not in complaints


def test_a_language_model_is_tuned_measured_and_writes(tmp_path):
    folder = tmp_path / "plays"
    folder.mkdir()
    lines = [f"My lord, the {colour} {thing} is come {n} times." for n in range(5) for colour in ("red", "green", "old") for thing in ("king", "fool", "ship", "ghost")]
    for split, rows in (("train", lines * 4), ("test", lines[::6])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text, "user": f"role {n % 3}"}) + "\n" for n, text in enumerate(rows)))
    stories_folder()  # or skipped
    out = tmp_path / "out.json"
    process = demo(tmp_path, "--task", "causal-lm", "--data", str(folder), "--devices", "1", "--seconds", "60", "--json", str(out), "--no-compare")
    said, complaints = process.communicate(timeout=500)
    assert process.returncode == 0, said + complaints
    report = json.loads(out.read_text())
    (device,) = report["devices"]
    assert report["fleet"]["metric"] == "bits per byte"
    assert report["fleet"]["ledger_balanced"] is True
    assert device["score"] < device["untuned_score"]
    assert device["on_device_score"] == pytest.approx(device["score"], abs=0.02)
    assert report["written"]
    assert all(text.startswith("My lord,") for text in report["written"].values())
