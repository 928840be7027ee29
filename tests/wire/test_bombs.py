"""Bombs: small payloads that would take much memory if believed. Each is refused, at less than twice the cap."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import lz4.frame
import msgpack
import pytest

from side_tuning.wire.bounded import FrameError
from side_tuning.wire.envelope import MAX_BODY_BYTES
from side_tuning.wire.frame import Frame, decode, encode_frame, read_identity
from tests.wire.examples import frame_that_inflates, pooled_frame, put_together, take_apart

MIB = 1024 * 1024
BOMB_BYTES = 256 * MIB


def bomb_that_admits_it() -> bytes:
    """242 : 1, with a header that states the true size and shapes that need it."""
    return frame_that_inflates(bytes(BOMB_BYTES), rows=2048, width=65_536)


def bomb_that_states_little() -> bytes:
    return frame_that_inflates(bytes(BOMB_BYTES))


def bomb_that_states_the_limit() -> bytes:
    """As much as is allowed, from a body that inflates to sixteen times that."""
    return frame_that_inflates(bytes(BOMB_BYTES), rows=128, width=65_536)


def double_wrapped_bomb() -> bytes:
    """About 5 kB: lz4 in lz4; the outer layer inflates to a megabyte, the inner one to 256."""
    return frame_that_inflates(lz4.frame.compress(bytes(BOMB_BYTES)), rows=128, width=65_536)


def empty_promise() -> bytes:
    """A few bytes that state the limit: nothing may be allocated for them."""
    return frame_that_inflates(b"tiny", rows=128, width=65_536)


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "admits": (bomb_that_admits_it, "the limit is 16777216"),
    "states little": (bomb_that_states_little, "inflates past the 16 bytes"),
    "states the limit": (bomb_that_states_the_limit, "inflates past the 16777216 bytes"),
    "double-wrapped": (double_wrapped_bomb, "cannot hold"),
    "empty promise": (empty_promise, "cannot hold"),
}

MEASURE = """
import json, resource, sys
from side_tuning.wire.bounded import FrameError
from side_tuning.wire.frame import decode, decode_frame
payload = sys.stdin.buffer.read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode(payload)
    refused = ""
except FrameError as error:
    refused = str(error)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(json.dumps({"refused": refused, "grown": grown}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
@pytest.mark.parametrize("name", BOMBS)
def test_a_refused_bomb_takes_less_than_twice_the_cap(name: str) -> None:
    """Peak memory of a process of its own, so that what lz4 allocates by itself counts too."""
    make, message = BOMBS[name]
    payload = make()
    assert len(payload) < 1.2 * MIB
    done = subprocess.run([sys.executable, "-c", MEASURE], input=payload, capture_output=True, check=True, timeout=120)
    result = json.loads(done.stdout)
    assert message in result["refused"]
    assert result["grown"] < 2 * MAX_BODY_BYTES
    if name in {"admits", "states little", "double-wrapped", "empty promise"}:
        assert result["grown"] < 8 * MIB  # refused before anything of the stated size is allocated


def test_only_one_layer_of_lz4_is_ever_removed() -> None:
    """What inflates to lz4 is taken for vectors of the stated shape, and never inflated again."""
    inner = lz4.frame.compress(b"inside" * 40)  # short enough to have no byte of 0xFF, which fp16 would refuse
    frame = decode(frame_that_inflates(inner + bytes(len(inner) % 2), width=-(-len(inner) // 2)))
    assert isinstance(frame, Frame)
    assert frame.taps[0].data[: len(inner)] == inner


@pytest.mark.parametrize("cut", [1, 4, 10])
def test_lz4_that_ends_early_is_refused(cut: int) -> None:
    header, body = take_apart(frame_that_inflates(bytes(range(16)) * 64, width=512))
    decode(put_together(header, body))
    with pytest.raises(FrameError, match="ends early"):
        decode(put_together(header, body[:-cut]))


def test_bytes_after_the_lz4_end_are_refused() -> None:
    header, body = take_apart(frame_that_inflates(bytes(1024), width=512))
    for extra in (b"\0", body, b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"):
        with pytest.raises(FrameError, match=r"after its end|ends early"):
            decode(put_together(header, body + extra))
        with pytest.raises(FrameError):
            decode(put_together(header, extra + body))


@pytest.mark.parametrize("difference", [-2, 2])
def test_lz4_of_another_size_than_stated_is_refused(difference: int) -> None:
    with pytest.raises(FrameError, match=r"inflates past|ends early"):
        decode(frame_that_inflates(bytes(1024 + difference), width=512))


HEADER_BOMBS = {
    "nested arrays": b"\x91" * 60_000 + b"\xc0",
    "nested maps": b"\x81\xa1a" * 20_000 + b"\xc0",
    "array32 of 2^32": b"\xdd\xff\xff\xff\xff",
    "map32 of 2^32": b"\xdf\xff\xff\xff\xff",
    "str32 of 2^32": b"\xdb\xff\xff\xff\xff",
    "bin32 of 2^32": b"\xc6\xff\xff\xff\xff",
    "array of 65,000 empty arrays": b"\xdc" + (65_000).to_bytes(2, "big") + b"\x90" * 65_000,
    "extension": msgpack.packb(msgpack.ExtType(5, b"x" * 16)),
    "extension without data": b"\xc7\x00\x05",
    "ext32 of 2^32": b"\xc9\xff\xff\xff\xff\x05",
    "timestamp": msgpack.packb(msgpack.Timestamp(1)),
    "extension inside": msgpack.packb({"kind": msgpack.ExtType(1, b"")}),
    "number as key": msgpack.packb({1: 2}),
    "not UTF-8": b"\xa2\xff\xfe",
    "two objects": b"\xc0\xc0",
    "nothing": b"",
    "not a map": msgpack.packb([1, 2]),
}


@pytest.mark.parametrize("name", HEADER_BOMBS)
def test_msgpack_bombs_in_the_header_are_refused(name: str) -> None:
    payload = put_together(HEADER_BOMBS[name], b"")
    with pytest.raises(FrameError):
        decode(payload)
    assert read_identity(payload) is None


def test_lists_over_the_samples_limit_are_refused() -> None:
    header, body = take_apart(encode_frame(pooled_frame()))
    header["samples"]["labels"] = [0] * 4097
    with pytest.raises(FrameError, match="exceeds max_array_len"):
        decode(put_together(header, body))
