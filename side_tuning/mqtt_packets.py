"""The few MQTT packets that are written by hand, where a client library's call for each message costs too much."""

from __future__ import annotations

import struct

PUBLISH, PUBACK = 0x30, 0x40
_RETAIN = 0x01


def variable_length(size: int) -> bytes:
    """MQTT's variable byte integer."""
    out = bytearray()
    while True:
        size, digit = divmod(size, 128)
        out.append(digit | (0x80 if size else 0))
        if not size:
            return bytes(out)


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("!H", len(data)) + data


def packet(kind: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return bytes([kind]) + variable_length(len(body)) + body


def puback_packet(mid: int) -> bytes:
    return struct.pack("!BBH", PUBACK, 2, mid)


def publish_packet(topic: str, payload: bytes, *, retain: bool, five: bool) -> bytes:
    """A message of QoS 0; `five`: for MQTT 5, whose packets carry properties (here: none)."""
    return packet(PUBLISH | (_RETAIN if retain else 0), text(topic), b"\x00" if five else b"", payload)
