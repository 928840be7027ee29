"""Parts of a frame that is too large for one message."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from side_tuning.wire.bounded import FrameError
from side_tuning.wire.frame import (
    Identity,
    Part,
    decode,
    decode_frame,
    encode_frame,
    join_parts,
    read_identity,
    split_frame,
)
from tests.wire.examples import GOLDEN, changed, large_frame, pooled_frame

PAYLOAD = encode_frame(large_frame())


def parts_of(payload: bytes, part_bytes: int) -> list[Part]:
    parts = [decode(one) for one in split_frame(payload, part_bytes)]
    assert all(isinstance(one, Part) for one in parts)
    return parts  # type: ignore[return-value]


def test_a_frame_that_fits_is_not_split() -> None:
    assert split_frame(PAYLOAD, len(PAYLOAD)) == [PAYLOAD]
    assert len(split_frame(PAYLOAD, len(PAYLOAD) - 1)) == 2


@settings(max_examples=40, deadline=None)
@given(part_bytes=st.integers(1024, len(PAYLOAD) - 1), seed=st.integers(0, 1000))
def test_parts_fit_and_join_in_any_order(part_bytes: int, seed: int) -> None:
    messages = split_frame(PAYLOAD, part_bytes)
    assert max(map(len, messages)) <= part_bytes
    parts = parts_of(PAYLOAD, part_bytes)
    assert [one.sequence for one in parts] == list(range(5, 5 + len(parts)))
    assert [one.index for one in parts] == list(range(len(parts)))
    assert {(one.first, one.count, one.samples, one.produced) for one in parts} == {(5, len(parts), 64, 64)}
    random.Random(seed).shuffle(parts)
    assert join_parts(parts) == PAYLOAD


@pytest.mark.parametrize("sequence", [1, 127, 2**31, 2**52])
def test_parts_fit_with_the_longest_names_and_numbers(sequence: int) -> None:
    frame = replace(large_frame(), device="d" * 64, spool="5" * 64, sequence=sequence, produced=2**53)
    payload = encode_frame(frame)
    for part_bytes in (1024, 1500, 4096, 30_000):
        messages = split_frame(payload, part_bytes)
        assert max(map(len, messages)) <= part_bytes
        assert len(messages) <= 1 + len(payload) // (part_bytes - 512)
        assert decode_frame(join_parts(parts_of(payload, part_bytes))) == frame


def test_the_identity_of_a_part() -> None:
    messages = split_frame(PAYLOAD, 4096)
    assert [read_identity(one) for one in messages] == [
        Identity("kitchen", "00112233445566ff", 5 + n) for n in range(len(messages))
    ]


def test_a_part_is_not_a_frame() -> None:
    with pytest.raises(FrameError, match="join the parts first"):
        decode_frame(split_frame(PAYLOAD, 4096)[0])


def test_parts_that_are_too_small_are_refused() -> None:
    with pytest.raises(FrameError, match="at least 1024"):
        split_frame(PAYLOAD, 1000)


def test_a_damaged_frame_is_not_split() -> None:
    with pytest.raises(FrameError, match="crc32"):
        split_frame(PAYLOAD[:-1] + bytes([PAYLOAD[-1] ^ 1]), 4096)


def test_only_complete_sets_join() -> None:
    parts = parts_of(PAYLOAD, 8192)
    assert len(parts) >= 4
    with pytest.raises(FrameError, match="no parts"):
        join_parts([])
    for missing in range(len(parts)):
        with pytest.raises(FrameError, match="each is needed exactly once"):
            join_parts(parts[:missing] + parts[missing + 1 :])
    with pytest.raises(FrameError, match="each is needed exactly once"):
        join_parts([*parts, parts[1]])


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "other"},
        {"spool": "1234567812345678"},
        {"first": 6},
        {"count": 9},
        {"samples": 63},
        {"produced": 65},
    ],
)
def test_parts_of_different_frames_do_not_join(changes: dict[str, Any]) -> None:
    parts = parts_of(PAYLOAD, 8192)
    with pytest.raises(FrameError, match="is of"):
        join_parts([*parts[:-1], replace(parts[-1], **changes)])
    changes.pop("count", None)
    if changes:  # the same lie in every part is found by the frame inside
        with pytest.raises(FrameError, match=r"contain|state"):
            join_parts([replace(one, **changes) for one in parts])


def test_parts_may_not_add_up_to_more_than_a_frame() -> None:
    """The sum is checked before the bytes are joined."""
    slab = bytes(9 * 1024 * 1024)
    parts = [Part("a", "b", 1 + n, 1, n, 2, 1, 1, slab) for n in range(2)]
    with pytest.raises(FrameError, match="more than a frame may have"):
        join_parts(parts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": 4}, "index is 4"),
        ({"index": -1}, "index is -1"),
        ({"count": 1}, "count is 1"),
        ({"count": 65_536}, "count"),
        ({"sequence": 10}, "cannot have sequence 10"),
        ({"first": 6}, "cannot have sequence 9"),
        ({"samples": 0}, "samples is 0"),
        ({"samples": ...}, "'samples' is missing"),
        ({"produced": -1}, "produced"),
        ({"device": "fleet"}, "device name"),
    ],
)
def test_a_lie_in_a_part_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FrameError, match=message):
        decode(changed((GOLDEN / "part-v1.bin").read_bytes(), **changes))


def test_a_frame_inside_other_parts_is_found() -> None:
    """Parts of a part: the inner payload is not a frame of these names."""
    parts = parts_of(PAYLOAD, 8192)
    other = encode_frame(pooled_frame())
    forged = [replace(one, data=other[n::2], count=2) for n, one in enumerate(parts[:2])]
    with pytest.raises(FrameError):
        join_parts(forged)
    halves = [replace(one, data=data, count=2) for one, data in zip(parts, (other[:100], other[100:]), strict=False)]
    with pytest.raises(FrameError, match="they contain"):
        join_parts(halves)
