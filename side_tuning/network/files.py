"""Ladder and alignment as safetensors files, with the configuration as JSON in the metadata.

A file that a device fetches has its large matrices in a codec of `side_tuning.wire.codecs`, as bytes under the tensor's
own name; `precision` in the configuration says which. The other floats are rounded to float16's precision but keep their
range, so that the whole, deflated (RFC 1950) behind `DEFLATED`, is small. Without a precision all values are plain. Whoever must see what devices see loads the file, too: rounded weights are in no other place.

Nothing is built before the configuration is within bounds and every tensor's name, type and shape fits it; values
must be finite. The bytes may come from the network.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from side_tuning.network.alignment import Alignment
from side_tuning.network.anchor_map import AnchorMap
from side_tuning.network.language import (
    LanguageAlignment,
    LanguageAlignmentConfig,
    LanguageLadder,
    LanguageLadderConfig,
)
from side_tuning.network.side_network import SideNetwork, SideNetworkConfig
from side_tuning.wire.bounded import FrameError
from side_tuning.wire.codecs import decode_vectors, encode_vectors, encoded_bytes
from side_tuning.wire.messages import MAX_BLOB_BYTES, MAX_BLOCKS, MAX_LABELS, CodecName, Mode

DEFLATED = b"deflated"  # as the length of a safetensors header it would be far above the largest
MAX_HEADER_BYTES = 1 << 20
MAX_SIDE_WIDTH = 16_384
MAX_WIDTH_IN = 65_536
FEWEST_ENCODED = 1024  # values; below that a matrix is not worth a codec
GROUP = 128  # values of a row that share a scale
_STATISTICS = ("mean", "variance", "spread")  # of channels, whose sizes differ too much for a common scale
_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}

Network = TypeVar("Network", SideNetwork, Alignment, AnchorMap, LanguageLadder, LanguageAlignment)


class NetworkFileError(ValueError):
    """A ladder or alignment file that cannot be used; the text says why."""


def save_ladder(ladder: SideNetwork | LanguageLadder, path: Path | None = None, precision: CodecName | None = None) -> bytes:
    """The ladder as safetensors bytes, its matrices in `precision` if given; written to `path` too, if given."""
    kind = "language-ladder" if isinstance(ladder, LanguageLadder) else "ladder"
    return _save(ladder.state_dict(), {"kind": kind, **asdict(ladder.config)}, path, precision)


def save_alignment(
    alignment: Alignment | AnchorMap | LanguageAlignment, path: Path | None = None, precision: CodecName | None = None
) -> bytes:
    """The alignment, trained or fixed by anchors, as `save_ladder` does it."""
    kinds = {Alignment: "alignment", AnchorMap: "anchor-map", LanguageAlignment: "language-alignment"}
    kind = kinds[type(alignment)]
    return _save(alignment.state_dict(), {"kind": kind, **asdict(alignment.config)}, path, precision)


def load_ladder(source: Path | bytes) -> SideNetwork:
    """Inverse of `save_ladder`, ready for inference."""
    data, header, config = _open(source, ("ladder",))
    mode = config.get("mode")
    if mode not in get_args(Mode):
        raise NetworkFileError(f"ladder: mode is {mode!r:.80}, not one of {', '.join(get_args(Mode))}")
    dropout = _dropout(config)
    try:
        wanted = SideNetworkConfig(
            side_width=_whole(config, "side_width", MAX_SIDE_WIDTH),
            blocks=_whole(config, "blocks", MAX_BLOCKS),
            classes=_whole(config, "classes", MAX_LABELS),
            mode=cast("Mode", mode),
            heads=_whole(config, "heads", 256),
            expansion=_whole(config, "expansion", 64),
            dropout=dropout,
            entry_width=_whole({"entry_width": 0, **config}, "entry_width", MAX_WIDTH_IN, low=0),
            summary=_flag(config, "summary"),
            entry_summary_width=_whole({"entry_summary_width": 0, **config}, "entry_summary_width", MAX_WIDTH_IN, low=0),
        )
    except NetworkFileError:
        raise
    except ValueError as error:
        raise NetworkFileError(f"ladder: {error}") from error
    with torch.device("meta"):
        ladder = SideNetwork(wanted)
    return _fill(ladder, data, header, config)


def load_alignment(source: Path | bytes) -> Alignment | AnchorMap:
    """Inverse of `save_alignment`, ready for inference."""
    data, header, config = _open(source, ("alignment", "anchor-map"))
    width_in, blocks = _whole(config, "width_in", MAX_WIDTH_IN), _whole(config, "blocks", MAX_BLOCKS)
    config = {"summary_width": 0, "summary_width_out": 0, **config}
    summary_width = _whole(config, "summary_width", MAX_WIDTH_IN, low=0)
    least, most = (1, MAX_SIDE_WIDTH) if summary_width else (0, 0)
    of_summary = summary_width, _whole(config, "summary_width_out", most, low=least)
    if config["kind"] == "anchor-map":
        width_out = _whole(config, "width_out", MAX_SIDE_WIDTH)
        with torch.device("meta"):
            anchor_map = AnchorMap(width_in, width_out, blocks, *of_summary)
        return _fill(anchor_map, data, header, config)
    side_width = _whole(config, "side_width", MAX_SIDE_WIDTH)
    with torch.device("meta"):
        alignment = Alignment(width_in, side_width, blocks, *of_summary)
    return _fill(alignment, data, header, config)


def load_language_ladder(source: Path | bytes) -> LanguageLadder:
    """Inverse of `save_ladder` for a language model's, ready for inference."""
    data, header, config = _open(source, ("language-ladder",))
    dropout = _dropout(config)
    try:
        wanted = LanguageLadderConfig(
            side_width=_whole(config, "side_width", MAX_SIDE_WIDTH),
            blocks=_whole(config, "blocks", MAX_BLOCKS),
            heads=_whole(config, "heads", 256),
            expansion=_whole(config, "expansion", 64),
            dropout=dropout,
        )
    except NetworkFileError:
        raise
    except ValueError as error:
        raise NetworkFileError(f"language-ladder: {error}") from error
    with torch.device("meta"):
        ladder = LanguageLadder(wanted)
    return _fill(ladder, data, header, config)


def load_language_alignment(source: Path | bytes) -> LanguageAlignment:
    """Inverse of `save_alignment` for a language model's, ready for inference."""
    data, header, config = _open(source, ("language-alignment",))
    wanted = LanguageAlignmentConfig(
        width_in=_whole(config, "width_in", MAX_WIDTH_IN),
        token_width=_whole(config, "token_width", MAX_WIDTH_IN),
        width=_whole(config, "width", MAX_WIDTH_IN),
        side_width=_whole(config, "side_width", MAX_SIDE_WIDTH),
        blocks=_whole(config, "blocks", MAX_BLOCKS),
    )
    with torch.device("meta"):
        alignment = LanguageAlignment(wanted)
    return _fill(alignment, data, header, config)


def _save(state: Mapping[str, Tensor], config: dict[str, Any], path: Path | None, precision: CodecName | None) -> bytes:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    if precision is not None:
        config = {**config, "precision": precision}
        tensors = {name: _encoded(tensor, precision) if _is_encoded(name, tensor) else _rounded(tensor) for name, tensor in tensors.items()}
    data = save_tensors(tensors, {"config": json.dumps(config, sort_keys=True)})
    if precision is not None:
        data = DEFLATED + zlib.compress(data, 9)
    if path is not None:
        path.write_bytes(data)
    return data


def _open(source: Path | bytes, kinds: tuple[str, ...]) -> tuple[bytes, dict[str, Any], dict[str, Any]]:
    kind = " or ".join(kinds)
    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise NetworkFileError(f"{kind}: file {source!s} cannot be read: {error}") from error
    if data.startswith(DEFLATED):
        data = _inflated(data, kind)
    length = int.from_bytes(data[:8], "little")
    if len(data) > MAX_BLOB_BYTES or len(data) < 8 or length > min(len(data) - 8, MAX_HEADER_BYTES):
        raise NetworkFileError(f"{kind}: {len(data)} bytes are no safetensors file")
    try:
        header = json.loads(data[8 : 8 + length])
        config = json.loads(header.pop("__metadata__")["config"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise NetworkFileError(f"{kind}: the safetensors header holds no readable configuration") from error
    if not isinstance(config, dict) or config.get("kind") not in kinds:
        raise NetworkFileError(f"{kind}: the file does not say that it holds the kind '{kind}'")
    return data, header, config


def _inflated(data: bytes, kind: str) -> bytes:
    engine = zlib.decompressobj()
    try:
        plain = engine.decompress(data[len(DEFLATED) :], MAX_BLOB_BYTES)
    except zlib.error as error:
        raise NetworkFileError(f"{kind}: damaged deflated file: {error}") from error
    if not engine.eof or engine.unused_data:
        raise NetworkFileError(f"{kind}: the deflated file is cut off, has something behind its end, or holds more than {MAX_BLOB_BYTES} bytes")
    return plain


def _whole(config: dict[str, Any], name: str, high: int, *, low: int = 1) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise NetworkFileError(f"{config['kind']}: {name} is {value!r:.80}, not a whole number from {low} to {high}")
    return value


def _flag(config: dict[str, Any], name: str) -> bool:
    value = config.get(name, False)
    if not isinstance(value, bool):
        raise NetworkFileError(f"{config['kind']}: {name} is {value!r:.80}, not true or false")
    return value


def _dropout(config: dict[str, Any]) -> float:
    dropout = config.get("dropout")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0.0 <= dropout < 1.0:
        raise NetworkFileError(f"{config['kind']}: dropout is {dropout!r:.80}, not a number from 0 to below 1")
    return float(dropout)


def _is_encoded(name: str, tensor: Tensor) -> bool:
    large = tensor.dim() >= 2 and tensor.numel() >= FEWEST_ENCODED and tensor.is_floating_point()
    return large and name.rpartition(".")[2] not in _STATISTICS


def _encoded(tensor: Tensor, precision: CodecName) -> Tensor:
    rows = tensor.reshape(-1, tensor.shape[-1]).float().numpy()
    return torch.frombuffer(bytearray(encode_vectors(rows, precision, GROUP)), dtype=torch.uint8)


def _rounded(tensor: Tensor) -> Tensor:
    """Floats with the last 12 of their 23 bits zero, to the nearest."""
    if tensor.dtype != torch.float32:
        return tensor
    bits = tensor.view(torch.int32)
    return ((bits + 0x800) & ~0xFFF).view(torch.float32)


def _decoded(found: Tensor, wanted: Tensor, precision: CodecName) -> Tensor:
    width = wanted.shape[-1]
    values = decode_vectors(found.numpy().tobytes(), wanted.numel() // width, width, precision, GROUP)
    return torch.from_numpy(values).reshape(wanted.shape).to(wanted.dtype)


def _fill(network: Network, data: bytes, header: dict[str, Any], config: dict[str, Any]) -> Network:
    kind, precision = config["kind"], config.get("precision")
    if precision is not None and precision not in get_args(CodecName):
        raise NetworkFileError(f"{kind}: precision {precision!r:.80} is not one of {', '.join(get_args(CodecName))}; update this program")
    wanted = network.state_dict()
    if set(header) != set(wanted):
        odd = sorted(set(header) ^ set(wanted))[:3]
        raise NetworkFileError(f"{kind}: tensors do not fit the configuration: {', '.join(odd)} missing or not wanted")
    encoded: dict[str, CodecName] = {}
    if precision is not None:
        encoded = {name: precision for name, tensor in wanted.items() if _is_encoded(name, tensor)}
    for name, tensor in wanted.items():
        entry = header[name] if isinstance(header[name], dict) else {}
        found = (entry.get("dtype"), entry.get("shape"))
        expected = (_TYPES[tensor.dtype], list(tensor.shape))
        if name in encoded:
            width = tensor.shape[-1]
            expected = ("U8", [encoded_bytes(tensor.numel() // width, width, encoded[name], GROUP)])
        if found != expected:
            raise NetworkFileError(f"{kind}: tensor {name} is {found!r:.120}, wanted {expected[0]} {expected[1]}")
    try:
        tensors = load_tensors(data)
    except Exception as error:  # SafetensorError is not exported as a type
        raise NetworkFileError(f"{kind}: damaged safetensors file: {error}") from error
    for name, codec in encoded.items():
        try:
            tensors[name] = _decoded(tensors[name], wanted[name], codec)
        except FrameError as error:
            raise NetworkFileError(f"{kind}: tensor {name}: {error}") from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise NetworkFileError(f"{kind}: tensor {name} holds values that are not finite")
    for name, tensor in tensors.items():
        if name.endswith("variance") and (tensor < 0).any():
            raise NetworkFileError(f"{kind}: a variance is negative")
        if name.endswith("spread") and not (tensor > 0).all():
            raise NetworkFileError(f"{kind}: a spread is not above zero")
    network.load_state_dict(tensors, assign=True)
    return network.eval()
