"""A frame: one published message with the encoded taps of several samples, or a part of one that is too large.

The bytes are laid out in `envelope.py`; this module says what a header means. Sizes and counts that a header states
must all agree with each other and with the body. The bytes spooled are the bytes published are the bytes stored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

from side_tuning.wire.bounded import FrameError
from side_tuning.wire.codecs import MAX_GROUP, MAX_WIDTH, check_vectors, encoded_bytes
from side_tuning.wire.envelope import (
    MAX_BODY_BYTES,
    MAX_PAYLOAD_BYTES,
    compress,
    inflate,
    open_envelope,
    read_header,
    seal,
)
from side_tuning.wire.messages import (
    MAX_BLOCKS,
    MAX_LABELS,
    CodecName,
    Fields,
    Mode,
    Pooling,
    check_fingerprint,
)
from side_tuning.wire.token_ids import TokenIds
from side_tuning.wire.topics import check_device_name

Split = Literal["train", "held-out"]

MAX_SAMPLES = 4096
MAX_TOKENS = 1_000_000
MAX_PARTS = 65_535
LARGEST_TARGET = 1e6
MIN_PART_BYTES = 1024  # room for the header of a part with the longest names
_MAX_COUNT = 2**53  # the largest whole number that every language and JSON keeps exactly
_SPLITS, _CODEC_NAMES, _MODES, _POOLINGS = map(get_args, (Split, CodecName, Mode, Pooling))
_SPOOL = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SAMPLE_ID = re.compile(r"([0-9a-f]{2}){1,32}")


class SampleInfo(NamedTuple):
    """What a frame says of one sample; `id` is 2 to 64 lower-case hexadecimal digits, an even number of them."""

    id: str
    label: int | None
    split: Split
    tokens: int  # `sequence` mode: rows of this sample in every tap, its summary's not counted; `pooled` mode: real tokens, for information
    target: float | None = None  # `regression`
    supervised_from: int = 0  # `causal-lm`: the first of its rows whose next token the loss sits on; all after it are too


@dataclass(frozen=True)
class Tap:
    """The vectors of one layer (1-based), all samples below each other."""

    layer: int
    rows: int  # `pooled` mode: one per sample; `sequence` mode: one per real token, and each sample's summary before its tokens
    width: int
    codec: CodecName
    group: int
    map: str | None  # hash of the fixed low-rank map that the vectors went through
    data: bytes


@dataclass(frozen=True)
class Frame:
    """Samples of one device with their taps. (device, spool, sequence) identifies it; sequences start at 1."""

    device: str
    spool: str
    sequence: int
    captured_at: float
    backbone: str  # fingerprint
    plan_version: int
    mode: Mode
    pooling: Pooling
    produced: int  # samples that this spool has produced so far, this frame's included (loss ledger)
    samples: tuple[SampleInfo, ...]
    taps: tuple[Tap, ...]
    token_ids: TokenIds | None = None  # `causal-lm`: what stood at each row, and the token after the last
    summary_rows: int = 0  # `sequence` mode: rows that the summary of each sample takes


@dataclass(frozen=True)
class Part:
    """A slice of the payload of a frame that was too large; part `index` has sequence `first` + `index`."""

    device: str
    spool: str
    sequence: int
    first: int
    index: int
    count: int
    samples: int  # in the whole frame
    produced: int
    data: bytes


@dataclass(frozen=True)
class Identity:
    """What names a frame or part for receipts."""

    device: str
    spool: str
    sequence: int


def encode_frame(frame: Frame) -> bytes:
    """The payload of `frame`; refuses with `FrameError` whatever `decode_frame` would refuse."""
    raw = b"".join(tap.data for tap in frame.taps) + (frame.token_ids.data if frame.token_ids else b"")
    if len(raw) > MAX_BODY_BYTES:
        raise FrameError(f"the taps take {len(raw)} bytes, a frame holds {MAX_BODY_BYTES}; put fewer samples in it")
    compression, body = compress(raw)
    header = {
        "kind": "frame",
        "device": frame.device,
        "spool": frame.spool,
        "sequence": int(frame.sequence),
        "captured_at": float(frame.captured_at),
        "backbone": frame.backbone,
        "plan": int(frame.plan_version),
        "mode": frame.mode,
        "pooling": frame.pooling,
        "produced": int(frame.produced),
        "samples": _samples_to_header(frame.samples),
        "taps": _taps_to_header(frame.taps),
        "raw_bytes": len(raw),
        "compression": compression,
    }
    if frame.token_ids:
        header["token_bytes"] = frame.token_ids.bytes_each
    if frame.summary_rows:
        header["summary_rows"] = int(frame.summary_rows)
    fields = Fields(header, "frame")
    _read_frame(fields, _read_tap_headers(fields), raw)  # a device must not spool what the coordinator would refuse
    return seal(header, body)


def decode_frame(payload: bytes, *, max_body_bytes: int = MAX_BODY_BYTES) -> Frame:
    """Inverse of `encode_frame`; the vectors of an accepted frame decode to finite values of the stated shapes."""
    frame = decode(payload, max_body_bytes=max_body_bytes)
    if isinstance(frame, Part):
        raise FrameError(f"part: {frame.index} of {frame.count} is not a whole frame; join the parts first")
    return frame


def decode(payload: bytes, *, max_body_bytes: int = MAX_BODY_BYTES) -> Frame | Part:
    """What the gateway calls: a frame or a part of one."""
    fields, body = open_envelope(payload, max_body_bytes)
    if fields.choice("kind", ("frame", "part")) == "part":
        return _read_part(fields, body)
    taps = _read_tap_headers(fields)
    needed = sum(tap.size for tap in taps)
    if each := _token_bytes(fields):
        needed += each * sum(sample.tokens + 1 for sample in _read_samples(fields))
    return _read_frame(fields, taps, inflate(fields, body, needed, max_body_bytes))


def read_identity(payload: bytes) -> Identity | None:
    """Who sent this, from the header alone; None if the header is unreadable. Never raises.

    Lets a frame with a damaged body be rejected by name, so that its device gets a receipt and goes on.
    """
    try:
        return _identity(read_header(payload)[0])
    except FrameError:
        return None


def split_frame(payload: bytes, part_bytes: int) -> list[bytes]:
    """Parts of at most `part_bytes` each for a frame that is larger; a frame that fits comes back alone.

    The parts take the sequences s, s+1, ... where s is the sequence of the frame itself.
    """
    if len(payload) <= part_bytes:
        return [payload]
    if part_bytes < MIN_PART_BYTES:
        raise FrameError(f"parts of {part_bytes} bytes are too small, use at least {MIN_PART_BYTES}")
    fields, _body = open_envelope(payload, MAX_BODY_BYTES)
    whole = _identity(fields)
    samples = len(_read_samples(fields))
    produced = fields.integer("produced", 0, _MAX_COUNT)

    def part(index: int, count: int, data: bytes) -> bytes:
        header = {
            "kind": "part",
            "device": whole.device,
            "spool": whole.spool,
            "sequence": whole.sequence + index,
            "first": whole.sequence,
            "index": index,
            "count": count,
            "samples": samples,
            "produced": produced,
        }
        return seal(header, data)

    room = part_bytes - len(part(MAX_PARTS, MAX_PARTS, b"")) - 8  # a real body's size and crc32 take up to 4 bytes more each
    count = -(-len(payload) // room)
    if count > MAX_PARTS:
        raise FrameError(f"{len(payload)} bytes make {count} parts of {part_bytes}; the limit is {MAX_PARTS}, use larger parts")
    return [part(index, count, payload[index * room : (index + 1) * room]) for index in range(count)]


def join_parts(parts: Sequence[Part]) -> bytes:
    """The payload of the whole frame, from its parts in any order; `FrameError` if they do not make one frame."""
    if not parts:
        raise FrameError("part: no parts to join")
    ordered = sorted(parts, key=lambda part: part.index)
    first = ordered[0]
    for part in ordered:
        if _whole(part) != _whole(first):
            raise FrameError(f"part: {part.index} is of {_whole(part)}, {first.index} is of {_whole(first)}")
    indexes = [part.index for part in ordered]
    if indexes != list(range(first.count)):
        raise FrameError(f"part: have {len(indexes)} parts of {first.count}, each is needed exactly once")
    total = sum(len(part.data) for part in ordered)
    if total > MAX_PAYLOAD_BYTES:
        raise FrameError(f"part: {total} bytes together, more than a frame may have")
    payload = b"".join(part.data for part in ordered)
    fields = read_header(payload)[0]
    samples, produced = len(_read_samples(fields)), fields.integer("produced", 0, _MAX_COUNT)
    if _identity(fields) != Identity(first.device, first.spool, first.first):
        raise FrameError(f"part: the parts are of frame {first.first} of {first.device}, they contain {_identity(fields)}")
    if (samples, produced) != (first.samples, first.produced):
        raise FrameError(f"part: the parts state {first.samples} samples, the frame has {samples}, or `produced` differs")
    return payload


def _whole(part: Part) -> tuple[str, str, int, int, int, int]:
    return part.device, part.spool, part.first, part.count, part.samples, part.produced


def _identity(fields: Fields) -> Identity:
    spool = fields.text("spool", 64)
    if not _SPOOL.fullmatch(spool):
        raise FrameError(f"frame: spool {spool!r} is not 1 to 64 letters, digits, '_' or '-'")
    device = check_device_name(fields.text("device", 64))
    return Identity(device, spool, fields.integer("sequence", 1, _MAX_COUNT))


# Header fields <-> frame.


def _samples_to_header(samples: Sequence[SampleInfo]) -> dict[str, Any]:
    """By column, hexadecimal ids as bytes: a quarter of the bytes of a list of maps."""
    for sample in samples:
        if not _SAMPLE_ID.fullmatch(sample.id):
            raise FrameError(f"sample id {sample.id[:80]!r} is not an even number of hexadecimal digits, 2 to 64, lower-case")
        if sample.split not in _SPLITS:
            raise FrameError(f"sample {sample.id}: split {sample.split!r:.40} is not one of {', '.join(_SPLITS)}")
    columns: dict[str, Any] = {
        "ids": [bytes.fromhex(sample.id) for sample in samples],
        "labels": [None if sample.label is None else int(sample.label) for sample in samples],
        "tokens": [int(sample.tokens) for sample in samples],
        "held_out": [place for place, sample in enumerate(samples) if sample.split == "held-out"],
    }
    if any(sample.target is not None for sample in samples):
        columns["targets"] = [None if sample.target is None else float(sample.target) for sample in samples]
    if any(sample.supervised_from for sample in samples):
        columns["supervised_from"] = [int(sample.supervised_from) for sample in samples]
    return columns


def _read_samples(fields: Fields) -> tuple[SampleInfo, ...]:
    columns = fields.inner("samples")
    ids, labels, tokens = (columns.items(name, MAX_SAMPLES) for name in ("ids", "labels", "tokens"))
    held_out = columns.items("held_out", MAX_SAMPLES)
    if not ids or not len(ids) == len(labels) == len(tokens):
        raise FrameError(f"frame: {len(ids)} sample ids, {len(labels)} labels and {len(tokens)} token counts, not one of each per sample")
    # Whole columns at once: this is most of what a gateway does with a frame.
    if set(map(type, ids)) != {bytes} or not 1 <= min(map(len, ids)) <= max(map(len, ids)) <= 32:
        raise FrameError("frame: a sample id is not 1 to 32 bytes")
    if len(set(ids)) != len(ids):
        raise FrameError("frame: a sample id comes up twice")
    if not _are_counts([label for label in labels if label is not None], MAX_LABELS - 1):
        raise FrameError(f"frame: a label is neither empty nor a whole number from 0 to {MAX_LABELS - 1}")
    if not _are_counts(tokens, MAX_TOKENS):
        raise FrameError(f"frame: a token count is not a whole number from 0 to {MAX_TOKENS}")
    if not _are_counts(held_out, len(ids) - 1) or len(set(held_out)) != len(held_out):
        raise FrameError("frame: held_out does not name samples of this frame, each once")
    splits: list[Split] = ["train"] * len(ids)
    for place in held_out:
        splits[place] = "held-out"
    if "targets" not in columns and "supervised_from" not in columns:
        return tuple(map(SampleInfo, map(bytes.hex, ids), labels, splits, tokens))
    targets = columns.items("targets", MAX_SAMPLES, [None] * len(ids))
    supervised_from = columns.items("supervised_from", MAX_SAMPLES, [0] * len(ids))
    if not len(ids) == len(targets) == len(supervised_from):
        raise FrameError(f"frame: {len(ids)} samples, {len(targets)} targets and {len(supervised_from)} supervised_from, not one of each per sample")
    if not all(target is None or (type(target) is float and abs(target) <= LARGEST_TARGET) for target in targets):
        raise FrameError(f"frame: a target is neither empty nor a number from {-LARGEST_TARGET:g} to {LARGEST_TARGET:g}")
    if not _are_counts(supervised_from, MAX_TOKENS) or any(first >= max(rows, 1) for first, rows in zip(supervised_from, tokens, strict=True)):
        raise FrameError("frame: a supervised_from is not a whole number below its sample's tokens")
    return tuple(map(SampleInfo, map(bytes.hex, ids), labels, splits, tokens, targets, supervised_from))


def _are_counts(values: Sequence[Any], largest: int) -> bool:
    """All of them whole numbers (no truth values) from 0 to `largest`."""
    return not values or (set(map(type, values)) == {int} and min(values) >= 0 and max(values) <= largest)


def _taps_to_header(taps: Sequence[Tap]) -> list[dict[str, Any]]:
    described = []
    offset = 0
    for tap in taps:
        if len(tap.data) != (needed := encoded_bytes(tap.rows, tap.width, tap.codec, tap.group)):
            raise FrameError(f"layer {tap.layer}: {len(tap.data)} bytes for {tap.rows} x {tap.width} values in {tap.codec}, not {needed}")
        described.append(
            {
                "layer": int(tap.layer),
                "rows": int(tap.rows),
                "width": int(tap.width),
                "codec": tap.codec,
                "group": int(tap.group),
                "map": tap.map,
                "offset": offset,
            }
        )
        offset += len(tap.data)
    return described


@dataclass(frozen=True)
class _TapHeader:
    layer: int
    rows: int
    width: int
    codec: CodecName
    group: int
    map: str | None
    offset: int
    size: int


def _read_tap_headers(fields: Fields) -> list[_TapHeader]:
    taps = []
    for body in fields.items("taps", MAX_BLOCKS):
        tap = Fields(body, "frame.taps")
        rows, width = tap.integer("rows", 1, 2**31), tap.integer("width", 1, MAX_WIDTH)
        codec, group = tap.choice("codec", _CODEC_NAMES), tap.integer("group", 0, MAX_GROUP)
        map_hash = tap.optional_text("map", 64)
        if map_hash is not None:
            check_fingerprint(map_hash)
        offset = tap.integer("offset", 0, 2**63)
        layer = tap.integer("layer", 1, 1024)
        taps.append(_TapHeader(layer, rows, width, codec, group, map_hash, offset, encoded_bytes(rows, width, codec, group)))
    return taps


def _read_frame(fields: Fields, headers: Sequence[_TapHeader], raw: bytes) -> Frame:
    """Every field, and that the samples, the shapes and the body agree with each other."""
    identity = _identity(fields)
    samples = _read_samples(fields)
    mode: Mode = fields.choice("mode", _MODES)
    if mode == "sequence" and (empty := [sample.id for sample in samples if sample.tokens == 0]):
        raise FrameError(f"frame: sample {empty[0]} has no tokens in sequence mode")
    summary_rows = fields.integer("summary_rows", 0, MAX_WIDTH, 0)
    if summary_rows and mode != "sequence":
        raise FrameError(f"frame: {summary_rows} rows of a summary in {mode} mode")
    rows = len(samples) if mode == "pooled" else sum(sample.tokens + summary_rows for sample in samples)
    taps = []
    end, last_layer = 0, 0
    for tap in headers:
        if tap.rows != rows:
            raise FrameError(f"frame: layer {tap.layer} has {tap.rows} vectors, its {len(samples)} samples make {rows} in {mode} mode")
        if tap.layer <= last_layer:
            raise FrameError(f"frame: layer {tap.layer} follows layer {last_layer}; layers must ascend")
        if tap.offset != end:
            raise FrameError(f"frame: layer {tap.layer} starts at byte {tap.offset}, the one before ends at {end}")
        end, last_layer = tap.offset + tap.size, tap.layer
        if end > len(raw):
            raise FrameError(f"frame: layer {tap.layer} ends at byte {end} of a body of {len(raw)}")
        data = raw[tap.offset : end]
        try:
            check_vectors(data, tap.rows, tap.width, tap.codec, tap.group)
        except FrameError as error:
            raise FrameError(f"frame: layer {tap.layer}: {error}") from error
        taps.append(Tap(tap.layer, tap.rows, tap.width, tap.codec, tap.group, tap.map, data))
    if not taps:
        raise FrameError("frame: no taps")
    token_ids = None
    if each := _token_bytes(fields):
        if mode != "sequence":
            raise FrameError(f"frame: token ids in {mode} mode")
        if len(raw) - end != each * (rows + len(samples)):
            raise FrameError(f"frame: {len(raw) - end} bytes of token ids, its {rows} rows and {len(samples)} samples make {each * (rows + len(samples))}")
        token_ids = TokenIds(each, raw[end:])
        end = len(raw)
    if end != len(raw):
        raise FrameError(f"frame: the taps end at byte {end} of a body of {len(raw)}")
    return Frame(
        device=identity.device,
        spool=identity.spool,
        sequence=identity.sequence,
        captured_at=fields.number("captured_at", 0.0, 1e12),
        backbone=check_fingerprint(fields.text("backbone", 64)),
        plan_version=fields.integer("plan", 1, _MAX_COUNT),
        mode=mode,
        pooling=fields.choice("pooling", _POOLINGS),
        produced=fields.integer("produced", len(samples), _MAX_COUNT),
        samples=samples,
        taps=tuple(taps),
        token_ids=token_ids,
        summary_rows=summary_rows,
    )


def _token_bytes(fields: Fields) -> Literal[0, 2, 4]:
    each = fields.integer("token_bytes", 0, 4, 0)
    if each not in (0, 2, 4):
        raise FrameError(f"frame: token ids of {each} bytes, not 2 or 4")
    return cast("Literal[0, 2, 4]", each)


def _read_part(fields: Fields, body: memoryview) -> Part:
    identity = _identity(fields)
    count = fields.integer("count", 2, MAX_PARTS)
    part = Part(
        device=identity.device,
        spool=identity.spool,
        sequence=identity.sequence,
        first=fields.integer("first", 1, _MAX_COUNT),
        index=fields.integer("index", 0, count - 1),
        count=count,
        samples=fields.integer("samples", 1, MAX_SAMPLES),
        produced=fields.integer("produced", 1, _MAX_COUNT),
        data=bytes(body),
    )
    if part.sequence != part.first + part.index:
        raise FrameError(f"part: {part.index} of a frame that starts at {part.first} cannot have sequence {part.sequence}")
    if not part.data:
        raise FrameError(f"part: {part.index} of {part.count} is empty")
    return part
