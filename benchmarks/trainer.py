"""The trainer's step from the store beside the same step on batches already in memory; what it takes to get there.

    python -m benchmarks.trainer [--json FILE] [--full]

Real frames in a real store, the trainer's own functions. docs/benchmarks.md says what is measured and what is not.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.figures import Bar, print_bars, write_json
from coordinator.settings import CoordinatorSettings
from coordinator.store.engine import Store, open_store
from coordinator.store.ingest import ReceivedFrame, insert_frames
from coordinator.store.registry import insert_plan, register_backbone
from coordinator.training.learner import Rows
from coordinator.training.take_in import take_in
from coordinator.training.trainer import Training, open_training, take_step, take_up, train
from side_tuning.wire.codecs import encode_vectors
from side_tuning.wire.frame import Frame, SampleInfo, Tap, encode_frame
from tests.coordinator.fleet import MANIFEST, PLAN, make_store, settings_for
from tests.waiting import wait_until

SEED = 0
WIDTH = 384  # MiniLM
FRAME_SAMPLES = 64
DEVICES = 20
BACKBONE = replace(MANIFEST, fingerprint="be" * 16, width=WIDTH)
TAP_PLAN = replace(PLAN, version=2)
CHANCE = np.random.default_rng(SEED)


def frame(device: int, sequence: int) -> Frame:
    """64 samples with vectors of their own."""
    name = f"device-{device:05d}"
    owner = zlib.crc32(name.encode())
    samples = tuple(SampleInfo(f"{owner:08x}{sequence:08x}{n:04x}", n % 3, "train", 7) for n in range(FRAME_SAMPLES))
    taps = tuple(
        Tap(layer, FRAME_SAMPLES, WIDTH, TAP_PLAN.codec, TAP_PLAN.group, None,
            encode_vectors(CHANCE.normal(size=(FRAME_SAMPLES, WIDTH)).astype(np.float32), TAP_PLAN.codec, TAP_PLAN.group))
        for layer in TAP_PLAN.taps(BACKBONE.layers)
    )
    return Frame(
        device=name, spool=f"{owner:016x}", sequence=sequence, captured_at=1_700_000_000.0 + sequence, backbone=BACKBONE.fingerprint,
        plan_version=TAP_PLAN.version, mode=TAP_PLAN.mode, pooling=TAP_PLAN.pooling, produced=sequence * FRAME_SAMPLES, samples=samples, taps=taps,
    )


def store_frames(store: Store, frames: list[Frame]) -> None:
    received = [ReceivedFrame(f.device, "", encode_frame(f), datetime.now(timezone.utc), f, None, f.spool, f.sequence) for f in frames]
    with store.write() as session:
        assert all(outcome.outcome == "stored" for outcome in insert_frames(session, received))


def filled(folder: Path, samples: int) -> CoordinatorSettings:
    settings = settings_for(folder)
    store = make_store(settings)
    with store.write() as session:
        register_backbone(session, BACKBONE)
        insert_plan(session, TAP_PLAN)
    frames = samples // FRAME_SAMPLES
    for start in range(0, frames, 64):
        store_frames(store, [frame(n % DEVICES, n // DEVICES + 1) for n in range(start, min(start + 64, frames))])
    store.close()
    return settings


def opened(store: Store, settings: CoordinatorSettings) -> Training:
    """A training that has taken in everything stored."""
    training = open_training(store, settings, TAP_PLAN)
    while take_in(store, training.cache, TAP_PLAN):
        pass
    take_up(training)
    return training


def batches(training: Training, settings: CoordinatorSettings, count: int) -> Iterator[list[Rows]]:
    """Batches as the sampler would give them, gathered: what is in memory for the limit."""
    chance = np.random.default_rng(SEED)
    for _ in range(count):
        numbers = chance.integers(0, len(training.cache), settings.training.batch_size)
        yield training.cache.gather(numbers)


def throughput(settings: CoordinatorSettings, rounds: int, steps: int) -> dict[str, object]:
    """Samples a second of the whole step and of the limit, in turns on the same networks."""
    torch.set_num_threads(settings.training.threads)
    store = open_store(settings.database_url)
    training = opened(store, settings)
    ready = list(batches(training, settings, steps))
    rates: dict[str, list[float]] = {"trainer": [], "limit": []}

    def from_the_store() -> None:
        for _ in range(steps):
            take_step(training, settings)

    def from_memory() -> None:
        for rows in ready:
            training.learner.step(rows, training.step)

    for side in (from_the_store, from_memory):  # warm
        side()
    for number in range(rounds):
        sides = [("trainer", from_the_store), ("limit", from_memory)]
        for name, side in sides if number % 2 == 0 else sides[::-1]:
            began = time.perf_counter()
            side()
            rates[name].append(steps * settings.training.batch_size / (time.perf_counter() - began))
    ratios = [a / b for a, b in zip(rates["trainer"], rates["limit"], strict=True)]
    samples = len(training.cache)
    training.cache.close()
    store.close()
    return {
        "samples_stored": samples, "ratios": ratios,
        **{f"{name}_samples_a_second": statistics.median(values) for name, values in rates.items()},
        **{f"{name}_samples_a_second_each": values for name, values in rates.items()},
    }


def first_use(settings: CoordinatorSettings, rounds: int) -> list[float]:
    """Seconds from a frame's commit to the first draw of one of its samples, while the trainer's loop runs."""
    store = open_store(settings.database_url)
    training = open_training(store, settings, TAP_PLAN)
    stop = threading.Event()
    loop = threading.Thread(target=train, args=(training, store, settings, stop), name="trainer", daemon=True)
    loop.start()
    wait_until(lambda: training.step > 0, 120, "the trainer steps")
    found = []
    for number in range(rounds):
        one = frame(DEVICES + number, 1)  # a device that just joined
        known = training.sampler.samples
        store_frames(store, [one])
        committed = time.monotonic()
        wait_until(lambda known=known: (training.sampler.counts[known:] > 0).any(), 60, "a new sample is drawn")
        found.append(time.monotonic() - committed)
    stop.set()
    loop.join(60)
    training.cache.close()
    store.close()
    return found


def memory_after(settings: CoordinatorSettings) -> dict[str, float]:
    """Runs in a process of its own: take in everything, take 50 steps, say what is resident."""
    torch.set_num_threads(settings.training.threads)
    empty = psutil.Process().memory_info().rss
    store = open_store(settings.database_url)
    began = time.perf_counter()
    training = opened(store, settings)
    taken_in = time.perf_counter() - began
    for _ in range(50):
        take_step(training, settings)
    full = psutil.Process().memory_full_info()
    samples = len(training.cache)
    training.cache.close()
    store.close()
    return {
        "samples": samples, "take_in_samples_a_second": samples / taken_in, "imported_rss_mb": empty / 1e6, "rss_mb": full.rss / 1e6, "pss_mb": full.pss / 1e6, "private_mb": full.uss / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, nargs="+", default=[10_000, 100_000], help="stored, for the memory; the first also for the rest")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=100, help="in each turn")
    parser.add_argument("--full", action="store_true", help="a million stored samples too, and 21 turns")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.full:
        given.samples, given.rounds = [10_000, 100_000, 1_000_000], 21
    logging.disable(logging.INFO)
    memory, speeds = [], []
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        for samples in given.samples:
            settings = filled(Path(name) / str(samples), samples)
            with ProcessPoolExecutor(1, context) as fresh:
                memory.append(fresh.submit(memory_after, settings).result())
            with ProcessPoolExecutor(1, context) as fresh:
                speeds.append(fresh.submit(throughput, settings, given.rounds, given.steps).result())
            print(f"{samples} samples: done", file=sys.stderr, flush=True)
        with ProcessPoolExecutor(1, context) as fresh:
            used_after = fresh.submit(first_use, filled(Path(name) / "first-use", given.samples[0]), min(given.rounds, 7)).result()
    console = Console()
    table = Table("stored", "trainer samples/s", "limit", "ratio", "taken in, samples/s", "RSS MB", "PSS MB", title="From the store and from memory", title_justify="left")
    for speed, used in zip(speeds, memory, strict=True):
        table.add_row(
            f"{speed['samples_stored']:,}", f"{speed['trainer_samples_a_second']:,.0f}", f"{speed['limit_samples_a_second']:,.0f}",
            f"{statistics.median(speed['ratios']):.3f}", f"{used['take_in_samples_a_second']:,.0f}", f"{used['rss_mb']:.0f}", f"{used['pss_mb']:.0f}",
        )
    console.print(table)
    console.print(f"From commit to first use: median {statistics.median(used_after):.2f} s, longest {max(used_after):.2f} s")
    bars = [Bar("trainer_vs_limit", statistics.median(speeds[-1]["ratios"]), 0.9)]
    print_bars(bars, console)
    if given.json:
        options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(given).items()}
        write_json(given.json, {"speed": speeds, "memory": memory, "first_use_seconds": used_after}, bars, [SEED], options)


if __name__ == "__main__":
    main()
