"""Decoded activations on disk, float16, read through memory maps: an epoch never decodes twice.

One shard per (backbone fingerprint, layers), one index for all, and `cache.json`, which says how much of them counts;
it is replaced last, so a crash in between only loses what comes again from the store. Everything here can be rebuilt
from the store; whatever does not fit together is thrown away. Memory holds the index (41 bytes a sample), no vectors. For a language model the last layer's rows are wider than the
others', and a second file per shard has each row's own token and the one that it is trained to predict.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from coordinator.files import write_atomically
from coordinator.training.learner import LanguageColumns, Rows
from coordinator.training.sampler import GrowingArray
from side_tuning.network.side_network import pad_tokens
from side_tuning.wire.messages import Mode, Task

log = logging.getLogger(__name__)

FORMAT = 3
LARGEST = 65_504.0  # of float16; larger values are clipped to it
RECORD = np.dtype(
    [
        ("row_id", "<i8"),  # of the sample in the store
        ("start", "<i8"),  # first row in the shard
        ("rows", "<i4"),  # 1 in `pooled` mode; tokens else, and before them those of the summary
        ("shard", "<i4"),
        ("device", "<i4"),
        ("label", "<i4"),
        ("held_out", "?"),
        ("target", "<f8"),  # `regression`
    ],
    align=False,
)


NO_TARGET = -1  # of a row that the loss does not sit on


@dataclass
class Shard:
    """The vectors of one backbone type: `rows` x its distinct tapped layers x `width`, the last layer's `last_width`."""

    fingerprint: str
    layers: tuple[int, ...]  # distinct, ascending
    layers_per_block: tuple[int, ...]
    width: int
    last_width: int  # as `width`, but for language models
    summary_width: int = 0  # of the vector that each sample's first rows are, folded; 0: there is none
    rows: int = 0

    @property
    def columns(self) -> int:
        return (len(self.layers) - 1) * self.width + self.last_width


@dataclass(frozen=True)
class Entry:
    """One sample to keep; `vectors` is (rows, columns of its shard), layer after layer."""

    row_id: int
    device: str
    label: int
    held_out: bool
    vectors: np.ndarray
    target: float = 0.0  # `regression`
    tokens: np.ndarray | None = None  # language models: (rows, 2), each row's token and its target or `NO_TARGET`


class TapCache:
    """Samples numbered 0, 1, 2, ... in the order of their row ids in the store."""

    def __init__(self, folder: Path, key: Mapping[str, object], mode: Mode, task: Task = "classification") -> None:
        """Open the cache in `folder`, or begin an empty one if it was made for another `key` or does not fit together."""
        self.folder = folder
        self.mode: Mode = mode
        self.task: Task = task
        self.watermark = 0  # every sample of the store up to this row id has been looked at
        self.devices: list[str] = []
        self.shards: list[Shard] = []
        self.skipped: Counter[str] = Counter()  # reason -> samples that cannot be used
        self._key = json.loads(json.dumps(key))
        self._index = GrowingArray(RECORD)
        self._maps: dict[int, np.ndarray] = {}
        self._files: dict[str, BinaryIO] = {}
        self._taken = np.empty((0, 0), np.float16)
        reason = self._load()
        if reason:
            if folder.exists():
                log.warning("the tap cache %s %s; it is made anew from the store", folder, reason)
            self.clear()

    # What is in it.

    @property
    def records(self) -> np.ndarray:
        """The index, one `RECORD` per sample; a view."""
        return self._index.values

    def __len__(self) -> int:
        return len(self._index)

    def shard_number(self, fingerprint: str) -> int | None:
        return next((n for n, shard in enumerate(self.shards) if shard.fingerprint == fingerprint), None)

    def gather(self, numbers: np.ndarray) -> list[Rows]:
        """The samples with these numbers, grouped by backbone type, as float32."""
        records = self.records[numbers]
        shards = records["shard"]
        kinds = sorted(set(shards.tolist()))
        return [self._rows(shard, records if len(kinds) == 1 else records[shards == shard]) for shard in kinds]

    def _rows(self, number: int, records: np.ndarray) -> Rows:
        shard = self.shards[number]
        vectors = self._map(number)
        labels = records["target"].astype(np.float64) if self.task == "regression" else records["label"].astype(np.int64)
        if self.mode == "pooled":
            if len(self._taken) != len(records) or self._taken.shape[1] != shard.columns:
                self._taken = np.empty((len(records), shard.columns), np.float16)  # kept: new memory costs more than what is copied there
            vectors.take(records["start"], axis=0, out=self._taken, mode="clip")
            return Rows(shard.fingerprint, self._blocks(shard, self._taken), None, labels)
        lengths, starts = records["rows"].tolist(), records["start"].tolist()

        def padded(file: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return pad_tokens(np.concatenate([file[start : start + n] for start, n in zip(starts, lengths, strict=True)]), lengths)

        rows, mask = padded(vectors)  # (N, T, columns)
        inputs = np.ascontiguousarray(self._blocks(shard, rows).swapaxes(1, 2))  # (N, B, T, width)
        if self.task != "causal-lm":
            return Rows(shard.fingerprint, inputs, mask, labels)
        tokens, _ = padded(np.memmap(self._tokens_path(number), np.int32, mode="r", shape=(shard.rows, 2)))
        targets = np.where(mask, tokens[..., 1], NO_TARGET).astype(np.int64)
        last = _to_float32(rows[..., -shard.last_width :])
        return Rows(shard.fingerprint, inputs, mask, labels, LanguageColumns(last, tokens[..., 0].astype(np.int64), targets))

    @staticmethod
    def _blocks(shard: Shard, rows: np.ndarray) -> np.ndarray:
        """(..., columns) to float32 (..., B, width): each block's layer, its first `width` columns."""
        count = len(shard.layers)
        layers = _to_float32(rows[..., : count * shard.width]).reshape(*rows.shape[:-1], count, shard.width)
        positions = [shard.layers.index(layer) for layer in shard.layers_per_block]
        return layers if positions == list(range(count)) else layers[..., positions, :]

    def _map(self, number: int) -> np.ndarray:
        if number not in self._maps:
            shard = self.shards[number]
            mapped = np.memmap(self._shard_path(number), np.float16, mode="r", shape=(shard.rows, shard.columns))
            self._maps[number] = mapped.view(np.ndarray)  # of a plain array, slices cost less
        return self._maps[number]

    # Putting in.

    def open_shard(self, fingerprint: str, layers_per_block: Sequence[int], width: int, last_width: int | None = None, summary_width: int = 0) -> int:
        """The number of the shard for this backbone type; made if there is none."""
        known = self.shard_number(fingerprint)
        if known is not None:
            return known
        layers = tuple(sorted(set(layers_per_block)))
        self.shards.append(Shard(fingerprint, layers, tuple(layers_per_block), width, last_width or width, summary_width))
        return len(self.shards) - 1

    def append(self, shard_number: int, entries: Iterable[Entry]) -> np.ndarray:
        """Write vectors; returns their index records, which count from `commit` on."""
        shard = self.shards[shard_number]
        file = self._file(self._shard_path(shard_number))
        records = []
        for entry in entries:
            if entry.vectors.shape[1:] != (shard.columns,):
                raise ValueError(f"vectors of shape {entry.vectors.shape} do not fit shard {shard_number}")
            if self.task == "causal-lm":
                if entry.tokens is None or entry.tokens.shape != (len(entry.vectors), 2):
                    raise ValueError(f"sample {entry.row_id} comes without the tokens of its {len(entry.vectors)} rows")
                self._file(self._tokens_path(shard_number)).write(entry.tokens.astype("<i4").tobytes())
            file.write(np.clip(entry.vectors, -LARGEST, LARGEST).astype("<f2").tobytes())
            device = self._device_number(entry.device)
            count = len(entry.vectors)
            records.append((entry.row_id, shard.rows, count, shard_number, device, entry.label, entry.held_out, entry.target))
            shard.rows += count
        self._maps.pop(shard_number, None)
        return np.array(records, RECORD)

    def commit(self, records: np.ndarray, watermark: int) -> None:
        """Let `records` count, ascending by row id, and remember that the store was read up to `watermark`."""
        self._file(self.folder / "index").write(records.tobytes())
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self._index.append(records)
        self.watermark = watermark
        self._write_description()

    def clear(self) -> None:
        """Throw everything away and begin empty."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.watermark = 0
        self.devices, self.shards, self.skipped = [], [], Counter()
        self._index = GrowingArray(RECORD)
        self._write_description()

    def roll_back(self) -> None:
        """After a failed write: forget everything since the last commit that is on disk."""
        self.close()
        self._index = GrowingArray(RECORD)
        reason = self._load()
        if reason:
            raise RuntimeError(f"the tap cache {self.folder} {reason}; start the trainer again, it is then made anew from the store")

    def close(self) -> None:
        self._maps.clear()
        for file in self._files.values():
            # What cannot be written now was not committed either.
            with suppress(OSError):
                file.close()
        self._files.clear()

    # Files.

    def _device_number(self, device: str) -> int:
        if device not in self.devices:
            self.devices.append(device)
        return self.devices.index(device)

    def _shard_path(self, number: int) -> Path:
        return self.folder / f"shard-{number}"

    def _tokens_path(self, number: int) -> Path:
        return self.folder / f"tokens-{number}"

    def _file(self, path: Path) -> BinaryIO:
        if path.name not in self._files:
            self._files[path.name] = path.open("ab")
        return self._files[path.name]

    def _write_description(self) -> None:
        description = {
            "format": FORMAT,
            "key": self._key,
            "watermark": self.watermark,
            "samples": len(self._index),
            "devices": self.devices,
            "shards": [asdict(shard) for shard in self.shards],
            "skipped": dict(self.skipped),
        }
        write_atomically(self.folder / "cache.json", json.dumps(description).encode())

    def _load(self) -> str | None:
        """Read what is there; the reason, if it cannot be used."""
        try:
            description = json.loads((self.folder / "cache.json").read_bytes())
            if description["format"] != FORMAT or description["key"] != self._key:
                return "was made for another tap plan or run"
            self.shards = [
                Shard(s["fingerprint"], tuple(s["layers"]), tuple(s["layers_per_block"]), s["width"], s["last_width"], s.get("summary_width", 0), s["rows"])
                for s in description["shards"]
            ]
            self.devices = [str(device) for device in description["devices"]]
            self.skipped = Counter(description["skipped"])
            self.watermark = int(description["watermark"])
            self._cut(self.folder / "index", description["samples"] * RECORD.itemsize)
            for number, shard in enumerate(self.shards):
                self._cut(self._shard_path(number), shard.rows * shard.columns * 2)
                if self.task == "causal-lm":
                    self._cut(self._tokens_path(number), shard.rows * 2 * 4)
            records = np.fromfile(self.folder / "index", RECORD) if description["samples"] else np.empty(0, RECORD)
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"does not fit together ({type(error).__name__}: {error})"
        for number, shard in enumerate(self.shards):
            own = records[records["shard"] == number]
            if len(own) and int((own["start"] + own["rows"]).max()) > shard.rows:
                return f"does not fit together (the index goes past the end of shard {number})"
        if (np.diff(records["row_id"]) <= 0).any() or (records["shard"] >= len(self.shards)).any():
            return "does not fit together (the index is out of order)"
        self._index.append(records)
        return None

    @staticmethod
    def _cut(path: Path, size: int) -> None:
        """Cut off what was written after the last commit."""
        found = path.stat().st_size if path.exists() else 0
        if found < size:
            raise ValueError(f"{path.name} has {found} bytes of {size}")
        if found > size:
            os.truncate(path, size)


def _to_float32(rows: np.ndarray) -> np.ndarray[Any, np.dtype[np.float32]]:
    """By torch: numpy takes sixteen times as long for float16 (docs/lab-notes.md)."""
    floats: np.ndarray[Any, np.dtype[np.float32]] = torch.from_numpy(rows).float().numpy()
    return floats
