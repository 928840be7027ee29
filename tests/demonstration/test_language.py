"""The demonstration's language models: texts are dealt by who wrote them, and the last screen says what was gained and written."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from rich.console import Console

from coordinator.demonstration.data import DataError, Partition, deal, set_anchors_aside, write_share
from coordinator.demonstration.language import load_texts
from coordinator.demonstration.report import DeviceReport, FleetReport, Report, print_report


@pytest.fixture
def plays(tmp_path):
    folder = tmp_path / "plays"
    folder.mkdir()
    for split, lines in (("train", 30), ("test", 3)):
        rows = [{"text": f"{user} says line {n}", "user": user} for user in ("King", "Fool", "Queen", "Ghost") for n in range(lines)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_every_role_is_on_one_device_with_its_held_out_lines(plays):
    dataset, anchors = set_anchors_aside(load_texts(plays), seed=0)
    shares = deal(dataset, Partition("user"), 2, seed=0)
    for share in shares:
        assert {row.user for row in share.test} <= {row.user for row in share.train}
    owners = Counter(user for share in shares for user in {row.user for row in share.train})
    assert owners == Counter(["King", "Fool", "Queen", "Ghost"])
    assert len(anchors) == 12


def test_rows_without_labels_are_written_without(plays, tmp_path):
    (share,) = deal(load_texts(plays), Partition("iid"), 1, seed=0)
    samples, _ = write_share(share, tmp_path / "kitchen", np.random.default_rng(0))
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(rows) == 132
    assert all(set(row) == {"text", "split"} for row in rows)


def test_what_cannot_be_dealt_is_refused(plays):
    with pytest.raises(DataError, match="--data"):
        load_texts(None)
    with pytest.raises(DataError, match="no labels"):
        deal(load_texts(plays), Partition("dirichlet", 0.1), 2, seed=0)


def test_the_last_screen_shows_bits_per_byte_and_what_was_written():
    device = DeviceReport("kitchen", "f" * 32, 5, "int8", 100, 100, 5000, 2.413, 2.414, 300.0, 3.0, 2, untuned_score=3.861, label="llama 5 x 64 int8")
    fleet = FleetReport("bits per byte", 2.413, 2.413, 100, 10, 0, 0, 50.0, 2, True, 60.0, None, None, None, None, 300.0, 5.0)
    console = Console(width=120, record=True)
    print_report(Report(fleet, [device], {1: "My lord, the", 2: "My lord, [I] am come."}), console)
    said = console.export_text()
    assert "llama 5 x 64 int8" in said
    assert "3.86" in said
    assert "2.41" in said
    assert "bits per byte of the one shared side network" in said
    assert said.index("checkpoint 1 wrote: My lord, the") < said.index("checkpoint 2 wrote: My lord, [I] am come.")
    assert "accuracy" not in said
