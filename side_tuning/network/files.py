"""Ladder and alignment as safetensors files, with the configuration as JSON in the metadata.

Nothing is built before the configuration is within bounds and every tensor's name, type and shape fits it; values
must be finite. The bytes may come from the network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from side_tuning.network.alignment import Alignment, AlignmentConfig
from side_tuning.network.anchor_map import AnchorMap
from side_tuning.network.side_network import SideNetwork, SideNetworkConfig
from side_tuning.wire.messages import MAX_BLOB_BYTES, MAX_BLOCKS, MAX_LABELS, Mode

MAX_HEADER_BYTES = 1 << 20
MAX_SIDE_WIDTH = 16_384
MAX_WIDTH_IN = 65_536
_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}

Network = TypeVar("Network", SideNetwork, Alignment, AnchorMap)


class NetworkFileError(ValueError):
    """A ladder or alignment file that cannot be used; the text says why."""


def save_ladder(ladder: SideNetwork, path: Path | None = None) -> bytes:
    """The ladder as safetensors bytes; written to `path` too, if given."""
    return _save(ladder.state_dict(), {"kind": "ladder", **asdict(ladder.config)}, path)


def save_alignment(alignment: Alignment | AnchorMap, path: Path | None = None) -> bytes:
    """The alignment, trained or fixed by anchors, as safetensors bytes; written to `path` too, if given."""
    kind = "anchor-map" if isinstance(alignment, AnchorMap) else "alignment"
    return _save(alignment.state_dict(), {"kind": kind, **asdict(alignment.config)}, path)


def load_ladder(source: Path | bytes) -> SideNetwork:
    """Inverse of `save_ladder`, ready for inference."""
    data, header, config = _open(source, ("ladder",))
    mode = config.get("mode")
    if mode not in get_args(Mode):
        raise NetworkFileError(f"ladder: mode is {mode!r:.80}, not one of {', '.join(get_args(Mode))}")
    dropout = config.get("dropout")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0.0 <= dropout < 1.0:
        raise NetworkFileError(f"ladder: dropout is {dropout!r:.80}, not a number from 0 to below 1")
    try:
        wanted = SideNetworkConfig(
            side_width=_whole(config, "side_width", MAX_SIDE_WIDTH),
            blocks=_whole(config, "blocks", MAX_BLOCKS),
            classes=_whole(config, "classes", MAX_LABELS),
            mode=cast("Mode", mode),
            heads=_whole(config, "heads", 256),
            expansion=_whole(config, "expansion", 64),
            dropout=float(dropout),
            entry_width=_whole({"entry_width": 0, **config}, "entry_width", MAX_WIDTH_IN, low=0),
        )
    except NetworkFileError:
        raise
    except ValueError as error:
        raise NetworkFileError(f"ladder: {error}") from error
    with torch.device("meta"):
        ladder = SideNetwork(wanted)
    return _fill(ladder, data, header, "ladder")


def load_alignment(source: Path | bytes) -> Alignment | AnchorMap:
    """Inverse of `save_alignment`, ready for inference."""
    data, header, config = _open(source, ("alignment", "anchor-map"))
    width_in, blocks = _whole(config, "width_in", MAX_WIDTH_IN), _whole(config, "blocks", MAX_BLOCKS)
    if config["kind"] == "anchor-map":
        width_out = _whole(config, "width_out", MAX_SIDE_WIDTH)
        with torch.device("meta"):
            anchor_map = AnchorMap(width_in, width_out, blocks)
        return _fill(anchor_map, data, header, "anchor-map")
    wanted = AlignmentConfig(width_in, _whole(config, "side_width", MAX_SIDE_WIDTH), blocks)
    with torch.device("meta"):
        alignment = Alignment(wanted.width_in, wanted.side_width, wanted.blocks)
    return _fill(alignment, data, header, "alignment")


def _save(state: Mapping[str, Tensor], config: dict[str, Any], path: Path | None) -> bytes:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    data = save_tensors(tensors, {"config": json.dumps(config, sort_keys=True)})
    if path is not None:
        path.write_bytes(data)
    return data


def _open(source: Path | bytes, kinds: tuple[str, ...]) -> tuple[bytes, dict[str, Any], dict[str, Any]]:
    kind = " or ".join(kinds)
    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise NetworkFileError(f"{kind}: file {source!s} cannot be read: {error}") from error
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


def _whole(config: dict[str, Any], name: str, high: int, *, low: int = 1) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise NetworkFileError(f"{config['kind']}: {name} is {value!r:.80}, not a whole number from {low} to {high}")
    return value


def _fill(network: Network, data: bytes, header: dict[str, Any], kind: str) -> Network:
    wanted = network.state_dict()
    if set(header) != set(wanted):
        odd = sorted(set(header) ^ set(wanted))[:3]
        raise NetworkFileError(f"{kind}: tensors do not fit the configuration: {', '.join(odd)} missing or not wanted")
    for name, tensor in wanted.items():
        entry = header[name] if isinstance(header[name], dict) else {}
        found = (entry.get("dtype"), entry.get("shape"))
        if found != (_TYPES[tensor.dtype], list(tensor.shape)):
            raise NetworkFileError(f"{kind}: tensor {name} is {found!r:.120}, wanted {_TYPES[tensor.dtype]} {list(tensor.shape)}")
    try:
        tensors = load_tensors(data)
    except Exception as error:  # SafetensorError is not exported as a type
        raise NetworkFileError(f"{kind}: damaged safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise NetworkFileError(f"{kind}: tensor {name} holds values that are not finite")
    for name, tensor in tensors.items():
        if name.endswith("variance") and (tensor < 0).any():
            raise NetworkFileError(f"{kind}: a variance is negative")
        if name == "spread" and not (tensor > 0).all():
            raise NetworkFileError(f"{kind}: a spread is not above zero")
    network.load_state_dict(tensors, assign=True)
    return network.eval()
