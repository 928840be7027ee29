"""Frames and parts that several wire tests use; the golden files hold exactly these objects.

A golden file is never made again: when the format changes, a new version gets new files beside the old ones.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import lz4.frame
import msgpack
import numpy as np

from side_tuning.wire.codecs import encode_vectors
from side_tuning.wire.frame import Frame, Part, SampleInfo, Tap, encode_frame
from side_tuning.wire.messages import CodecName
from side_tuning.wire.token_ids import TokenIds

GOLDEN = Path(__file__).parent / "golden"


def wave(rows: int, width: int, seed: int = 1) -> np.ndarray:
    """Values that do not depend on any random generator's version; exact in float32."""
    n = np.arange(1, rows * width + 1, dtype=np.int64)
    numbers = (n * n * n * 31 + n * n * 7919 * seed) % 1021
    return ((numbers - 510) / 256).astype(np.float32).reshape(rows, width)


def tap(layer: int, values: np.ndarray, codec: CodecName = "int4", group: int = 128, map_hash: str | None = None) -> Tap:
    rows, width = values.shape
    return Tap(layer, rows, width, codec, group, map_hash, encode_vectors(values, codec, group))


def pooled_frame() -> Frame:
    """Three samples, one of them without a label and one held out; a codec per layer."""
    return Frame(
        device="kitchen",
        spool="00112233445566ff",
        sequence=7,
        captured_at=1_700_000_000.25,
        backbone="ab" * 16,
        plan_version=3,
        mode="pooled",
        pooling="mean",
        produced=21,
        samples=(
            SampleInfo("0a" * 16, 4, "train", 11),
            SampleInfo("0b" * 16, None, "train", 5),
            SampleInfo("0c" * 16, 0, "held-out", 128),
        ),
        taps=(tap(1, wave(3, 12, 1), "fp16", 0), tap(2, wave(3, 12, 2), "int8", 8), tap(4, wave(3, 13, 3), "int2", 0)),
    )


def sequence_frame() -> Frame:
    """Two samples of three and two tokens, through a fixed map."""
    return Frame(
        device="porch.2",
        spool="aabbccddeeff0011",
        sequence=1,
        captured_at=1_700_000_001.0,
        backbone="cd" * 16,
        plan_version=1,
        mode="sequence",
        pooling="last",
        produced=2,
        samples=(SampleInfo("01", 1, "train", 3), SampleInfo("02", 2, "held-out", 2)),
        taps=(tap(3, wave(5, 8), "int4", 0, "ef" * 16), tap(6, np.zeros((5, 8), np.float32), "int4", 0, "ef" * 16)),
    )


def summary_frame() -> Frame:
    """The same two samples, each with a summary of two rows before its tokens."""
    return replace(sequence_frame(), summary_rows=2, taps=(tap(3, wave(9, 8), "int4", 0, "ef" * 16),))


def language_frame() -> Frame:
    """A text of three tokens and one of four whose first two rows are a prompt; the last layer's tap is wider and finer."""
    return replace(
        sequence_frame(),
        pooling="mean",
        samples=(SampleInfo("01", None, "train", 2), SampleInfo("02", None, "held-out", 3, supervised_from=1)),
        taps=(tap(3, wave(5, 8), "int4", 0, "ef" * 16), tap(6, wave(5, 16), "int8", 0, "ef" * 16)),
        token_ids=TokenIds.of([np.array([5, 6, 511]), np.array([1, 2, 3, 4])], 512),
    )


def regression_frame() -> Frame:
    first, second, third = pooled_frame().samples
    samples = (first._replace(label=None, target=2.5), second._replace(target=None), third._replace(label=None, target=-1.0))
    return replace(pooled_frame(), samples=samples)


def part() -> Part:
    return Part("kitchen", "00112233445566ff", sequence=9, first=7, index=2, count=4, samples=3, produced=21, data=b"a slice" * 5)


def large_frame(samples: int = 64) -> Frame:
    """What a device sends by default: 64 samples, three layers of width 384 in int4."""
    random = np.random.default_rng(0)
    infos = tuple(
        SampleInfo(f"{n:032x}", n % 6, "held-out" if n % 5 == 0 else "train", 10 + n % 20) for n in range(samples)
    )
    taps = tuple(tap(layer, random.standard_normal((samples, 384)).astype(np.float32)) for layer in (2, 4, 6))
    return Frame("kitchen", "00112233445566ff", 5, 1.7e9, "ab" * 16, 1, "pooled", "mean", samples, infos, taps)


# For lies: take a payload apart and seal it again with other fields, sizes and checksums made right unless stated.


def take_apart(payload: bytes) -> tuple[dict[str, Any], bytes]:
    end = 12 + int.from_bytes(payload[4:8], "little")
    return msgpack.unpackb(payload[12:end]), payload[end:]


def put_together(header: dict[str, Any] | bytes, body: bytes, **changes: Any) -> bytes:
    if isinstance(header, dict):
        header = {**header, "body_bytes": len(body), "body_crc32": zlib.crc32(body), **changes}
        header = msgpack.packb({name: value for name, value in header.items() if value is not ...})
    assert isinstance(header, bytes)
    return b"SFT1" + len(header).to_bytes(4, "little") + zlib.crc32(header).to_bytes(4, "little") + header + body


def changed(payload: bytes, **changes: Any) -> bytes:
    """`payload` with header fields changed, or left out where the value is `...`."""
    header, body = take_apart(payload)
    return put_together(header, body, **changes)


def changed_tap(payload: bytes, place: int, **changes: Any) -> bytes:
    header, body = take_apart(payload)
    header["taps"][place] = {**header["taps"][place], **changes}
    return put_together(header, body)


def changed_samples(payload: bytes, **changes: Any) -> bytes:
    header, body = take_apart(payload)
    header["samples"] = {**header["samples"], **changes}
    return put_together(header, body)


def frame_that_inflates(raw: bytes, *, stated: int | None = None, rows: int = 1, width: int = 8) -> bytes:
    """A frame with one fp16 tap whose lz4 body holds `raw`, whatever its header states."""
    header, _ = take_apart(encode_frame(pooled_frame()))
    header["samples"] = {"ids": [bytes([n // 256, n % 256]) for n in range(rows)], "labels": [0] * rows, "tokens": [1] * rows, "held_out": []}
    header["produced"] = rows
    header["taps"] = [{"layer": 1, "rows": rows, "width": width, "codec": "fp16", "group": 0, "map": None, "offset": 0}]
    header["compression"] = "lz4"
    header["raw_bytes"] = rows * width * 2 if stated is None else stated
    return put_together(header, lz4.frame.compress(raw, store_size=False))
