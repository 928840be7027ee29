"""Which samples go into batch t.

The rule, in one place:
1. A device's share of a batch is proportional to (its stored train samples) ** tau.
2. Within a device, a class's share is proportional to (its samples there) ** class_tau: balanced labels stay as they
   are, rare classes of a skewed device are raised.
3. Within device and class, two samples are drawn at random and the one drawn less often so far is taken.
4. A sample that has been drawn `replay_cap` times is never drawn again; where all of a device's samples are used up,
   its share goes to the others.

Batch t depends only on the seed, t, the stored samples and how often each was drawn: no hidden generator state.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


class GrowingArray:
    """A numpy array that can be appended to; capacity doubles."""

    def __init__(self, dtype: np.dtype | type[np.generic]) -> None:
        self._buffer: np.ndarray = np.empty(16, dtype)
        self._length = 0

    def append(self, values: np.ndarray) -> None:
        needed = self._length + len(values)
        if needed > len(self._buffer):
            grown = np.empty(max(needed, 2 * len(self._buffer)), self._buffer.dtype)
            grown[: self._length] = self.values
            self._buffer = grown
        self._buffer[self._length : needed] = values
        self._length = needed

    def pick(self, chance: float) -> int:
        """The value that a `chance` from 0 to below 1 falls on; all are alike."""
        return self._buffer.item(int(chance * self._length))

    def remove(self, value: int) -> None:
        """Remove one value of an ascending array."""
        at = int(np.searchsorted(self.values, value))
        self._buffer[at : self._length - 1] = self._buffer[at + 1 : self._length].copy()
        self._length -= 1

    def __len__(self) -> int:
        return self._length

    @property
    def values(self) -> np.ndarray:
        """A view; it holds until the next append."""
        return self._buffer[: self._length]


class Sampler:
    """Draws train samples, numbered 0, 1, 2, ... in the order of `add`."""

    def __init__(self, *, seed: int, tau: float, class_tau: float, replay_cap: int) -> None:
        self._seed = seed
        self._tau = tau
        self._class_tau = class_tau
        self._replay_cap = replay_cap
        self._counts = GrowingArray(np.int32)
        self._stored: dict[int, dict[int, int]] = {}  # device -> label -> samples
        self._open: dict[int, dict[int, GrowingArray]] = {}  # the same, samples below the cap; ascending numbers
        self._changed: set[int] = set()  # devices whose tables no longer hold
        self._classes: dict[int, tuple[list[float], list[GrowingArray]]] = {}
        self._weights: dict[int, float] = {}
        self._tables: _Tables | None = None

    @property
    def samples(self) -> int:
        return len(self._counts)

    @property
    def drawn(self) -> int:
        return int(self._counts.values.sum(dtype=np.int64))

    @property
    def counts(self) -> np.ndarray:
        """How often each sample has been drawn."""
        return self._counts.values

    @property
    def exhausted(self) -> bool:
        """Every sample has reached the replay cap."""
        return not self._tabulate().devices

    def add(self, devices: np.ndarray, labels: np.ndarray, counts: np.ndarray | None = None) -> None:
        """Append samples; `counts` are given when a run is resumed."""
        first = self.samples
        drawn = np.zeros(len(devices), np.int32) if counts is None else counts
        self._counts.append(drawn)
        if not len(devices):
            return
        numbers = np.arange(first, first + len(devices))
        # Sorted once and cut where device or label changes: a resumed run adds a million samples of thousands of devices.
        order = np.lexsort((labels, devices))  # stable: numbers ascend within a cell
        devices, labels, numbers, below = devices[order], labels[order], numbers[order], (drawn < self._replay_cap)[order]
        starts = np.flatnonzero(np.diff(devices, prepend=devices[0]) | np.diff(labels, prepend=labels[0]))
        bounds = [0, *starts.tolist(), len(order)]
        for start, end in pairwise(bounds):
            device, label = int(devices[start]), int(labels[start])
            stored = self._stored.setdefault(device, {})
            stored[label] = stored.get(label, 0) + end - start
            cell = self._open.setdefault(device, {}).setdefault(label, GrowingArray(np.int64))
            cell.append(numbers[start:end][below[start:end]])
            self._changed.add(device)

    def shares(self) -> dict[int, float]:
        """The share of each device in the next batch."""
        tables = self._tabulate()
        return dict(zip(tables.devices, np.diff(tables.device_bounds, prepend=0.0).tolist(), strict=True))

    def draw(self, step: int, size: int) -> np.ndarray:
        """Batch `step`: `size` sample numbers, fewer (or none) where the replay cap leaves no more."""
        generator = np.random.default_rng((self._seed, step))
        # Evenly spaced points with one random offset: each device gets its share of every batch, rounded fairly.
        points = (np.arange(size) + generator.random()) / size
        chances = generator.random((size, 3)).tolist()
        batch: list[int] = []
        counts, cap = self._counts.values, self._replay_cap
        tables = self._tabulate()
        for point, (class_chance, first_chance, second_chance) in zip(points.tolist(), chances, strict=True):
            if self._changed:  # a device's last sample below the cap was taken
                tables = self._tabulate()
            if not tables.devices:
                break
            # The last bound is 1, but rounding may leave it a little below.
            device = tables.devices[min(bisect_right(tables.device_bounds, point), len(tables.devices) - 1)]
            bounds, cells = tables.classes[device]
            cell = cells[min(bisect_right(bounds, class_chance), len(cells) - 1)]
            first, second = cell.pick(first_chance), cell.pick(second_chance)
            first_drawn, second_drawn = counts.item(first), counts.item(second)
            taken, drawn = (first, first_drawn + 1) if first_drawn <= second_drawn else (second, second_drawn + 1)
            counts[taken] = drawn
            if drawn >= cap:
                cell.remove(taken)
                if not len(cell):
                    self._changed.add(device)
            batch.append(taken)
        return np.array(batch, np.int64)

    def _tabulate(self) -> _Tables:
        """Anew only for the devices whose samples changed: a fleet of thousands sends a frame between any two batches."""
        if self._tables is None or self._changed:
            for device in self._changed:
                stored = self._stored[device]
                open_cells = self._open[device]
                labels = sorted(label for label, cell in open_cells.items() if len(cell))
                if labels:
                    bounds = _bounds([stored[label] ** self._class_tau for label in labels])
                    self._classes[device] = (bounds, [open_cells[label] for label in labels])
                    self._weights[device] = sum(stored.values()) ** self._tau
                else:
                    self._classes.pop(device, None)
                    self._weights.pop(device, None)
            self._changed.clear()
            devices = sorted(self._classes)
            self._tables = _Tables(devices, _bounds([self._weights[device] for device in devices]), self._classes)
        return self._tables


@dataclass(frozen=True)
class _Tables:
    """Cumulated shares of the devices and, per device, of its classes, with the samples of each."""

    devices: list[int]
    device_bounds: list[float]
    classes: dict[int, tuple[list[float], list[GrowingArray]]]


def _bounds(weights: list[float]) -> list[float]:
    cumulated = np.cumsum(np.array(weights, np.float64))
    return (cumulated / cumulated[-1]).tolist() if len(cumulated) else []
