"""What devices of this project send, made by the agent's own code in this process: frames, and what each took to make.

The rows come in the order in which the device's file would give them. Rows to be measured on are made apart: they are
for the benchmark's accuracy and cost the device nothing here, as evaluating costs the peers nothing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.demonstration.data import Row, Share
from edge_agent.backbone import Backbone
from edge_agent.forward import tap_samples
from edge_agent.open_frame import OpenFrame
from edge_agent.samples import Sample
from side_tuning.wire.frame import Split
from side_tuning.wire.messages import TapPlan

BATCH_SAMPLES = 16  # the agent's default (edge_agent.settings)
CAPTURED_AT = 1_700_000_000.0
SPOOL = "5b001"


@dataclass(frozen=True)
class MadeFrame:
    payloads: tuple[bytes, ...]  # more than one where a frame travels in parts
    samples: int
    seconds: float  # of computing at slowness 1, encoding included

    @property
    def payload_bytes(self) -> int:
        return sum(map(len, self.payloads))


@dataclass(frozen=True)
class TappedDevice:
    """One device's frames, in order."""

    name: str
    train: tuple[MadeFrame, ...]
    held_out: tuple[MadeFrame, ...]


def tap_fleet(backbone: Backbone, plan: TapPlan, shares: Sequence[Share]) -> list[TappedDevice]:
    devices = []
    for number, share in enumerate(shares):
        name = f"device-{number + 1:02d}"
        train = make_frames(backbone, plan, name, share.train, "train", first=1)
        held_out = make_frames(backbone, plan, name, share.test, "held-out", first=1 + sum(len(frame.payloads) for frame in train))
        devices.append(TappedDevice(name, train, held_out))
    return devices


def make_frames(backbone: Backbone, plan: TapPlan, device: str, rows: Sequence[Row], split: Split, *, first: int) -> tuple[MadeFrame, ...]:
    """Run rows forward as the agent does and fill frames with them; `first` is the first frame's sequence number."""
    frames: list[MadeFrame] = []
    sequence = first
    produced = 0
    seconds = 0.0
    frame = OpenFrame(plan, CAPTURED_AT, 0.0)

    def close() -> None:
        nonlocal frame, sequence, produced, seconds
        produced += len(frame.samples)
        began = time.perf_counter()
        payloads = tuple(frame.payloads((device, SPOOL, sequence), produced, backbone.manifest.fingerprint, plan.frame_bytes))
        frames.append(MadeFrame(payloads, len(frame.samples), seconds + time.perf_counter() - began))
        sequence += len(payloads)
        seconds = 0.0
        frame = OpenFrame(plan, CAPTURED_AT, 0.0)

    samples = [_sample(device, split, number, row) for number, row in enumerate(rows)]
    for start in range(0, len(samples), BATCH_SAMPLES):
        began = time.perf_counter()
        tapped = tap_samples(backbone, samples[start : start + BATCH_SAMPLES], plan, _refuse)
        seconds += time.perf_counter() - began
        for one in tapped:
            if not frame.has_room_for(one, plan.frame_bytes):
                close()
            frame.add(one)
    if frame.samples:
        close()
    return tuple(frames)


def _sample(device: str, split: Split, number: int, row: Row) -> Sample:
    return Sample(hashlib.sha256(f"{device}/{split}/{number}".encode()).hexdigest()[:32], row.text, row.label, split)


def _refuse(sample: str, reason: str, words: str) -> None:
    raise ValueError(f"sample {sample}: {reason}: {words}")
