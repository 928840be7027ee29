"""Float vectors <-> bytes: fp16, int8, int4, int2, rot4.

The integer codecs are affine: value = zero + code * scale, one (zero, scale) pair per vector or per group of at
most 128 values, never per tensor: one token often has 100 times the norm of the rest and would destroy them.
Bytes of a matrix: all zeros, all scales (bfloat16 bits, little-endian), then each row's codes padded to whole bytes.
An int4 vector of width 384 in groups of 128 costs 192 + 3 * 4 = 204 bytes.

rot4 is int4 after a rotation: signs are flipped by a fixed pattern, then each 128 values go through a Hadamard matrix
(the rest of a row in powers of two). It spreads a channel that is always large over its block, so that it does not take all
levels for itself. Sums and differences in a fixed order: every machine computes the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import numpy as np
from numpy.typing import DTypeLike, NDArray

from side_tuning.wire.bounded import FrameError
from side_tuning.wire.messages import CodecName

Floats = NDArray[np.float32]

MAX_GROUP = 128
MAX_ROWS = 2**31
MAX_WIDTH = 65_536
LARGEST_FP16 = 65_504.0
# Room for zero and scale to be rounded outwards and still be finite in float32.
LARGEST_AFFINE = 1e38
# A rotation of 128 values makes one at most 11.4 times as large: what is encoded and what is decoded stay finite.
LARGEST_ROTATED = 1e36
_LARGEST_DECODED_ROTATED = 2e37
_BLOCK = 128
_SIGNS = 1.0 - 2.0 * np.unpackbits(np.frombuffer(hashlib.sha256(b"rotation").digest()[: _BLOCK // 8], np.uint8)).astype(np.float32)
# With few levels it pays to clip the tails: of these shares of a group's range the one that loses least is used.
# Measured on MiniLM's pooled layers 2, 4, 6 of trec: int2 0.84, 0.77, 0.51 -> 0.56, 0.56, 0.35; int4 5 % less error.
_RANGE_SHARES = {2: (0.9, 0.8, 0.7, 0.6, 0.5, 0.4), 4: (0.9, 0.8, 0.7), 8: ()}


@dataclass(frozen=True)
class CodecError:
    """What a codec loses: relative L2 per vector (cosine similarity hides damage)."""

    mean: float
    p99: float


@dataclass(frozen=True)
class _Codec:
    row_bytes: Callable[[int, int], int]  # (width, group)
    encode: Callable[[Floats, int], bytes]  # (values, group)
    decode: Callable[[bytes, int, int, int], Floats]  # (data, rows, width, group)
    check: Callable[[bytes, int, int, int], None]  # same arguments; refuses what would decode to non-finite values


def encode_vectors(values: NDArray[Any], codec: CodecName, group: int) -> bytes:
    """Encode a matrix (rows, width); `group` values share a scale, 0 means one scale per row.

    Raises:
        FrameError: not a matrix, non-finite values, or values too large for the codec (fp16 refuses what is above
            65504 rather than saturate: a clipped activation would train the side network on something untrue).

    """
    matrix = np.ascontiguousarray(values, dtype=np.float32)
    if matrix.ndim != 2:
        raise FrameError(f"a codec takes a matrix (rows, width), not an array of shape {matrix.shape}")
    encoded_bytes(matrix.shape[0], matrix.shape[1], codec, group)  # checks the shape and the names
    if matrix.size == 0:
        return b""
    largest = float(np.abs(matrix).max())
    if not np.isfinite(largest):
        raise FrameError("the vectors hold NaN or infinite values; the backbone's output is damaged")
    return _CODECS[codec].encode(matrix, group)


def decode_vectors(  # noqa: PLR0917 - shape, codec and group belong together
    data: bytes, rows: int, width: int, codec: CodecName, group: int, dtype: DTypeLike = np.float32
) -> NDArray[Any]:
    """Inverse of `encode_vectors`, shape (rows, width); checks the size before it allocates, then the scales."""
    check_vectors(data, rows, width, codec, group)
    values = _CODECS[codec].decode(data, rows, width, group)
    target = np.dtype(dtype)
    if target == np.float16 and values.size and float(np.abs(values).max()) > LARGEST_FP16:
        raise FrameError("decoded values above 65504 do not fit float16; decode to float32")
    return values.astype(target, copy=False)


def check_vectors(data: bytes, rows: int, width: int, codec: CodecName, group: int) -> None:
    """Raise `FrameError` unless `data` decodes to (rows, width) finite values; far cheaper than decoding."""
    expected = encoded_bytes(rows, width, codec, group)
    if len(data) != expected:
        raise FrameError(f"{len(data)} bytes for {rows} x {width} values in {codec} (group {group}), not {expected}")
    _CODECS[codec].check(data, rows, width, group)


def encoded_bytes(rows: int, width: int, codec: CodecName, group: int) -> int:
    """Bytes of (rows, width) values; raises `FrameError` for a shape, codec or group that cannot be."""
    if codec not in _CODECS:
        raise FrameError(f"codec {codec!r:.40} is not one of {', '.join(_CODECS)}")
    if not 0 <= group <= MAX_GROUP:
        raise FrameError(f"group {group} is not 0 (one scale per vector) or 1 to {MAX_GROUP}")
    if not 0 <= rows <= MAX_ROWS or not 1 <= width <= MAX_WIDTH:
        raise FrameError(f"shape {rows} x {width} is outside 0..{MAX_ROWS} x 1..{MAX_WIDTH}")
    return rows * _CODECS[codec].row_bytes(width, group)


def round_trip(values: NDArray[Any], codec: CodecName, group: int) -> Floats:
    """What the receiver will see; the device feeds its own side network with this, so both see the same."""
    rows, width = np.shape(values)
    return decode_vectors(encode_vectors(values, codec, group), rows, width, codec, group)


def measure_error(values: NDArray[Any], codec: CodecName, group: int) -> CodecError:
    """Relative L2 error per vector over the rows of `values`; a zero vector counts as 0 (it survives exactly)."""
    exact = np.asarray(values, dtype=np.float64)
    if exact.shape[0] == 0:
        raise FrameError("no vectors to measure a codec on")
    lost = np.linalg.norm(round_trip(values, codec, group) - exact, axis=1)
    norms = np.linalg.norm(exact, axis=1)
    relative = np.divide(lost, norms, out=np.zeros_like(lost), where=norms > 0)
    return CodecError(mean=float(relative.mean()), p99=float(np.percentile(relative, 99)))


# fp16: plain IEEE half precision, no scale.


def _fp16_row_bytes(width: int, _group: int) -> int:
    return 2 * width


def _fp16_encode(values: Floats, _group: int) -> bytes:
    largest = float(np.abs(values).max())
    if largest > LARGEST_FP16:
        raise FrameError(f"fp16 holds at most {LARGEST_FP16:.0f}, the vectors reach {largest:g}; use int8 in the tap plan")
    return values.astype("<f2").tobytes()


def _fp16_decode(data: bytes, rows: int, width: int, _group: int) -> Floats:
    return np.frombuffer(data, dtype="<f2").reshape(rows, width).astype(np.float32)


def _fp16_check(data: bytes, rows: int, width: int, _group: int) -> None:
    exponents = np.frombuffer(data, dtype="<u2") & 0x7C00
    if (exponents == 0x7C00).any():
        raise FrameError("fp16 vectors hold NaN or infinite values")


# int8, int4, int2: affine.

_BFLOAT16_MAGNITUDE = np.uint16(0x7FFF)
_BFLOAT16_HARMLESS = (127 + 113) << 7  # the bits of 2^113; times 255 it is far from float32's end


def _groups(width: int, group: int) -> tuple[int, int]:
    """How many groups a row has and how many values a full one holds; the last may be short."""
    size = min(group or width, width)
    return -(-width // size), size


def _affine_row_bytes(bits: int, width: int, group: int) -> int:
    return -(-width * bits // 8) + 4 * _groups(width, group)[0]


def _affine_encode(bits: int, values: Floats, group: int) -> bytes:
    largest = float(np.abs(values).max())
    if largest > LARGEST_AFFINE:
        raise FrameError(f"int{bits} holds at most {LARGEST_AFFINE:g}, the vectors reach {largest:g}")
    rows, width = values.shape
    count, size = _groups(width, group)
    if short := count * size - width:  # repeating a value changes neither minimum nor maximum
        values = np.concatenate([values, np.repeat(values[:, -1:], short, axis=1)], axis=1)
    blocks = values.reshape(rows, count, size)
    low, high = blocks.min(axis=2), blocks.max(axis=2)
    zero, scale = _best_grid(blocks, low, high, bits)
    codes = _steps(blocks, zero, scale, 2**bits - 1).astype(np.uint8).reshape(rows, count * size)[:, :width]
    return _to_bfloat16(zero) + _to_bfloat16(scale) + _pack(codes, bits).tobytes()


def _affine_decode(bits: int, data: bytes, rows: int, width: int, group: int) -> Floats:
    zero, scale = _read_grid(data, rows, width, group)
    count, size = _groups(width, group)
    packed = np.frombuffer(data, dtype=np.uint8, offset=4 * rows * count).reshape(rows, -(-width * bits // 8))
    codes = _unpack(packed, bits)[:, :width]
    values = np.zeros((rows, count * size), dtype=np.float32)
    values[:, :width] = codes
    blocks = values.reshape(rows, count, size)
    blocks *= scale[:, :, None]
    blocks += zero[:, :, None]
    return values if count * size == width else np.ascontiguousarray(values[:, :width])


def _affine_check(bits: int, data: bytes, rows: int, width: int, group: int, largest: float = np.inf) -> None:  # noqa: PLR0917
    # Zeros within ±2^113 and scales from 0 to 2^113 can do no harm, and their bits say so: nearly every frame ends here.
    grid = 2 * rows * _groups(width, group)[0]
    words = np.frombuffer(data, dtype="<u2", count=grid)
    if grid and int((words[: grid // 2] & _BFLOAT16_MAGNITUDE).max()) < _BFLOAT16_HARMLESS and int(words[grid // 2 :].max()) < _BFLOAT16_HARMLESS:
        return
    zero, scale = _read_grid(data, rows, width, group)
    with np.errstate(over="ignore", invalid="ignore"):
        top = zero + scale * np.float32(2**bits - 1)
        small = (np.abs(zero) <= largest) & (np.abs(top) <= largest) & np.isfinite(zero) & np.isfinite(top)
    if not (small.all() and (scale >= 0).all()):
        raise FrameError(f"int{bits} vectors have a scale or zero point that is NaN, infinite, negative or too large")


# rot4: int4 of rotated values.


def _rotated_encode(values: Floats, group: int) -> bytes:
    largest = float(np.abs(values).max())
    if largest > LARGEST_ROTATED:
        raise FrameError(f"rot4 holds at most {LARGEST_ROTATED:g}, the vectors reach {largest:g}")
    return _affine_encode(4, _hadamard(values * _signs(values.shape[1])), group)


def _rotated_decode(data: bytes, rows: int, width: int, group: int) -> Floats:
    return _hadamard(_affine_decode(4, data, rows, width, group)) * _signs(width)


def _rotated_check(data: bytes, rows: int, width: int, group: int) -> None:
    _affine_check(4, data, rows, width, group, _LARGEST_DECODED_ROTATED)


def _signs(width: int) -> Floats:
    return np.resize(_SIGNS, width)


def _hadamard(values: Floats) -> Floats:
    """Each row times an orthonormal, symmetric matrix of Hadamard blocks: the same again gives the row back."""
    rows, width = values.shape
    out = np.empty_like(values)
    start, size = 0, _BLOCK
    while start < width:
        while size > width - start:
            size //= 2
        end = start + (width - start) // size * size
        x = values[:, start:end].reshape(-1, size)
        half = 1
        while half < size:
            pairs = x.reshape(-1, size // (2 * half), 2, half)
            x = np.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), axis=2).reshape(-1, size)
            half *= 2
        out[:, start:end] = (x * np.float32(size**-0.5)).reshape(rows, end - start)
        start = end
    return out


def _read_grid(data: bytes, rows: int, width: int, group: int) -> tuple[Floats, Floats]:
    count = _groups(width, group)[0]
    words = np.frombuffer(data, dtype="<u2", count=2 * rows * count).astype(np.uint32) << np.uint32(16)
    zero, scale = words.view(np.float32).reshape(2, rows, count)
    return zero, scale


def _grid(low: Floats, high: Floats, levels: int) -> tuple[Floats, Floats]:
    """Zero and scale in bfloat16, rounded outwards so that the levels cover low..high.

    bfloat16 rather than fp16 at the same two bytes: it has float32's range, so neither tiny nor huge vectors under-
    or overflow, and its coarser steps cost at most 1 % of a level since codes are computed on the rounded grid.
    """
    zero = _bfloat16_outwards(low, downwards=True)
    scale = _bfloat16_outwards((high - zero) / np.float32(levels), downwards=False)
    return zero, scale


def _best_grid(blocks: Floats, low: Floats, high: Floats, bits: int) -> tuple[Floats, Floats]:
    """The grid over low..high, or over a share of it around its middle where that loses less in a group."""
    levels = 2**bits - 1
    zero, scale = _grid(low, high, levels)
    shares = _RANGE_SHARES[bits]
    if not shares:
        return zero, scale
    lost = _loss(blocks, zero, scale, levels)
    half = (high - low) / np.float32(2)
    middle = low + half
    for share in shares:
        reach = half * np.float32(share)
        other_zero, other_scale = _grid(middle - reach, middle + reach, levels)
        other_lost = _loss(blocks, other_zero, other_scale, levels)
        better = other_lost < lost
        lost = np.where(better, other_lost, lost)
        zero, scale = np.where(better, other_zero, zero), np.where(better, other_scale, scale)
    return zero, scale


def _loss(blocks: Floats, zero: Floats, scale: Floats, levels: int) -> Floats:
    """Squared error of each group in steps of its own largest value, so that it neither under- nor overflows."""
    lost = _steps(blocks, zero, scale, levels)
    lost *= scale[:, :, None]
    lost += zero[:, :, None]
    lost -= blocks
    largest = np.maximum(np.abs(blocks.max(axis=2)), np.abs(blocks.min(axis=2)))
    lost /= np.where(largest > 0, largest, np.float32(1))[:, :, None]
    return np.einsum("rgi,rgi->rg", lost, lost)


def _steps(blocks: Floats, zero: Floats, scale: Floats, levels: int) -> Floats:
    """The codes, still as floats."""
    steps = blocks - zero[:, :, None]
    steps /= np.where(scale > 0, scale, np.float32(1))[:, :, None]
    np.rint(steps, out=steps)
    np.clip(steps, 0, levels, out=steps)
    return steps


def _bfloat16_outwards(values: Floats, *, downwards: bool) -> Floats:
    """Round to bfloat16 towards minus infinity (`downwards`) or plus infinity, still as float32."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    kept = bits & np.uint32(0xFFFF0000)  # towards zero
    away = (values < 0) if downwards else (values > 0)
    grow = away & (kept != bits)
    return (kept + np.where(grow, np.uint32(0x10000), np.uint32(0))).astype(np.uint32).view(np.float32)


def _to_bfloat16(values: Floats) -> bytes:
    return (np.ascontiguousarray(values).view(np.uint32) >> np.uint32(16)).astype("<u2").tobytes()


def _pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes of each row into whole bytes, the first code in the lowest bits."""
    if bits == 8:
        return np.ascontiguousarray(codes)
    per_byte = 8 // bits
    if short := -codes.shape[1] % per_byte:
        codes = np.pad(codes, ((0, 0), (0, short)))
    packed = codes[:, 0::per_byte].copy()
    for place in range(1, per_byte):
        packed |= codes[:, place::per_byte] << np.uint8(place * bits)
    return packed


def _unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    per_byte = 8 // bits
    codes = np.empty((*packed.shape, per_byte), dtype=np.uint8)
    for place in range(per_byte):
        codes[:, :, place] = (packed >> np.uint8(place * bits)) & np.uint8(2**bits - 1)
    return codes.reshape(packed.shape[0], packed.shape[1] * per_byte)


def _affine(bits: int) -> _Codec:
    return _Codec(
        partial(_affine_row_bytes, bits), partial(_affine_encode, bits), partial(_affine_decode, bits), partial(_affine_check, bits)
    )


_CODECS: dict[CodecName, _Codec] = {
    "fp16": _Codec(_fp16_row_bytes, _fp16_encode, _fp16_decode, _fp16_check),
    "int8": _affine(8),
    "int4": _affine(4),
    "int2": _affine(2),
    "rot4": _Codec(partial(_affine_row_bytes, 4), _rotated_encode, _rotated_decode, _rotated_check),
}
if set(_CODECS) != set(get_args(CodecName)):
    raise AssertionError(f"codecs {sorted(_CODECS)} and CodecName {sorted(get_args(CodecName))} differ")
