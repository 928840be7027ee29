"""Bounded msgpack: caps, and one kind of error for every failure."""

from __future__ import annotations

import contextlib
import tracemalloc

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from side_tuning.wire.bounded import FrameError, unpack_bounded


@pytest.mark.parametrize("value", [None, True, -1, 2**64 - 1, 1.5, "text", b"bytes", [1, [2]], {"a": {"b": b""}}])
def test_plain_objects_come_back(value: object) -> None:
    assert unpack_bounded(msgpack.packb(value), max_bytes=100) == value


def test_size_is_checked_first() -> None:
    with pytest.raises(FrameError, match="101 bytes of msgpack, more than the limit of 100"):
        unpack_bounded(b"\xc1" * 101, max_bytes=100)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "malformed"),
        (b"\xc1", "malformed"),
        (b"\xc0\xc0", "ExtraData"),
        (b"\x91" * 200_000 + b"\xc0", "StackError"),
        (b"\xdd\xff\xff\xff\xff", "max_array_len"),
        (b"\xdf\xff\xff\xff\xff", "max_map_len"),
        (msgpack.packb("x" * 70_000), "max_str_len"),
        (msgpack.packb([0] * 4097), "max_array_len"),
        (msgpack.packb({str(n): 0 for n in range(4097)}), "max_map_len"),
        (msgpack.packb({7: 0}), "malformed"),
        (msgpack.packb(msgpack.ExtType(9, b"")), "extension type 9"),
        (msgpack.packb(msgpack.ExtType(9, b"1234")), "max_ext_len"),
        (msgpack.packb(msgpack.Timestamp(5)), "max_ext_len"),
    ],
)
def test_what_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(FrameError, match=message):
        unpack_bounded(data, max_bytes=1_000_000)


def test_caps_can_be_set_lower() -> None:
    with pytest.raises(FrameError, match="max_array_len"):
        unpack_bounded(msgpack.packb([1, 2, 3]), max_bytes=100, max_items=2)
    with pytest.raises(FrameError, match="max_str_len"):
        unpack_bounded(msgpack.packb("abc"), max_bytes=100, max_text_bytes=2)


def test_a_refused_array_of_empty_arrays_takes_little_memory() -> None:
    """One megabyte of empty lists is 65 MB of objects if it is believed."""
    data = b"\xdd" + (1_000_000).to_bytes(4, "big") + b"\x90" * 1_000_000
    tracemalloc.start()
    try:
        with pytest.raises(FrameError):
            unpack_bounded(data, max_bytes=2_000_000)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


@settings(max_examples=500, deadline=None)
@given(data=st.binary(max_size=200))
def test_noise_raises_only_frame_errors(data: bytes) -> None:
    with contextlib.suppress(FrameError):
        unpack_bounded(data, max_bytes=150, max_items=10, max_text_bytes=20)
