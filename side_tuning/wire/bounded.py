"""Bounded msgpack: the only way bytes from the network become Python objects.

Rules: size is checked first, depth and counts are capped, extension types are refused, every failure is a
`FrameError`. The unpacker is one-shot: a re-used one was CVE-2026-57585.
"""

from __future__ import annotations

from typing import Any, NoReturn

import msgpack


class FrameError(ValueError):
    """Bytes from the network that cannot be accepted; the text says which value and why."""


def _refuse_extension(code: int, _data: bytes) -> NoReturn:
    raise FrameError(f"msgpack extension type {code} is not allowed")


def unpack_bounded(data: bytes, *, max_bytes: int, max_items: int = 4096, max_text_bytes: int = 65_536) -> Any:
    """Decode one msgpack object of at most `max_bytes`.

    Args:
        data: the encoded object, nothing before or after it.
        max_bytes: refuse longer input before looking at it.
        max_items: cap on the entries of each array or map.
        max_text_bytes: cap on each string or binary.

    Raises:
        FrameError: too long, truncated, trailing bytes, too deep, extension types, or caps exceeded.
    """
    if len(data) > max_bytes:
        raise FrameError(f"{len(data)} bytes of msgpack, more than the limit of {max_bytes}")
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            use_list=True,
            strict_map_key=True,
            ext_hook=_refuse_extension,
            max_array_len=max_items,
            max_map_len=max_items,
            max_str_len=max_text_bytes,
            max_bin_len=max(max_bytes, 1),
            max_ext_len=0,
        )
    except FrameError:
        raise
    except Exception as error:  # msgpack raises many unrelated types (StackError, ValueError, ExtraData ...)
        raise FrameError(f"malformed msgpack: {type(error).__name__}: {error}") from error
