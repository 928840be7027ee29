"""Frames committed durably: the gateway beside the raw limit, with real devices' sessions, a real mosquitto, real processes.

    python -m benchmarks.ingest [--json FILE] [--full]

Both sides are fed by the same generator (benchmarks/load.py) with the same bytes, in turns; a frame counts when a
reader of the database sees its row. docs/benchmarks.md says what is measured and what is not.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.figures import Bar, print_bars, write_json
from benchmarks.load import Devices, Outgoing, Sent, publish_packet
from coordinator.local_broker import find_mosquitto, mosquitto_configuration
from coordinator.store.registry import insert_plan, register_backbone
from side_tuning.wire import topics
from side_tuning.wire.codecs import encode_vectors
from side_tuning.wire.frame import Frame, SampleInfo, Tap, encode_frame, read_identity
from side_tuning.wire.messages import Receipt
from tests.brokers import RunningBroker, free_port
from tests.coordinator.fleet import MANIFEST, PLAN, make_store, settings_file, settings_for
from tests.waiting import wait_until

SEED = 0
SIZES = (20_000, 64_000, 128_000)
DEVICES = (20, 200, 2_000)
BAR_CELL = (20_000, 2_000)
WINDOW = 512  # published and not yet committed, over all devices; below the queue of a broker in its default configuration
VERSION = 2  # of the plan that the frames are made for
TIMEOUT_SECONDS = 240.0
COUNT = {"gateway": "SELECT coalesce(max(id), 0) FROM frames", "limit": "SELECT coalesce(max(id), 0) FROM messages"}
SideName = Literal["gateway", "limit"]


@dataclass(frozen=True)
class Job:
    """One stretch of load, all that the generator needs to know."""

    side: SideName
    port: int
    database: str
    devices: int
    frames: int
    frame_bytes: int
    start: int  # frames that these devices have sent before
    window: int = WINDOW
    rate: float | None = None


@dataclass(frozen=True)
class Stretch:
    """What one stretch of load showed. Latency: publish -> commit, as seen by a reader of the database."""

    side: SideName
    frames: int
    seconds: float
    payload_bytes: int
    samples: int
    latency_p50_ms: float
    latency_p99_ms: float
    receipted_devices: int  # whose newest receipt covers all that they sent (the limit sends none)
    generator_seconds: float  # of processor time

    @property
    def rate(self) -> float:
        return self.frames / self.seconds


@dataclass
class Side:
    """A broker and a consumer of its messages, each a process."""

    name: SideName
    broker: RunningBroker
    consumer: subprocess.Popen[bytes]
    database: Path

    def processor_seconds(self) -> dict[str, float]:
        return {what: _processor_seconds(pid) for what, pid in self._pids().items()}

    def memory(self) -> dict[str, float]:
        """Peak resident memory in MB."""
        return {f"{what}_peak_rss_mb": _peak_rss(pid) / 1e6 for what, pid in self._pids().items()}

    def _pids(self) -> dict[str, int]:
        assert self.broker.process is not None
        return {"broker": self.broker.process.pid, "consumer": self.consumer.pid}


def samples_in(frame_bytes: int) -> int:
    """20 kB are 32 samples of pooled MiniLM taps; larger frames hold the most that a plan puts in one by default, 64."""
    return min(64, max(1, frame_bytes // 625))


def shape(frame_bytes: int):
    """The backbone and the plan of frames that take about `frame_bytes`."""
    width = max(8, (frame_bytes // samples_in(frame_bytes) // PLAN.blocks - 12) * 2)
    return replace(MANIFEST, fingerprint="be" * 16, width=width), replace(PLAN, version=VERSION)


def make_payloads(job: Job, names: Sequence[str]) -> Iterator[tuple[int, int, bytes]]:
    """(device, sequence, payload) for each frame, device after device; every sample has an id of its own."""
    manifest, plan = shape(job.frame_bytes)
    samples = samples_in(job.frame_bytes)
    chance = np.random.default_rng(SEED)
    vectors = [chance.normal(size=(samples, manifest.width)).astype(np.float32) for _ in range(plan.blocks)]  # unlike ones: lz4 finds likeness
    taps = tuple(
        Tap(layer, samples, manifest.width, plan.codec, plan.group, None, encode_vectors(one, plan.codec, plan.group))
        for layer, one in zip(plan.taps(manifest.layers), vectors, strict=True)
    )
    for number in range(job.start, job.start + job.frames):
        device, sequence = number % job.devices, number // job.devices + 1
        owner = zlib.crc32(names[device].encode())
        infos = tuple(SampleInfo(f"{owner:08x}{sequence:08x}{n:04x}", n % 3, "train", 7) for n in range(samples))
        frame = Frame(
            device=names[device], spool=spool_of(names[device]), sequence=sequence, captured_at=1_700_000_000.0 + sequence, backbone=manifest.fingerprint,
            plan_version=plan.version, mode=plan.mode, pooling=plan.pooling, produced=sequence * samples, samples=infos, taps=taps,
        )
        yield device, sequence, encode_frame(frame)


def spool_of(device: str) -> str:
    return f"{zlib.crc32(device.encode()):016x}"


def drive(job: Job) -> Stretch:
    """Runs in the generator's process: connect the devices, publish, look at the database, read the receipts."""
    names = [f"device-{n:05d}" for n in range(job.devices)]
    messages, sizes, last = [], [], {}
    for device, sequence, payload in make_payloads(job, names):
        properties = {"spool": spool_of(names[device]), "sequence": str(sequence)}
        messages.append(Outgoing(device, publish_packet(topics.activations(names[device]), payload, properties, sequence % 65_535 + 1)))
        last[device] = sequence
        sizes.append(len(payload))
    reader = sqlite3.connect(f"file:{job.database}?mode=ro", uri=True, isolation_level=None)
    before = reader.execute(COUNT[job.side]).fetchone()[0]
    devices = Devices(job.port, names, topics.receipt)
    try:
        used = time.process_time()
        sent = devices.publish(
            messages, lambda: reader.execute(COUNT[job.side]).fetchone()[0] - before, window=job.window, rate=job.rate, timeout_seconds=TIMEOUT_SECONDS
        )
        used = time.process_time() - used
        receipted = 0
        if job.side == "gateway":
            deadline = time.monotonic() + 20
            while receipted < len(last) and time.monotonic() < deadline:
                devices.turn(0.05)
                receipts = {device: devices.sessions[device].receipt for device in last}
                receipted = sum(bool(told) and Receipt.from_bytes(told).stored_through >= last[device] for device, told in receipts.items())
    except TimeoutError as error:
        raise TimeoutError(f"the {job.side}: {error}") from error
    finally:
        devices.close()
    latencies = _latencies(reader, job, names, before, sent)
    reader.close()
    return Stretch(
        job.side, job.frames, sent.commits[-1][0] - sent.published[0], sum(sizes), job.frames * samples_in(job.frame_bytes),
        float(np.percentile(latencies, 50)) * 1e3, float(np.percentile(latencies, 99)) * 1e3, receipted, used,
    )


def _latencies(reader: sqlite3.Connection, job: Job, names: Sequence[str], before: int, sent: Sent) -> list[float]:
    """Of each frame: from its publish to the first look at the database that saw it."""
    numbers = {name: n for n, name in enumerate(names)}
    if job.side == "gateway":
        rows = reader.execute(
            "SELECT frames.id, devices.name, frames.sequence FROM frames JOIN spools ON spools.id = frames.spool_id "
            "JOIN devices ON devices.id = spools.device_id WHERE frames.id > ?", (before,),
        )
        found = [(row, numbers[name], sequence) for row, name, sequence in rows]
    else:
        read = ((row, read_identity(payload)) for row, payload in reader.execute("SELECT id, payload FROM messages WHERE id > ?", (before,)))
        found = [(row, numbers[identity.device], identity.sequence) for row, identity in read if identity is not None]
    if len(found) != job.frames:
        raise AssertionError(f"{len(found)} of {job.frames} frames are in {job.database}")
    counts = [count for _, count in sent.commits]
    return [
        sent.commits[bisect_left(counts, row - before)][0] - sent.published[(sequence - 1) * job.devices + device - job.start] for row, device, sequence in found
    ]


@contextmanager
def running_side(name: SideName, folder: Path, frame_bytes: int) -> Iterator[Side]:
    """The broker of `coordinator run --broker mosquitto`, and the gateway or the limit behind it; a new database."""
    folder.mkdir(parents=True)
    port = free_port()
    (folder / "mosquitto.conf").write_text(mosquitto_configuration(port) + ("user root\n" if os.geteuid() == 0 else ""))
    broker = RunningBroker([find_mosquitto(), "-c", str(folder / "mosquitto.conf")], port, folder / "mosquitto.log")
    broker.start()
    log = folder / "consumer.log"
    if name == "gateway":
        settings = settings_for(folder, broker.settings)
        store = make_store(settings)
        manifest, plan = shape(frame_bytes)
        with store.write() as session:
            register_backbone(session, manifest)
            insert_plan(session, plan)
        database = Path(str(store.url.database))
        store.close()
        command = [sys.executable, "-m", "coordinator.cli", "gateway", "--config", str(settings_file(folder, port))]
    else:
        database = folder / "limit.db"
        command = [sys.executable, "-m", "benchmarks.raw_limit", str(port), str(database)]
    with log.open("wb") as output:
        consumer = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        wait_until(lambda: consumer.poll() is not None or "listening" in log.read_text(), 60, f"the {name} listens; see {log}")
        if consumer.poll() is not None:
            raise RuntimeError(f"the {name} ended with {consumer.returncode}:\n{log.read_text()}")
        yield Side(name, broker, consumer, database)
    finally:
        consumer.terminate()
        try:
            consumer.wait(30)
        except subprocess.TimeoutExpired:
            consumer.kill()
        broker.stop()


def _processor_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def _peak_rss(pid: int) -> int:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


class Measurement:
    """Stretches of load against both sides, in turns, in processes that live for one cell of the table."""

    def __init__(self, generator: ProcessPoolExecutor, folder: Path, frame_bytes: int, devices: int) -> None:
        self._generator = generator
        self._frame_bytes = frame_bytes
        self._devices = devices
        self._stack = ExitStack()
        self._sent = {"gateway": 0, "limit": 0}
        self.sides = {name: self._stack.enter_context(running_side(name, folder / name, frame_bytes)) for name in ("gateway", "limit")}

    def close(self) -> None:
        self._stack.close()

    def stretch(self, name: SideName, frames: int, *, window: int = WINDOW, rate: float | None = None) -> tuple[Stretch, dict[str, float]]:
        """One stretch, and the processor time in ms a frame of everybody in it."""
        side = self.sides[name]
        job = Job(name, side.broker.port, str(side.database), self._devices, frames, self._frame_bytes, self._sent[name], window, rate)
        self._sent[name] += frames
        before = side.processor_seconds()
        found = self._generator.submit(drive, job).result()
        after = side.processor_seconds()
        cost = {f"{what}_ms_a_frame": (after[what] - before[what]) / frames * 1e3 for what in before}
        return found, cost | {"generator_ms_a_frame": found.generator_seconds / frames * 1e3}

    def throughput(self, frames: int, rounds: int) -> dict[str, object]:
        """Both sides as fast as they can, in turns, the first one alternating."""
        for name in self.sides:  # what a device's first frame costs is paid once in its life
            self.stretch(name, self._devices)
        found: dict[str, list[tuple[Stretch, dict[str, float]]]] = {"gateway": [], "limit": []}
        for number in range(rounds):
            for name in ("gateway", "limit") if number % 2 == 0 else ("limit", "gateway"):
                found[name].append(self.stretch(name, frames))
        return {name: _summary(some) | self.sides[name].memory() for name, some in found.items()} | {
            "ratios": [a.rate / b.rate for (a, _), (b, _) in zip(found["gateway"], found["limit"], strict=True)],
            "frame_bytes": self._frame_bytes,
            "devices": self._devices,
        }

    def latency(self, frames: int, rate: float, window: int) -> dict[str, object]:
        return {name: asdict(self.stretch(name, frames, window=window, rate=rate)[0]) for name in self.sides}


def _summary(found: Sequence[tuple[Stretch, dict[str, float]]]) -> dict[str, object]:
    rates = [one.rate for one, _ in found]
    first = found[0][0]
    return {
        "frames_a_second": statistics.median(rates),
        "frames_a_second_each": rates,
        "samples_a_second": statistics.median(rates) * first.samples / first.frames,
        "mb_a_second": statistics.median(rates) * first.payload_bytes / first.frames / 1e6,
        "frame_bytes_sent": first.payload_bytes / first.frames,
        "latency_p50_ms": statistics.median(one.latency_p50_ms for one, _ in found),
        "latency_p99_ms": statistics.median(one.latency_p99_ms for one, _ in found),
        "receipted_devices": [one.receipted_devices for one, _ in found],
        **{what: statistics.median(cost[what] for _, cost in found) for what in found[0][1]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="bytes of a frame")
    parser.add_argument("--devices", type=int, nargs="+", default=list(DEVICES))
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side in each cell; twice as many in the last device count of the first size")
    parser.add_argument("--megabytes", type=float, default=60.0, help="that a turn sends, but one frame of each device at least")
    parser.add_argument("--idle-frames", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="where the databases lie; their disk decides (default: the system's temporary folder)")
    parser.add_argument("--full", action="store_true", help="five turns of each side, four times the frames")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.full:
        given.rounds, given.megabytes = 5, 240.0
    console = Console(width=160)
    cells: list[dict[str, object]] = []
    latencies: dict[str, object] = {}
    bar_size, bar_devices = given.sizes[0], given.devices[-1]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=given.folder) as name, ProcessPoolExecutor(1, context) as generator:
        for frame_bytes in given.sizes:
            for devices in given.devices:
                is_bar = (frame_bytes, devices) == (bar_size, bar_devices)
                frames = max(devices, int(given.megabytes * 1e6 / frame_bytes))
                with closing(Measurement(generator, Path(name) / f"{frame_bytes}-{devices}", frame_bytes, devices)) as measurement:
                    cell = measurement.throughput(frames, given.rounds * (2 if is_bar else 1))
                    cells.append(cell)
                    if is_bar:
                        rate = cell["gateway"]["frames_a_second"]
                        latencies["idle"] = measurement.latency(given.idle_frames, 25.0, 1)
                        latencies["load"] = measurement.latency(frames, rate / 2, WINDOW)
                print(f"{frame_bytes} bytes, {devices} devices: {cell['gateway']['frames_a_second']:.0f} frames/s", file=sys.stderr, flush=True)
    _print(console, cells, latencies)
    cell = next(one for one in cells if (one["frame_bytes"], one["devices"]) == (bar_size, bar_devices))
    bars = [
        Bar("gateway_vs_limit", statistics.median(cell["ratios"]), 0.8),
        Bar("durable_ingest", cell["gateway"]["frames_a_second"], 800),
        Bar("idle_commit_p99_ms", latencies["idle"]["gateway"]["latency_p99_ms"], 250, at_most=True),
    ]
    print_bars(bars, console)
    if given.json:
        options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(given).items()}
        write_json(given.json, {"cells": cells, "latency": latencies}, bars, [SEED], options)


def _print(console: Console, cells: list[dict[str, object]], latencies: dict[str, object]) -> None:
    table = Table(
        "frame", "devices", "frames/s", "spread", "samples/s", "MB/s", "limit frames/s", "ratio", "gateway ms", "limit ms", "generator ms",
        "gateway MB", "broker MB", title="Committed durably (medians; ms: processor time a frame; MB: peak resident)", title_justify="left",
    )
    for cell in cells:
        gateway, limit = cell["gateway"], cell["limit"]
        table.add_row(
            f"{gateway['frame_bytes_sent'] / 1e3:.0f} kB", f"{cell['devices']:,}", f"{gateway['frames_a_second']:,.0f}",
            f"{min(gateway['frames_a_second_each']):,.0f}-{max(gateway['frames_a_second_each']):,.0f}", f"{gateway['samples_a_second']:,.0f}",
            f"{gateway['mb_a_second']:.1f}", f"{limit['frames_a_second']:,.0f}", f"{statistics.median(cell['ratios']):.2f}",
            f"{gateway['consumer_ms_a_frame']:.2f}", f"{limit['consumer_ms_a_frame']:.2f}", f"{gateway['generator_ms_a_frame']:.2f}",
            f"{gateway['consumer_peak_rss_mb']:.0f}", f"{gateway['broker_peak_rss_mb']:.0f}",
        )
    console.print(table)
    table = Table("publish to commit", "gateway p50", "p99", "limit p50", "p99", title="Latency in ms", title_justify="left")
    for what, sides in latencies.items():
        table.add_row(what, *(f"{sides[name][f'latency_{p}_ms']:.1f}" for name in ("gateway", "limit") for p in ("p50", "p99")))
    console.print(table)


if __name__ == "__main__":
    main()
