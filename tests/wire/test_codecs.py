"""Codecs: each one's error bound, size, and what it refuses."""

from __future__ import annotations

import hashlib
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from side_tuning.wire.bounded import FrameError
from side_tuning.wire.codecs import (
    check_vectors,
    decode_vectors,
    encode_vectors,
    encoded_bytes,
    measure_error,
    round_trip,
)
from side_tuning.wire.messages import CodecName

CODECS: tuple[CodecName, ...] = get_args(CodecName)
AFFINE: tuple[CodecName, ...] = ("int8", "int4", "int2")
LEVELS = {"int8": 255, "int4": 15, "int2": 3, "rot4": 15}
# Relative L2 per vector on Gaussian values of width 384: (mean, p99) with one scale per 128 values, and per vector.
BOUNDS = {
    "fp16": {128: (0.0003, 0.0004), 0: (0.0003, 0.0004)},
    "int8": {128: (0.0065, 0.0075), 0: (0.0075, 0.009)},
    "int4": {128: (0.10, 0.115), 0: (0.11, 0.13)},
    "int2": {128: (0.36, 0.40), 0: (0.37, 0.43)},
    "rot4": {128: (0.10, 0.115), 0: (0.11, 0.13)},
}


def gaussian(rows: int = 400, width: int = 384) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((rows, width)).astype(np.float32)


def relative_error(values: np.ndarray, codec: CodecName, group: int) -> np.ndarray:
    exact = values.astype(np.float64)
    return np.linalg.norm(round_trip(values, codec, group) - exact, axis=1) / np.linalg.norm(exact, axis=1)


@pytest.mark.parametrize("group", [0, 128])
@pytest.mark.parametrize("codec", CODECS)
def test_error_stays_within_the_codecs_bound(codec: CodecName, group: int) -> None:
    error = measure_error(gaussian(), codec, group)
    mean, p99 = BOUNDS[codec][group]
    assert 0 < error.mean < mean
    assert error.mean < error.p99 < p99
    measured = relative_error(gaussian(), codec, group)
    assert error.mean == pytest.approx(measured.mean())
    assert error.p99 == pytest.approx(np.percentile(measured, 99))


@pytest.mark.parametrize("group", [0, 32, 128])
@pytest.mark.parametrize("codec", CODECS)
def test_outlier_tokens_do_not_touch_the_others(codec: CodecName, group: int) -> None:
    """A token of 100 times the norm, as models make them, must leave every other token as it was."""
    values = gaussian(64)
    with_outlier = values.copy()
    with_outlier[17] *= 100
    others = np.arange(64) != 17
    np.testing.assert_array_equal(round_trip(with_outlier, codec, group)[others], round_trip(values, codec, group)[others])
    assert relative_error(with_outlier, codec, group)[17] < BOUNDS[codec][0][1] * 1.1


@pytest.mark.parametrize("codec", AFFINE)
def test_an_outlier_value_costs_only_its_own_group(codec: CodecName) -> None:
    values = gaussian(8)
    with_outlier = values.copy()
    with_outlier[:, 5] = 300
    np.testing.assert_array_equal(round_trip(with_outlier, codec, 128)[:, 128:], round_trip(values, codec, 128)[:, 128:])


@pytest.mark.parametrize("codec", CODECS)
def test_a_row_does_not_depend_on_its_batch(codec: CodecName) -> None:
    """The device at inference encodes one sample, training saw it among 64: both must see the same values."""
    values = gaussian(33, 200)
    together = round_trip(values, codec, 64)
    alone = np.concatenate([round_trip(values[n : n + 1], codec, 64) for n in range(33)])
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize(
    ("codec", "group", "expected"),
    [("fp16", 128, 768), ("int8", 128, 396), ("int4", 128, 204), ("int2", 128, 108), ("rot4", 128, 204), ("int8", 0, 388), ("int4", 0, 196), ("int2", 0, 100)],
)
def test_bytes_of_a_vector_of_width_384(codec: CodecName, group: int, expected: int) -> None:
    assert encoded_bytes(1, 384, codec, group) == expected
    assert len(encode_vectors(gaussian(5), codec, group)) == 5 * expected


@pytest.mark.parametrize("group", [0, 1, 2, 7, 128])
@pytest.mark.parametrize("width", [1, 2, 3, 5, 127, 128, 129, 300])
@pytest.mark.parametrize("codec", CODECS)
def test_any_width_and_group(codec: CodecName, width: int, group: int) -> None:
    values = gaussian(4, width)
    data = encode_vectors(values, codec, group)
    assert len(data) == encoded_bytes(4, width, codec, group)
    decoded = decode_vectors(data, 4, width, codec, group)
    assert decoded.shape == (4, width)
    assert decoded.dtype == np.float32
    assert decoded.flags.c_contiguous
    if codec == "fp16":
        assert (np.abs(decoded - values) <= np.abs(values) * 2**-11 + 2**-25).all()
        return
    # Half a step of the whole row's range, with 2 % for the rounding of zero and scale.
    reach = values.max(axis=1) - values.min(axis=1) + 0.02 * np.abs(values).max(axis=1)
    if codec == "rot4":  # no rotated value is larger than its row
        reach = 2.02 * np.linalg.norm(values, axis=1)
    assert (np.linalg.norm(decoded - values, axis=1) <= 0.51 * reach / LEVELS[codec] * np.sqrt(width)).all()


@pytest.mark.parametrize("group", [0, 128])
@pytest.mark.parametrize("codec", CODECS)
def test_zero_vectors_survive_exactly(codec: CodecName, group: int) -> None:
    zeros = np.zeros((3, 200), np.float32)
    np.testing.assert_array_equal(round_trip(zeros, codec, group), zeros)
    assert measure_error(zeros, codec, group).p99 == 0


@pytest.mark.parametrize("constant", [1.0, -1.0, 0.1, -3.3, 1000.7, -65_000.0, 1e-5])
@pytest.mark.parametrize("codec", ["fp16", *AFFINE])
def test_constant_vectors(codec: CodecName, constant: float) -> None:
    error = measure_error(np.full((2, 130), constant, np.float32), codec, 128)
    assert error.p99 < (0.01 if codec == "fp16" else 0.001)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1e-6, 1e6, 1e20, 1e36])
@pytest.mark.parametrize("codec", AFFINE)
def test_tiny_and_huge_vectors_keep_their_relative_error(codec: CodecName, magnitude: float) -> None:
    """bfloat16 scales have float32's range; fp16 scales would be 0 or infinite here."""
    error = measure_error(gaussian(50) * np.float32(magnitude), codec, 128)
    assert error.p99 < BOUNDS[codec][128][1] * 1.05


@pytest.mark.parametrize("codec", AFFINE)
def test_values_far_from_zero(codec: CodecName) -> None:
    error = measure_error(gaussian(50) + np.float32(1000), codec, 128)
    assert error.p99 < 0.003


def test_a_rotation_saves_the_channels_beside_one_that_is_always_large() -> None:
    values = gaussian(50)
    values[:, 200] += 40
    others = np.arange(384) != 200

    def error(codec: CodecName) -> float:
        return float(np.linalg.norm((round_trip(values, codec, 128) - values)[:, others]) / np.linalg.norm(values[:, others]))

    assert error("rot4") < 0.2
    assert error("rot4") < 0.5 * error("int4")


def test_rotated_bytes_are_the_same_for_ever() -> None:
    values = (np.arange(2 * 140, dtype=np.float32).reshape(2, 140) % 17) - 8
    assert hashlib.sha256(encode_vectors(values, "rot4", 128)).hexdigest()[:16] == "2dd80b61dd27dcc9"


@pytest.mark.parametrize(("place", "word"), [(0, 0x7E00), (0, 0xFE00), (2, 0x7D00)])  # zero and scale of one row
def test_rotated_values_that_would_overflow_are_refused(place: int, word: int) -> None:
    with pytest.raises(FrameError, match=r"holds at most 1e\+36"):
        encode_vectors(np.full((1, 128), 2e36, np.float32), "rot4", 0)
    assert np.isfinite(round_trip(np.full((1, 128), 1e36, np.float32), "rot4", 0)).all()
    data = bytearray(encode_vectors(gaussian(1, 128), "rot4", 0))
    data[place : place + 2] = word.to_bytes(2, "little")
    with pytest.raises(FrameError, match="scale or zero point"):
        decode_vectors(bytes(data), 1, 128, "rot4", 0)


@pytest.mark.parametrize("codec", CODECS)
def test_deterministic(codec: CodecName) -> None:
    values = gaussian(64)
    assert encode_vectors(values, codec, 128) == encode_vectors(values.copy(), codec, 128)
    assert encode_vectors(values, codec, 128) == encode_vectors(np.asfortranarray(values), codec, 128)


@pytest.mark.parametrize("codec", CODECS)
def test_encoding_leaves_its_input_alone(codec: CodecName) -> None:
    values = gaussian(4)
    before = values.copy()
    encode_vectors(values, codec, 128)
    np.testing.assert_array_equal(values, before)


@pytest.mark.parametrize("codec", CODECS)
def test_no_rows(codec: CodecName) -> None:
    assert encode_vectors(np.zeros((0, 8), np.float32), codec, 0) == b""
    assert decode_vectors(b"", 0, 8, codec, 0).shape == (0, 8)
    with pytest.raises(FrameError, match="no vectors"):
        measure_error(np.zeros((0, 8), np.float32), codec, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("codec", CODECS)
def test_non_finite_values_are_refused(codec: CodecName, value: float) -> None:
    values = gaussian(3)
    values[1, 7] = value
    with pytest.raises(FrameError, match="NaN or infinite"):
        encode_vectors(values, codec, 128)


def test_fp16_refuses_what_it_cannot_hold() -> None:
    values = np.array([[1.0, -65_504.0]], np.float32)
    np.testing.assert_array_equal(round_trip(values, "fp16", 0), values)
    values[0, 0] = 65_505
    with pytest.raises(FrameError, match=r"65504.*use int8"):
        encode_vectors(values, "fp16", 0)


def test_affine_codecs_refuse_values_near_the_end_of_float32() -> None:
    for codec in AFFINE:
        with pytest.raises(FrameError, match=r"holds at most 1e\+38"):
            encode_vectors(np.array([[2e38, -2e38]], np.float32), codec, 0)
        extreme = np.array([[1e38, -1e38, 0.0]], np.float32)
        assert np.isfinite(round_trip(extreme, codec, 0)).all()


@pytest.mark.parametrize("codec", AFFINE)
@pytest.mark.parametrize("word", [0x7FC0, 0xFFC0, 0x7F80, 0xFF80, 0x7F81])
@pytest.mark.parametrize("place", [0, 2, 4, 6])  # the zeros of two rows, then their scales
def test_nan_and_infinite_scales_are_refused(codec: CodecName, word: int, place: int) -> None:
    data = bytearray(encode_vectors(gaussian(2, 10), codec, 0))
    data[place : place + 2] = word.to_bytes(2, "little")
    with pytest.raises(FrameError, match="scale or zero point"):
        decode_vectors(bytes(data), 2, 10, codec, 0)
    with pytest.raises(FrameError, match="scale or zero point"):
        check_vectors(bytes(data), 2, 10, codec, 0)


@pytest.mark.parametrize("codec", AFFINE)
@pytest.mark.parametrize("word", [0x7F7F, 0xBF80])  # the largest bfloat16, and minus one
def test_scales_that_overflow_or_are_negative_are_refused(codec: CodecName, word: int) -> None:
    data = bytearray(encode_vectors(gaussian(1, 10), codec, 0))
    data[2:4] = word.to_bytes(2, "little")
    with pytest.raises(FrameError, match="scale or zero point"):
        decode_vectors(bytes(data), 1, 10, codec, 0)


@pytest.mark.parametrize("word", [0x7C00, 0xFC00, 0x7E00, 0x7C01])
def test_non_finite_fp16_is_refused(word: int) -> None:
    with pytest.raises(FrameError, match="NaN or infinite"):
        decode_vectors(b"\0\0" + word.to_bytes(2, "little"), 1, 2, "fp16", 0)


@pytest.mark.parametrize("codec", CODECS)
def test_wrong_size_is_refused(codec: CodecName) -> None:
    data = encode_vectors(gaussian(2, 16), codec, 8)
    for wrong in (data[:-1], data + b"\0", b""):
        with pytest.raises(FrameError, match="bytes for 2 x 16"):
            decode_vectors(wrong, 2, 16, codec, 8)


@pytest.mark.parametrize(
    ("rows", "width", "codec", "group", "message"),
    [
        (-1, 8, "int8", 0, "shape -1 x 8"),
        (2**40, 8, "int8", 0, "shape"),
        (1, 0, "int8", 0, "shape"),
        (1, -8, "int8", 0, "shape"),
        (1, 2**40, "int8", 0, "shape"),
        (1, 8, "int8", 129, "group 129"),
        (1, 8, "int8", -1, "group -1"),
        (1, 8, "int3", 0, "codec 'int3'"),
    ],
)
def test_impossible_shapes_are_refused(rows: int, width: int, codec: CodecName, group: int, message: str) -> None:
    with pytest.raises(FrameError, match=message):
        encoded_bytes(rows, width, codec, group)
    with pytest.raises(FrameError, match=message):
        decode_vectors(b"", rows, width, codec, group)


def test_only_matrices_are_encoded() -> None:
    with pytest.raises(FrameError, match=r"not an array of shape \(8,\)"):
        encode_vectors(np.zeros(8, np.float32), "int8", 0)


def test_decoding_to_another_dtype() -> None:
    values = gaussian(2)
    data = encode_vectors(values, "int8", 128)
    assert decode_vectors(data, 2, 384, "int8", 128, np.float64).dtype == np.float64
    assert decode_vectors(data, 2, 384, "int8", 128, np.float16).dtype == np.float16
    huge = encode_vectors(values * 1e6, "int8", 128)
    with pytest.raises(FrameError, match="do not fit float16"):
        decode_vectors(huge, 2, 384, "int8", 128, np.float16)


@settings(max_examples=150, deadline=None)
@given(
    values=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=40),
        elements=st.floats(-6e4, 6e4, width=32, allow_subnormal=False),
    ),
    codec=st.sampled_from(CODECS),
    group=st.integers(0, 128),
)
def test_any_matrix_comes_back_close(values: np.ndarray, codec: CodecName, group: int) -> None:
    """No value is off by more than the whole range of its row, the vector by no more than the codec's worst step."""
    rows, width = values.shape
    data = encode_vectors(values, codec, group)
    assert len(data) == encoded_bytes(rows, width, codec, group)
    decoded = decode_vectors(data, rows, width, codec, group)
    assert np.isfinite(decoded).all()
    exact = values.astype(np.float64)
    lost = np.linalg.norm(decoded - exact, axis=1)
    if codec == "fp16":
        assert (np.abs(decoded - exact) <= np.abs(exact) * 2**-11 + 2**-25).all()
        return
    # Min-max over a range of at most twice the largest value; clipping is only chosen where it loses less.
    # A rotated value may be as large as its row's norm.
    largest = np.linalg.norm(exact, axis=1) if codec == "rot4" else np.abs(exact).max(axis=1)
    worst_step = (2.02 * largest + 1e-36) / LEVELS[codec]
    assert (lost <= worst_step * 0.52 * np.sqrt(width)).all()


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=64), rows=st.integers(0, 5), width=st.integers(1, 9), codec=st.sampled_from(CODECS))
def test_any_bytes_decode_to_finite_values_or_are_refused(data: bytes, rows: int, width: int, codec: CodecName) -> None:
    exact = (data + bytes(64))[: encoded_bytes(rows, width, codec, 4)]
    try:
        decoded = decode_vectors(exact, rows, width, codec, 4)
    except FrameError:
        return
    assert np.isfinite(decoded).all()
