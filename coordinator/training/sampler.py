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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np

BLOCK = 32  # batches whose random numbers are made at once


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

    def __len__(self) -> int:
        return self._length

    @property
    def values(self) -> np.ndarray:
        """A view; it holds until the next append."""
        return self._buffer[: self._length]


class Cells:
    """Lists of ascending numbers, all in one array, so that many can be picked from at once."""

    def __init__(self) -> None:
        self._buffer = np.empty(16, np.int64)
        self._used = 0
        self._starts, self._lengths, self._rooms = (GrowingArray(np.int64) for _ in range(3))

    def new(self) -> int:
        """The number of one more list, which is empty."""
        for column in (self._starts, self._lengths, self._rooms):
            column.append(np.zeros(1, np.int64))
        return len(self._starts) - 1

    def length(self, cell: int) -> int:
        return self._lengths.values.item(cell)

    def append(self, cell: int, numbers: np.ndarray) -> None:
        start, length, room = (column.values.item(cell) for column in (self._starts, self._lengths, self._rooms))
        if length + len(numbers) > room:
            start = self._move(cell, max(length + len(numbers), 2 * room))
        self._buffer[start + length : start + length + len(numbers)] = numbers
        self._lengths.values[cell] = length + len(numbers)

    def remove(self, cell: int, number: int) -> None:
        start, length = self._starts.values.item(cell), self._lengths.values.item(cell)
        numbers = self._buffer[start : start + length]
        at = int(np.searchsorted(numbers, number))
        numbers[at:-1] = numbers[at + 1 :].copy()
        self._lengths.values[cell] = length - 1

    def pick(self, cells: np.ndarray, chances: np.ndarray) -> np.ndarray:
        """From each of `cells` the number that its chance, from 0 to below 1, falls on; all of a list are alike."""
        return self._buffer[self._starts.values[cells] + (chances * self._lengths.values[cells]).astype(np.int64)]

    def _move(self, cell: int, room: int) -> int:
        """Give the list so much room, at the end; what it leaves behind is at most as much as it holds."""
        start, length = self._starts.values.item(cell), self._lengths.values.item(cell)
        if self._used + room > len(self._buffer):
            grown = np.empty(max(self._used + room, 2 * len(self._buffer)), np.int64)
            grown[: self._used] = self._buffer[: self._used]
            self._buffer = grown
        self._buffer[self._used : self._used + length] = self._buffer[start : start + length]
        self._starts.values[cell], self._rooms.values[cell] = self._used, room
        self._used += room
        return self._used - room


class Sampler:
    """Draws train samples, numbered 0, 1, 2, ... in the order of `add`."""

    def __init__(self, *, seed: int, tau: float, class_tau: float, replay_cap: int) -> None:
        self._seed = seed
        self._tau = tau
        self._class_tau = class_tau
        self._replay_cap = replay_cap
        self._counts = GrowingArray(np.int32)
        self._stored: dict[int, dict[int, int]] = {}  # device -> label -> samples
        self._open: dict[int, dict[int, int]] = {}  # device -> label -> the cell of its samples below the cap
        self._cells = Cells()
        self._owners: list[int] = []  # the device of each cell
        self._changed: set[int] = set()  # devices whose tables no longer hold
        self._classes: dict[int, tuple[list[float], list[int]]] = {}  # device -> cumulated shares, cells
        self._weights: dict[int, float] = {}
        self._tables: _Tables | None = None
        self._block = (-1, 0)  # whose random numbers are at hand, for batches of which size
        self._numbers = np.empty((0, 0))

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
            cells = self._open.setdefault(device, {})
            if label not in cells:
                cells[label] = self._cells.new()
                self._owners.append(device)
            self._cells.append(cells[label], numbers[start:end][below[start:end]])
            self._changed.add(device)

    def shares(self) -> dict[int, float]:
        """The share of each device in the next batch."""
        tables = self._tabulate()
        return dict(zip(tables.devices, np.diff(tables.device_bounds, prepend=0.0).tolist(), strict=True))

    def draw(self, step: int, size: int) -> np.ndarray:
        """Batch `step`: `size` sample numbers, fewer (or none) where the replay cap leaves no more."""
        offset, chances = self._chances(step, size)
        # Evenly spaced points with one random offset: each device gets its share of every batch, rounded fairly.
        points = (np.arange(size) + offset) / size
        counts, cap = self._counts.values, self._replay_cap
        batch: list[int] = []
        while len(batch) < size and (tables := self._tabulate()).devices:
            rest = slice(len(batch), None)
            cells = tables.cells_at(points[rest], chances[rest, 0])
            firsts, seconds = (self._cells.pick(cells, chances[rest, column]) for column in (1, 2))
            for first, second in zip(firsts.tolist(), seconds.tolist(), strict=True):
                first_drawn, second_drawn = counts.item(first), counts.item(second)
                taken, drawn = (first, first_drawn + 1) if first_drawn <= second_drawn else (second, second_drawn + 1)
                counts[taken] = drawn
                batch.append(taken)
                if drawn >= cap:  # the rest of the batch is picked from what is left
                    self._close(taken, cells.item(len(batch) - 1 - rest.start))
                    break
        return np.array(batch, np.int64)

    def _chances(self, step: int, size: int) -> tuple[float, np.ndarray]:
        """The random numbers of batch `step`: one, and `(size, 3)`. Made for many batches at once, since seeding a generator is slow."""
        block, place = divmod(step, BLOCK)
        if self._block != (block, size):
            generator = np.random.default_rng((self._seed, block))
            self._block, self._numbers = (block, size), generator.random((BLOCK, 3 * size + 1))
        return self._numbers.item(place, 0), self._numbers[place, 1:].reshape(size, 3)

    def _close(self, taken: int, cell: int) -> None:
        """The sample has reached the cap."""
        self._cells.remove(cell, taken)
        if not self._cells.length(cell):
            self._changed.add(self._owners[cell])

    def _tabulate(self) -> _Tables:
        """Shares anew only for the devices whose samples changed: a fleet of thousands sends a frame between any two batches."""
        if self._tables is None or self._changed:
            for device in self._changed:
                stored, open_cells = self._stored[device], self._open[device]
                labels = sorted(label for label, cell in open_cells.items() if self._cells.length(cell))
                if labels:
                    shares = _cumulated([stored[label] ** self._class_tau for label in labels]).tolist()
                    self._classes[device] = (shares, [open_cells[label] for label in labels])
                    self._weights[device] = sum(stored.values()) ** self._tau
                else:
                    self._classes.pop(device, None)
                    self._weights.pop(device, None)
            self._changed.clear()
            self._tables = _Tables.of(self._weights, self._classes)
        return self._tables


@dataclass(frozen=True)
class _Tables:
    """Cumulated shares: of the devices, and of all devices' classes one after the other, device n's from n to n + 1."""

    devices: list[int]
    device_bounds: np.ndarray
    class_bounds: np.ndarray
    cells: np.ndarray
    last_cells: np.ndarray  # of each device, where its last class stands

    @classmethod
    def of(cls, weights: Mapping[int, float], classes: Mapping[int, tuple[list[float], list[int]]]) -> _Tables:
        devices = sorted(classes)
        bounds, cells = [classes[device][0] for device in devices], [classes[device][1] for device in devices]
        counts = np.fromiter(map(len, cells), np.int64, len(cells))
        total = int(counts.sum())
        return cls(
            devices,
            _cumulated([weights[device] for device in devices]),
            np.fromiter(chain.from_iterable(bounds), np.float64, total) + np.repeat(np.arange(len(devices)), counts),
            np.fromiter(chain.from_iterable(cells), np.int64, total),
            np.cumsum(counts) - 1,
        )

    def cells_at(self, points: np.ndarray, chances: np.ndarray) -> np.ndarray:
        """The cell that each point and chance, both from 0 to below 1, fall on."""
        # A point or a sum just below the last bound may be rounded up to it.
        device = np.minimum(np.searchsorted(self.device_bounds, points, side="right"), len(self.devices) - 1)
        cell = np.searchsorted(self.class_bounds, device + chances, side="right")
        return self.cells[np.minimum(cell, self.last_cells[device])]


def _cumulated(weights: Sequence[float]) -> np.ndarray:
    cumulated = np.cumsum(np.array(weights, np.float64))
    return cumulated / cumulated[-1] if len(cumulated) else cumulated
