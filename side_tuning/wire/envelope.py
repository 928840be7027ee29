"""The outside of a frame: magic "SFT1" | u32 header bytes | u32 crc32 of the header | msgpack header | body.

Little-endian. The body is lz4 (frame format, one layer) or raw, as the header says; the header also states its size
and crc32 as it travels and its size when inflated.
Rules: a size is checked before memory is allocated for it; unknown header fields are ignored, an unknown version is
refused; any flipped or missing byte is found; whatever cannot be accepted is a `FrameError`.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any, Literal

import lz4.frame
import msgpack

from side_tuning.wire.bounded import FrameError, unpack_bounded
from side_tuning.wire.messages import Fields

Compression = Literal["lz4", "none"]

MAX_HEADER_BYTES = 65_536
MAX_BODY_BYTES = 16 * 1024 * 1024
_MAGIC = b"SFT"
_VERSION = b"1"
_PREFIX = struct.Struct("<4sII")  # magic with version, header bytes, crc32 of the header
_LZ4_MAX_RATIO = 255  # one byte of lz4 stands for at most 255
MAX_PAYLOAD_BYTES = _PREFIX.size + MAX_HEADER_BYTES + MAX_BODY_BYTES


def compress(raw: bytes) -> tuple[Compression, bytes]:
    """The body as it shall travel: lz4, or raw where lz4 does not make it smaller (4-bit codes seldom shrink)."""
    compressed: bytes = lz4.frame.compress(raw, store_size=False)
    return ("lz4", compressed) if len(compressed) < len(raw) else ("none", raw)


def seal(header: dict[str, Any], body: bytes) -> bytes:
    """A payload from header fields and the body as it shall travel."""
    packed: bytes = msgpack.packb({**header, "body_bytes": len(body), "body_crc32": zlib.crc32(body)})
    if len(packed) > MAX_HEADER_BYTES:
        raise FrameError(f"header takes {len(packed)} bytes, the limit is {MAX_HEADER_BYTES}; put fewer samples in a frame")
    return _PREFIX.pack(_MAGIC + _VERSION, len(packed), zlib.crc32(packed)) + packed + body


def read_header(payload: bytes) -> tuple[Fields, int]:
    """The header and where the body starts; does not look at the body."""
    if len(payload) < _PREFIX.size:
        raise FrameError(f"frame: {len(payload)} bytes are too few for a frame")
    magic, header_bytes, header_crc32 = _PREFIX.unpack_from(payload)
    if magic[:3] != _MAGIC:
        raise FrameError(f"frame: starts with {magic!r}, not with {_MAGIC + _VERSION!r}")
    if magic[3:] != _VERSION:
        raise FrameError(f"frame: version {magic[3:]!r} is unknown here, this program reads {_VERSION!r}; update it")
    if header_bytes > MAX_HEADER_BYTES:
        raise FrameError(f"frame: header of {header_bytes} bytes, the limit is {MAX_HEADER_BYTES}")
    start = _PREFIX.size + header_bytes
    if start > len(payload):
        raise FrameError(f"frame: cut off at {len(payload)} bytes, inside a header that ends at {start}")
    packed = payload[_PREFIX.size : start]
    if zlib.crc32(packed) != header_crc32:
        raise FrameError("frame: the header does not match its crc32; it was damaged on the way")
    return Fields(unpack_bounded(packed, max_bytes=MAX_HEADER_BYTES), "frame"), start


def open_envelope(payload: bytes, max_body_bytes: int) -> tuple[Fields, memoryview]:
    """The header, and the body as it travelled, complete and undamaged."""
    fields, start = read_header(payload)
    body = memoryview(payload)[start:]
    if len(body) > max_body_bytes:
        raise FrameError(f"frame: body of {len(body)} bytes, the limit is {max_body_bytes}")
    stated = fields.integer("body_bytes", 0, 2**32)
    if stated != len(body):
        raise FrameError(f"frame: the header states a body of {stated} bytes, {len(body)} follow it")
    if zlib.crc32(body) != fields.integer("body_crc32", 0, 2**32 - 1):
        raise FrameError("frame: the body does not match its crc32; it was damaged on the way")
    return fields, body


def inflate(fields: Fields, body: memoryview, needed_bytes: int, max_body_bytes: int) -> bytes:
    """The raw body, which must be what the taps need; never takes more memory than the limit allows."""
    raw_bytes = fields.integer("raw_bytes", 0, 2**63)
    if raw_bytes > max_body_bytes:
        raise FrameError(f"frame: body inflates to {raw_bytes} bytes, the limit is {max_body_bytes}")
    if raw_bytes != needed_bytes:
        raise FrameError(f"frame: body inflates to {raw_bytes} bytes, its taps need {needed_bytes}")
    if fields.choice("compression", ("lz4", "none")) == "none":
        if raw_bytes != len(body):
            raise FrameError(f"frame: raw body of {len(body)} bytes, the header states {raw_bytes}")
        return bytes(body)
    if raw_bytes > _LZ4_MAX_RATIO * len(body):
        raise FrameError(f"frame: {len(body)} bytes of lz4 cannot hold the {raw_bytes} that the header states")
    decompressor = lz4.frame.LZ4FrameDecompressor()
    try:  # one byte of room more than stated shows a body that inflates further
        raw: bytes = decompressor.decompress(body, max_length=raw_bytes + 1)
    except RuntimeError as error:
        raise FrameError(f"frame: malformed lz4 body: {error}") from error
    if len(raw) > raw_bytes:
        raise FrameError(f"frame: body inflates past the {raw_bytes} bytes that the header states")
    if len(raw) < raw_bytes or not decompressor.eof or decompressor.unused_data:
        raise FrameError(f"frame: lz4 body ends early or has bytes after its end ({len(raw)} of {raw_bytes} bytes inflated)")
    return raw
