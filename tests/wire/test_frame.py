"""Frames: golden files, round trips, damage and lies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from side_tuning.wire.bounded import FrameError
from side_tuning.wire.codecs import decode_vectors, encode_vectors
from side_tuning.wire.frame import (
    Frame,
    Identity,
    Part,
    SampleInfo,
    Tap,
    decode,
    decode_frame,
    encode_frame,
    read_identity,
)
from tests.wire.examples import (
    GOLDEN,
    changed,
    changed_samples,
    changed_tap,
    language_frame,
    large_frame,
    part,
    pooled_frame,
    put_together,
    regression_frame,
    sequence_frame,
    summary_frame,
    take_apart,
    tap,
    wave,
)

GOLDEN_FILES: list[tuple[str, Callable[[], Frame | Part]]] = [
    ("pooled-v1.bin", pooled_frame),
    ("sequence-v1.bin", sequence_frame),
    ("language-v1.bin", language_frame),
    ("regression-v1.bin", regression_frame),
    ("summary-v1.bin", summary_frame),
    ("part-v1.bin", part),
]


@pytest.mark.parametrize(("name", "make"), GOLDEN_FILES)
def test_golden_files_still_decode(name: str, make: Callable[[], Frame | Part]) -> None:
    """A frame spooled by any released version must be readable for ever."""
    assert decode((GOLDEN / name).read_bytes()) == make()


@pytest.mark.parametrize(("name", "make"), GOLDEN_FILES[:5])
def test_the_encoder_still_writes_what_the_golden_files_hold(name: str, make: Callable[[], Frame]) -> None:
    """Field by field: only lz4 itself may come out differently, with another version of its library."""
    golden_header, golden_body = take_apart((GOLDEN / name).read_bytes())
    header, body = take_apart(encode_frame(make()))
    for fields in (golden_header, header):
        fields.pop("body_bytes")
        fields.pop("body_crc32")
    assert header == golden_header
    assert list(header) == list(golden_header)
    if header["compression"] == "none":
        assert body == golden_body


def test_the_layout_of_a_golden_frame() -> None:
    """Read by hand, so that encoder and decoder cannot drift together."""
    payload = (GOLDEN / "pooled-v1.bin").read_bytes()
    assert payload[:4] == b"SFT1"
    header, body = take_apart(payload)
    assert header["device"] == "kitchen"
    assert header["samples"] == {
        "ids": [b"\x0a" * 16, b"\x0b" * 16, b"\x0c" * 16],
        "labels": [4, None, 0],
        "tokens": [11, 5, 128],
        "held_out": [2],
    }
    assert [(t["layer"], t["rows"], t["width"], t["codec"], t["group"], t["offset"]) for t in header["taps"]] == [
        (1, 3, 12, "fp16", 0, 0),
        (2, 3, 12, "int8", 8, 72),
        (4, 3, 13, "int2", 0, 132),
    ]
    assert header["compression"] == "none"
    assert header["body_bytes"] == header["raw_bytes"] == len(body) == 156
    np.testing.assert_array_equal(np.frombuffer(body[:72], "<f2").reshape(3, 12), wave(3, 12, 1).astype(np.float16))
    zeros, scales = (np.frombuffer(body[72:96], "<u2").astype("<u4") << 16).view("<f4").reshape(2, 3, 2)
    codes = np.frombuffer(body[96:132], np.uint8).reshape(3, 12)
    by_hand = np.repeat(zeros, [8, 4], axis=1) + np.repeat(scales, [8, 4], axis=1) * codes
    np.testing.assert_allclose(by_hand, wave(3, 12, 2), atol=0.02)
    np.testing.assert_array_equal(decode_vectors(body[72:132], 3, 12, "int8", 8), by_hand)


@pytest.mark.parametrize("make", [pooled_frame, sequence_frame, language_frame, regression_frame, large_frame])
def test_round_trip(make: Callable[[], Frame]) -> None:
    frame = make()
    payload = encode_frame(frame)
    assert decode_frame(payload) == decode(payload) == frame
    assert encode_frame(frame) == payload
    assert read_identity(payload) == Identity(frame.device, frame.spool, frame.sequence)


def test_a_default_frame_costs_little_more_than_its_codes() -> None:
    """64 samples, three layers in int4: 612 bytes of taps per sample and at most 28 for everything else, ids of 16 bytes included."""
    payload = encode_frame(large_frame())
    assert len(payload) / 64 < 612 + 28


def test_a_body_that_compresses_travels_as_lz4() -> None:
    frame = replace(large_frame(), taps=(tap(1, np.zeros((64, 384), np.float32)),))
    payload = encode_frame(frame)
    assert take_apart(payload)[0]["compression"] == "lz4"
    assert len(payload) < 2500
    assert decode_frame(payload) == frame


def test_numpy_numbers_are_taken_as_numbers() -> None:
    frame = replace(pooled_frame(), samples=tuple(s._replace(label=np.int64(1)) for s in pooled_frame().samples))  # type: ignore[arg-type]
    assert decode_frame(encode_frame(frame)) == frame


def test_unknown_header_fields_are_ignored() -> None:
    payload = changed(encode_frame(pooled_frame()), privacy={"epsilon": 1.0}, extra=[1, 2])
    payload = changed_tap(payload, 1, colour="red")
    assert decode_frame(changed_samples(payload, weights=[1, 2, 3])) == pooled_frame()


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", fullmatch=True).filter(lambda name: name != "fleet")


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    mode = draw(st.sampled_from(["pooled", "sequence"]))
    ids = draw(st.lists(st.binary(min_size=1, max_size=32), min_size=1, max_size=6, unique=True))
    least = 1 if mode == "sequence" else 0
    samples = tuple(
        SampleInfo(
            sample_id.hex(),
            draw(st.none() | st.integers(0, 4095)),
            draw(st.sampled_from(["train", "held-out"])),
            draw(st.integers(least, 9)),
        )
        for sample_id in ids
    )
    summary_rows = draw(st.integers(0, 3)) if mode == "sequence" else 0
    rows = len(samples) if mode == "pooled" else sum(sample.tokens + summary_rows for sample in samples)
    taps = []
    for layer in sorted(draw(st.sets(st.integers(1, 1024), min_size=1, max_size=4))):
        width, group = draw(st.integers(1, 40)), draw(st.integers(0, 128))
        codec = draw(st.sampled_from(["fp16", "int8", "int4", "int2"]))
        values = np.random.default_rng(draw(st.integers(0, 2**32))).normal(0, 2, (rows, width))
        map_hash = draw(st.none() | st.just("0f" * 16))
        taps.append(Tap(layer, rows, width, codec, group, map_hash, encode_vectors(values, codec, group)))
    return Frame(
        device=draw(names),
        spool=draw(st.from_regex(r"[0-9a-f]{16}", fullmatch=True)),
        sequence=draw(st.integers(1, 2**53)),
        captured_at=draw(st.floats(0, 1e12)),
        backbone=draw(st.from_regex(r"[0-9a-f]{16,64}", fullmatch=True)),
        plan_version=draw(st.integers(1, 2**53)),
        mode=mode,
        pooling=draw(st.sampled_from(["mean", "first", "last"])),
        produced=draw(st.integers(len(samples), 2**53)),
        samples=samples,
        taps=tuple(taps),
        summary_rows=summary_rows,
    )


@settings(max_examples=120, deadline=None)
@given(frame=frames())
def test_any_frame_comes_back(frame: Frame) -> None:
    payload = encode_frame(frame)
    assert decode_frame(payload) == frame
    for one in frame.taps:
        values = decode_vectors(one.data, one.rows, one.width, one.codec, one.group)
        assert np.isfinite(values).all()


PAYLOADS = [
    pytest.param(encode_frame(pooled_frame()), id="pooled"),
    pytest.param(encode_frame(sequence_frame()), id="sequence"),
    pytest.param((GOLDEN / "part-v1.bin").read_bytes() if (GOLDEN / "part-v1.bin").exists() else b"", id="part"),
    pytest.param(encode_frame(replace(pooled_frame(), taps=(tap(1, np.zeros((3, 384), np.float32), "fp16"),))), id="lz4"),
]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_cut_off_anywhere_is_refused(payload: bytes) -> None:
    header_end = 12 + int.from_bytes(payload[4:8], "little")
    for length in range(len(payload)):
        with pytest.raises(FrameError):
            decode(payload[:length])
        assert (read_identity(payload[:length]) is not None) == (length >= header_end)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_any_flipped_byte_is_refused(payload: bytes) -> None:
    header_end = 12 + int.from_bytes(payload[4:8], "little")
    for place in range(len(payload)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(payload)
            damaged[place] ^= flip
            with pytest.raises(FrameError):
                decode(bytes(damaged))
            assert (read_identity(bytes(damaged)) is not None) == (place >= header_end)


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("extra", [b"\0", b"SFT1", b"x" * 1000])
def test_bytes_after_the_end_are_refused(payload: bytes, extra: bytes) -> None:
    with pytest.raises(FrameError, match="states a body of"):
        decode(payload + extra)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=300))
def test_noise_is_refused(data: bytes) -> None:
    for payload in (data, b"SFT1" + data, put_together(data, b""), put_together(data[:100], data[100:])):
        with pytest.raises(FrameError):
            decode(payload)
        read_identity(payload)


simple = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
anything = st.recursive(simple, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), where=st.sampled_from(["frame", "samples", "taps"]), value=anything)
def test_any_field_may_hold_anything(data: st.DataObject, where: str, value: object) -> None:
    """Whatever one field is replaced with, the frame is refused or still obeys every rule; nothing else is raised."""
    header, body = take_apart(encode_frame(pooled_frame()))
    target: Any = {"frame": header, "samples": header["samples"], "taps": header["taps"][1]}[where]
    target[data.draw(st.sampled_from(sorted(target)))] = value
    packed = msgpack.packb(header)
    try:
        frame = decode(put_together(packed, body))
    except FrameError:
        return
    assert isinstance(frame, Frame)
    assert decode_frame(encode_frame(frame)) == frame


def test_an_unknown_version_is_refused() -> None:
    payload = encode_frame(pooled_frame())
    with pytest.raises(FrameError, match="version b'2' is unknown"):
        decode(b"SFT2" + payload[4:])
    with pytest.raises(FrameError, match="starts with b'SAFE'"):
        decode(b"SAFE" + payload[4:])
    assert read_identity(b"SFT2" + payload[4:]) is None


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(FrameError, match="kind is 'whole'"):
        decode(changed(encode_frame(pooled_frame()), kind="whole"))


def test_a_header_over_its_limit_is_refused() -> None:
    padding = b"\xc1" * 65_537
    with pytest.raises(FrameError, match="header of 65537 bytes"):
        decode(put_together(padding, b""))
    with pytest.raises(FrameError, match="header of 4294967295 bytes"):
        decode(b"SFT1" + b"\xff" * 4 + bytes(100))


def test_a_body_over_the_callers_limit_is_refused() -> None:
    payload = encode_frame(large_frame())
    with pytest.raises(FrameError, match=r"body of \d+ bytes, the limit is 30000"):
        decode(payload, max_body_bytes=30_000)
    assert decode(payload, max_body_bytes=64 * 612) == large_frame()


@pytest.mark.parametrize("name", ["kind", "device", "spool", "sequence", "captured_at", "backbone", "plan", "mode", "pooling", "produced", "samples", "taps", "raw_bytes", "compression", "body_bytes", "body_crc32"])
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(FrameError, match=f"'{name}' is missing"):
        decode(changed(encode_frame(pooled_frame()), **{name: ...}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "fleet"}, "device name 'fleet'"),
        ({"device": "a/b"}, "device name 'a/b'"),
        ({"device": "a" * 65}, "device"),
        ({"spool": ""}, "spool"),
        ({"spool": "../x"}, "spool"),
        ({"sequence": 0}, "sequence is 0"),
        ({"sequence": -1}, "sequence is -1"),
        ({"sequence": 2**53 + 1}, "sequence"),
        ({"sequence": True}, "sequence"),
        ({"sequence": 1.0}, "sequence"),
        ({"captured_at": float("nan")}, "captured_at"),
        ({"captured_at": float("inf")}, "captured_at"),
        ({"captured_at": -1.0}, "captured_at"),
        ({"backbone": "xyz"}, "fingerprint"),
        ({"backbone": "AB" * 16}, "fingerprint"),
        ({"plan": 0}, "plan is 0"),
        ({"mode": "whole"}, "mode"),
        ({"pooling": "max"}, "pooling"),
        ({"produced": 2}, "produced is 2"),
        ({"taps": []}, "no taps|taps need 0"),
        ({"taps": [1]}, "expected a map"),
        ({"taps": {}}, "taps is not a list"),
        ({"taps": [{}] * 65}, "taps is not a list of at most 64"),
        ({"samples": []}, "expected a map"),
        ({"raw_bytes": 155}, "taps need 156"),
        ({"raw_bytes": -1}, "raw_bytes is -1"),
        ({"raw_bytes": 2**62}, "the limit is"),
        ({"body_bytes": 155}, "states a body of 155"),
        ({"body_bytes": 2**31}, "states a body of"),
        ({"body_bytes": -156}, "body_bytes is -156"),
        ({"body_crc32": 1}, "crc32"),
        ({"compression": "zstd"}, "compression is 'zstd'"),
        ({"compression": "lz4"}, "malformed lz4"),
    ],
)
def test_a_lie_in_the_header_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FrameError, match=message):
        decode(changed(encode_frame(pooled_frame()), **changes))


@pytest.mark.parametrize(
    ("place", "changes", "message"),
    [
        (0, {"rows": 4}, "taps need"),
        (0, {"rows": -3}, "rows is -3"),
        (0, {"rows": 2**31, "width": 65_536}, "taps need"),
        (0, {"rows": 2**63}, "rows"),
        (0, {"rows": 6, "width": 6}, "6 vectors, its 3 samples make 3"),  # the same bytes, another shape
        (0, {"width": 0}, "width is 0"),
        (0, {"width": -12}, "width is -12"),
        (0, {"width": 2**32}, "width"),
        (0, {"width": 13}, "taps need"),
        (0, {"codec": "int8"}, "taps need"),
        (0, {"codec": "float32"}, "codec is 'float32'"),
        (1, {"group": 129}, "group is 129"),
        (1, {"group": -1}, "group is -1"),
        (1, {"group": 4}, "taps need"),
        (0, {"layer": 0}, "layer is 0"),
        (0, {"layer": 2}, "layer 2 follows layer 2"),
        (0, {"layer": 3}, "layer 2 follows layer 3"),
        (0, {"map": "../maps"}, "not 16 to 64"),
        (0, {"map": 7}, "map is 7"),
        (0, {"offset": 1}, "starts at byte 1"),
        (1, {"offset": 0}, "starts at byte 0, the one before ends at 72"),  # overlaps
        (1, {"offset": 73}, "starts at byte 73"),  # a gap
        (1, {"offset": -1}, "offset is -1"),
        (2, {"offset": 2**62}, "starts at byte"),
    ],
)
def test_a_lie_about_a_tap_is_refused(place: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FrameError, match=message):
        decode(changed_tap(encode_frame(pooled_frame()), place, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": [b"a", b"b"]}, "2 sample ids, 3 labels"),
        ({"ids": [], "labels": [], "tokens": []}, "0 sample ids"),
        ({"ids": [b"a", b"b", b"a"]}, "comes up twice"),
        ({"ids": [b"a", b"b", b""]}, "not 1 to 32 bytes"),
        ({"ids": [b"a", b"b", b"c" * 33]}, "not 1 to 32 bytes"),
        ({"ids": ["a", "b", "c"]}, "not 1 to 32 bytes"),
        ({"labels": [0, 1, -1]}, "label"),
        ({"labels": [0, 1, 4096]}, "label"),
        ({"labels": [0, 1, True]}, "label"),
        ({"labels": [0, 1, 1.5]}, "label"),
        ({"tokens": [1, 1, -1]}, "token count"),
        ({"tokens": [1, 1, 10**7]}, "token count"),
        ({"held_out": [3]}, "held_out"),
        ({"held_out": [-1]}, "held_out"),
        ({"held_out": [1, 1]}, "held_out"),
        ({"held_out": "all"}, "held_out"),
    ],
)
def test_a_lie_about_the_samples_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FrameError, match=message):
        decode(changed_samples(encode_frame(pooled_frame()), **changes))


@pytest.mark.parametrize("tokens", [[3, 3], [2, 2], [5, 0], [0, 0]])
def test_tokens_must_add_up_to_the_rows_in_sequence_mode(tokens: list[int]) -> None:
    with pytest.raises(FrameError, match=r"samples make|no tokens"):
        decode(changed_samples(encode_frame(sequence_frame()), tokens=tokens))


@pytest.mark.parametrize(
    ("frame", "summary_rows", "message"),
    [
        (pooled_frame, 1, "1 rows of a summary in pooled mode"),
        (sequence_frame, 1, "has 5 vectors, its 2 samples make 7"),
        (summary_frame, 0, "has 9 vectors, its 2 samples make 5"),
        (summary_frame, -1, "summary_rows is -1"),
        (summary_frame, 1 << 40, "summary_rows is"),
        (summary_frame, True, "summary_rows is True"),
    ],
)
def test_a_lie_about_the_summary_is_refused(frame: Callable[[], Frame], summary_rows: object, message: str) -> None:
    with pytest.raises(FrameError, match=message):
        decode(changed(encode_frame(frame()), summary_rows=summary_rows))


@pytest.mark.parametrize(("place", "word"), [(0, 0x7C00), (0, 0xFE00), (72, 0x7FC0), (84, 0x7F80), (84, 0xBF80), (132, 0xFFC0)])
def test_non_finite_vectors_are_refused_when_the_frame_arrives(place: int, word: int) -> None:
    header, body = take_apart(encode_frame(pooled_frame()))
    damaged = body[:place] + word.to_bytes(2, "little") + body[place + 2 :]
    with pytest.raises(FrameError, match=r"frame: layer \d: .*(NaN|negative)"):
        decode(put_together(header, damaged))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "fleet"}, "device name"),
        ({"sequence": 0}, "sequence"),
        ({"captured_at": float("nan")}, "captured_at"),
        ({"backbone": "minilm"}, "fingerprint"),
        ({"produced": 1}, "produced"),
        ({"samples": ()}, "0 sample ids"),
        ({"taps": ()}, "no taps"),
        ({"samples": (SampleInfo("xyz", 0, "train", 1),)}, "sample id 'xyz'"),
        ({"samples": (SampleInfo("abc", 0, "train", 1),)}, "even number"),
        ({"samples": (SampleInfo("AB", 0, "train", 1),)}, "lower-case"),
        ({"samples": (SampleInfo("ab", 0, "test", 1),)}, "split 'test'"),  # type: ignore[arg-type]
        ({"samples": (SampleInfo("ab", 5000, "train", 1),) * 3}, "label|twice"),
        ({"taps": (Tap(1, 3, 8, "int8", 0, None, b"short"),)}, "layer 1: 5 bytes for 3 x 8"),
    ],
)
def test_the_encoder_refuses_what_the_decoder_would(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FrameError, match=message):
        encode_frame(replace(pooled_frame(), **changes))


def test_too_many_samples_for_a_header_say_what_to_do() -> None:
    infos = tuple(SampleInfo(f"{n:064x}", 0, "train", 1) for n in range(2000))
    frame = replace(pooled_frame(), samples=infos, produced=2000, taps=(tap(1, wave(2000, 4)),))
    with pytest.raises(FrameError, match="fewer samples"):
        encode_frame(frame)


def test_too_large_a_body_says_what_to_do() -> None:
    huge = Tap(1, 3, 4, "fp16", 0, None, bytes(16 * 1024 * 1024 + 1))
    with pytest.raises(FrameError, match="fewer samples"):
        encode_frame(replace(pooled_frame(), taps=(huge,)))
