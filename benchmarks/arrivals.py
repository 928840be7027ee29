"""What tracking and sampling cost as a fleet grows: per frame in the store, per batch in the sampler, and memory.

    python -m benchmarks.arrivals [--json FILE] [--full]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.figures import Bar, write_json
from coordinator import arrivals
from coordinator.store.engine import Store
from coordinator.store.ingest import insert_frames
from coordinator.store.receipts import receipts_for
from coordinator.training.sampler import Sampler
from tests.coordinator.fleet import make_store, now, settings_for
from tests.store.frames import make_frame, received

SEED = 0
BATCH_FRAMES = 64
BATCH_SAMPLES = 128
CLASSES = 8
FRAME_SAMPLES = 8


def microseconds(work: Callable[[], object], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - began) / times * 1e6


def arithmetic() -> float:
    """One arrival: rate, pace, when the next is due, the state."""
    rate, pace = arrivals.RateEstimate().add(8, 0.0).add(8, 10.0), arrivals.Pace().add(0.0).add(10.0)

    def once() -> None:
        rate.add(8, 20.0).rates(21.0)
        due = arrivals.expected_by(pace.add(20.0))
        arrivals.state(arrivals.Signals(0.0, "online", 0.0, heartbeat_at=20.0, last_arrival_at=20.0, expected_by=due), 21.0)

    return microseconds(once, 20_000)


def tracking(store: Store, devices: int, frames: int) -> dict[str, float]:
    """Frames in turn from every device, in the gateway's batches: stored, and their receipts read."""
    names = [f"device-{n:05d}" for n in range(devices)]
    figures = {}
    for what, start in (("first", 0), ("later", devices)):
        count = devices if what == "first" else frames
        made = []
        for number in range(start, start + count):
            device, sequence = names[number % devices], number // devices + 1
            made.append(received(make_frame(device, sequence, [f"{device}-{sequence}-{k}" for k in range(FRAME_SAMPLES)], width=64), now()))
        inserting = reading = 0.0
        for place in range(0, count, BATCH_FRAMES):
            batch = made[place : place + BATCH_FRAMES]
            began = time.perf_counter()
            with store.write() as session:
                insert_frames(session, batch)
            stored = time.perf_counter()
            with store.read() as session:
                receipts_for(session, [(item.device, item.frame.spool) for item in batch if item.frame is not None])
            inserting, reading = inserting + stored - began, reading + time.perf_counter() - stored
        figures[f"{what}_frame_us"], figures[f"{what}_receipt_us"] = inserting / count * 1e6, reading / count * 1e6
    return figures


def sampling(devices: int, samples: int, batches: int) -> dict[str, float]:
    """A sampler that knows `samples` of `devices`: made, drawn from, told of one more frame."""
    chance = np.random.default_rng(SEED)
    owners, labels = chance.integers(0, devices, samples), chance.integers(0, CLASSES, samples)
    tracemalloc.start()
    sampler = Sampler(seed=SEED, tau=0.5, class_tau=1.0, replay_cap=100)
    sampler.add(owners, labels)
    sampler.draw(0, BATCH_SAMPLES)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    began = time.perf_counter()
    other = Sampler(seed=SEED, tau=0.5, class_tau=1.0, replay_cap=100)
    other.add(owners, labels)
    made = time.perf_counter() - began
    step = iter(range(1, 10**9))
    drawn = microseconds(lambda: sampler.draw(next(step), BATCH_SAMPLES), batches)

    def joined() -> None:
        sampler.add(np.full(FRAME_SAMPLES, next(step) % devices), np.arange(FRAME_SAMPLES) % CLASSES)
        sampler.draw(next(step), BATCH_SAMPLES)

    return {
        "batch_us": drawn, "batch_after_a_new_frame_us": microseconds(joined, max(3, batches // 10)), "made_seconds": made,
        "sampler_mb": held / 1e6, "sampler_bytes_a_sample": held / samples,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--frames", type=int, default=4_096, help="after the first of each device")
    parser.add_argument("--samples", type=int, default=200_000, help="that the sampler knows")
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--full", action="store_true", help="a million samples, four times the frames")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.full:
        given.frames, given.samples = 16_384, 1_000_000
    figures: dict[str, object] = {"arithmetic_us": arithmetic()}
    rows = []
    for devices in given.devices:
        with tempfile.TemporaryDirectory() as name:
            store = make_store(settings_for(Path(name)))
            rows.append({"devices": devices} | tracking(store, devices, given.frames) | sampling(devices, given.samples, given.batches))
            store.close()
        print(f"{devices} devices: done", file=sys.stderr, flush=True)
    console = Console(width=160)
    columns = list(rows[0])
    table = Table(*(column.replace("_", " ") for column in columns), title="Tracking and sampling", title_justify="left")
    for row in rows:
        table.add_row(*(f"{row[column]:,.3g}" if row[column] < 10 else f"{row[column]:,.0f}" for column in columns))
    console.print(table)
    console.print(f"One arrival's arithmetic: {figures['arithmetic_us']:.1f} µs")
    if given.json:
        bars: list[Bar] = []
        options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(given).items()}
        write_json(given.json, figures | {"by_devices": rows}, bars, [SEED], options)


if __name__ == "__main__":
    main()
