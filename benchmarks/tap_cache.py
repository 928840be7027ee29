"""Full-precision taps of a data set, made once per run; and the same taps after the wire, with the bytes that they took there.

Everything is the product's own: the device's forward pass, its frames, the coordinator's decoding.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from coordinator.demonstration.data import Dataset, Row
from coordinator.training.reference import Activations
from edge_agent.backbone import Backbone
from edge_agent.open_frame import OpenFrame, TappedSample
from edge_agent.taps import compute_taps
from side_tuning.wire.codecs import decode_vectors
from side_tuning.wire.frame import SampleInfo, decode, decode_frame, join_parts
from side_tuning.wire.messages import Mode, TapPlan, folded_rows

BATCH = 32


@dataclass(frozen=True)
class Taps:
    """Rows of one data set and mode as `(rows, layers, width)`; a sample has one, or in `sequence` mode its summary's and its tokens'."""

    mode: Mode
    layers: tuple[int, ...]
    values: np.ndarray  # float32
    tokens: np.ndarray  # of each sample
    labels: np.ndarray
    test: np.ndarray  # bool: of the published test set
    summary_width: int = 0

    @property
    def summary_rows(self) -> int:
        return folded_rows(self.summary_width, self.values.shape[2])

    @property
    def counts(self) -> np.ndarray:
        return np.ones_like(self.tokens) if self.mode == "pooled" else self.tokens + self.summary_rows

    def save(self, path: Path) -> None:
        np.savez(path, **vars(self))

    @classmethod
    def load(cls, path: Path) -> Taps:
        with np.load(path) as file:
            mode: Mode = "sequence" if str(file["mode"]) == "sequence" else "pooled"
            layers = tuple(int(layer) for layer in file["layers"])
            return cls(mode, layers, file["values"], file["tokens"], file["labels"], file["test"], int(file["summary_width"]))

    def activations(self, picked: np.ndarray, layers: tuple[int, ...], device: str) -> Activations:
        """The picked samples, in order, as the trainer takes them."""
        places = [self.layers.index(layer) for layer in layers]
        ends = np.cumsum(self.counts)
        rows = np.concatenate([np.arange(ends[n] - self.counts[n], ends[n]) for n in picked])
        rows_each = self.counts[picked].tolist() if self.mode == "sequence" else None
        return Activations(device, "backbone", self.values[rows][:, places], self.labels[picked], rows_each, self.summary_width)


def draw_rows(dataset: Dataset, most_train: int, most_test: int) -> tuple[list[Row], np.ndarray]:
    """At most so many rows of each part, the same ones every time; and which of them are test rows."""
    random = np.random.default_rng(0)
    rows: list[Row] = []
    counts = []
    for part, most in ((dataset.train, most_train), (dataset.test, most_test)):
        chosen = np.sort(random.permutation(len(part))[:most])
        rows += [part[int(n)] for n in chosen]
        counts.append(len(chosen))
    return rows, np.arange(sum(counts)) >= counts[0]


def compute(backbone: Backbone, dataset: Dataset, rows: list[Row], test: np.ndarray, plan: TapPlan) -> Taps:
    """One forward pass over `rows` under `plan`, texts of like length together."""
    depth = backbone.manifest.layers
    order = sorted(range(len(rows)), key=lambda n: len("".join(rows[n].text)))
    found: list[np.ndarray] = [np.empty(0)] * len(rows)
    tokens = np.zeros(len(rows), np.int64)
    for start in range(0, len(order), BATCH):
        some = order[start : start + BATCH]
        matrices = compute_taps(backbone, [rows[n].text for n in some], plan)
        stacked = np.stack([matrices.values[layer] for layer in plan.taps(depth)], axis=1)
        for n, part, real in zip(some, np.split(stacked, np.cumsum(matrices.counts(plan.mode))[:-1]), matrices.tokens, strict=True):
            found[n], tokens[n] = part, real
    labels = np.array([dataset.labels.index(row.label) for row in rows], np.int64)
    summary_width = plan.summary_width(backbone.manifest.width)
    return Taps(plan.mode, plan.taps(depth), np.concatenate(found), tokens, labels, test, summary_width)


def through_the_wire(taps: Taps, plan: TapPlan, layers: tuple[int, ...]) -> tuple[Taps, float]:
    """What the coordinator decodes of `layers`, and the payload bytes per sample, headers included."""
    places = [taps.layers.index(layer) for layer in layers]
    maps: dict[int, str | None] = dict.fromkeys(layers, "0" * 32 if plan.mode == "sequence" else None)
    frame = OpenFrame(plan, 1e9, 0.0)
    payload_bytes = 0
    decoded: list[np.ndarray] = []

    def send() -> None:
        nonlocal payload_bytes, frame
        parts = frame.payloads(("device-00001", "1e57" * 8, 1), len(taps.labels), "f" * 32, plan.frame_bytes)
        payload_bytes += sum(map(len, parts))
        whole = parts[0] if len(parts) == 1 else join_parts([decode(part) for part in parts])  # type: ignore[misc]
        received = decode_frame(whole)
        decoded.append(
            np.stack([decode_vectors(tap.data, tap.rows, tap.width, tap.codec, tap.group) for tap in received.taps], axis=1)
        )
        frame = OpenFrame(plan, 1e9, 0.0)

    ends = np.cumsum(taps.counts)
    for n, (end, count) in enumerate(zip(ends, taps.counts, strict=True)):
        name = hashlib.sha256(f"sample {n}".encode()).hexdigest()[:32]
        rows = taps.values[end - count : end, places]
        sample = TappedSample(
            SampleInfo(name, int(taps.labels[n]), "train", int(taps.tokens[n])),
            {layer: np.ascontiguousarray(rows[:, place]) for place, layer in enumerate(layers)},
            maps,
            max(taps.layers),
            summary_rows=taps.summary_rows,
        )
        if not frame.has_room_for(sample, plan.frame_bytes):
            send()
        frame.add(sample)
    send()
    return replace(taps, layers=layers, values=np.concatenate(decoded)), payload_bytes / len(taps.labels)
