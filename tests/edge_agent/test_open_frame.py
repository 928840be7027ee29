"""A frame closes at the plan's sample count, at the byte limit, or after lingering; a sample too large alone is parted."""

from __future__ import annotations

import numpy as np
import pytest

from edge_agent.open_frame import OpenFrame, TappedSample
from side_tuning.wire.codecs import decode_vectors
from side_tuning.wire.frame import Frame, Part, SampleInfo, decode, join_parts
from tests.edge_agent.artifacts import plan


def tapped(number: int, rows: int = 1, width: int = 384, layers=(1, 2)) -> TappedSample:
    generator = np.random.default_rng(number)
    info = SampleInfo(f"{number:08x}", number % 3, "train", rows)
    return TappedSample(info, {layer: generator.standard_normal((rows, width), dtype=np.float32) for layer in layers}, dict.fromkeys(layers), max(layers))


def build(frame: OpenFrame, frame_bytes: int) -> list[bytes]:
    return frame.payloads(("kitchen", "ab" * 8, 5), 10_000, "cd" * 16, frame_bytes)


def test_it_takes_as_many_samples_as_the_plan_says():
    frame = OpenFrame(plan(frame_samples=3), 0.0, 0.0)
    for n in range(3):
        assert frame.has_room_for(tapped(n), 10**6)
        frame.add(tapped(n))
    assert not frame.has_room_for(tapped(3), 10**6)


@pytest.mark.parametrize("codec", ["fp16", "int8", "int4", "int2"])
@pytest.mark.parametrize("frame_bytes", [4096, 20_000, 131_072])
def test_a_frame_filled_to_the_byte_limit_needs_no_parts(codec, frame_bytes):
    frame = OpenFrame(plan(codec=codec, frame_samples=4096), 0.0, 0.0)
    n = 0
    while frame.has_room_for(tapped(n), frame_bytes):
        frame.add(tapped(n))
        n += 1
    payloads = build(frame, frame_bytes)
    assert len(payloads) == 1
    assert len(payloads[0]) <= frame_bytes
    assert n == 1 or len(payloads[0]) > frame_bytes * 0.6, "and wastes little room"


def test_a_sample_too_large_alone_travels_in_parts():
    frame = OpenFrame(plan(mode="sequence", codec="int8"), 0.0, 0.0)
    assert frame.has_room_for(tapped(0, rows=500, width=64), 4096)
    frame.add(tapped(0, rows=500, width=64))
    payloads = build(frame, 4096)
    parts = [decode(payload) for payload in payloads]
    assert len(parts) >= 10
    assert all(isinstance(part, Part) for part in parts)
    assert [part.sequence for part in parts] == list(range(5, 5 + len(parts)))
    whole = decode(join_parts(parts))
    assert isinstance(whole, Frame)
    assert whole.samples[0].tokens == 500


def test_rows_stay_with_their_samples():
    frame = OpenFrame(plan(codec="fp16", group=0, mode="sequence"), 12.5, 0.0)
    samples = [tapped(n, rows=n + 1, width=8) for n in range(4)]
    for sample in samples:
        frame.add(sample)
    whole = decode(build(frame, 10**6)[0])
    assert whole.captured_at == 12.5
    assert (whole.produced, whole.sequence) == (10_000, 5)
    for tap in whole.taps:
        values = decode_vectors(tap.data, tap.rows, tap.width, tap.codec, tap.group)
        expected = np.concatenate([s.rows[tap.layer] for s in samples])
        assert np.allclose(values, expected, atol=1e-2)


def test_it_lingers_only_with_samples_in_it():
    frame = OpenFrame(plan(linger_seconds=2.0), 0.0, 10.0)
    assert not frame.is_due(100.0)
    frame.add(tapped(0))
    assert not frame.is_due(11.9)
    assert frame.is_due(12.0)


def test_a_full_frame_is_due_at_once():
    frame = OpenFrame(plan(linger_seconds=3600.0, frame_samples=2), 0.0, 10.0)
    frame.add(tapped(0))
    assert not frame.is_due(10.0)
    frame.add(tapped(1))
    assert frame.is_due(10.0)
