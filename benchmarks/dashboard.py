"""The dashboard over a large fleet: first paint in Chromium, the cost of many viewers, and what they cost the gateway's store.

    python -m benchmarks.dashboard [--devices 2000] [--samples 1000000] [--viewers 50] [--json FILE]

The store is filled straight into its tables (the figures of interest are the readers'); ingest is then measured
through the store's own functions, in turns with and without viewers, since the machine's speed drifts.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import httpx
import psutil
from rich.console import Console
from rich.table import Table
from sqlalchemy import insert

from benchmarks.figures import write_json
from coordinator.store.engine import Store
from coordinator.store.health import record_health
from coordinator.store.ingest import insert_frames
from coordinator.store.models import ArrivalMinute, Certificate, Device, Evaluation, FrameRow, Identity, Spool
from coordinator.store.training import insert_checkpoint, insert_evaluation, insert_run, mark_published
from side_tuning.wire.messages import BackboneInfo, Health, SpoolCount
from tests.brokers import free_port
from tests.coordinator.fleet import make_store, settings_file, settings_for
from tests.store.frames import FINGERPRINT, make_frame, received
from tests.waiting import wait_until

FRAME_SAMPLES = 50
EVALUATIONS = 40


def fill(store: Store, devices: int, samples: int) -> None:
    """A fleet that has sent `samples` in the last two hours; one device in twenty is lost, one in twenty late."""
    now = datetime.now(timezone.utc)
    each = samples // devices
    frames = max(1, each // FRAME_SAMPLES)
    names = [f"device-{n:05d}" for n in range(devices)]
    with store.write() as session:
        session.execute(
            insert(Device),
            [
                {
                    "id": n + 1, "name": name, "first_seen_at": now - timedelta(hours=2), "last_arrival_at": now - timedelta(seconds=silence(n)),
                    "rate_started_at": now - timedelta(hours=2), "rate_sum_60": 20.0, "rate_sum_300": 100.0, "rate_sum_3600": 500.0,
                    "interval_seconds": 360.0, "interval_deviation_seconds": 2.0, "backbone": FINGERPRINT if n % 3 else "cd" * 16,
                }
                for n, name in enumerate(names)
            ],
        )
        session.execute(
            insert(Spool),
            [
                {
                    "id": n + 1, "device_id": n + 1, "spool": "5b00" * 4, "created_at": now - timedelta(hours=2), "stored_through": frames,
                    "highest_sequence": frames, "known_sequences": frames, "stored_frames": frames, "stored_samples": frames * FRAME_SAMPLES,
                    "stored_bytes": frames * 33_000, "produced_seen": frames * FRAME_SAMPLES, "newest_frame_at": now - timedelta(seconds=silence(n)),
                }
                for n in range(devices)
            ],
        )
        for first in range(0, devices, 100):
            block = range(first, min(first + 100, devices))
            session.execute(
                insert(FrameRow),
                [
                    {
                        "id": n * frames + f + 1, "spool_id": n + 1, "sequence": f + 1, "received_at": now - timedelta(minutes=f), "captured_at": now,
                        "payload_bytes": 33_000, "samples": FRAME_SAMPLES, "produced": (f + 1) * FRAME_SAMPLES, "backbone": FINGERPRINT, "plan_version": 1,
                        "mode": "pooled", "has_body": False,
                    }
                    for n in block for f in range(frames)
                ],
            )
            session.connection().exec_driver_sql(
                "INSERT INTO samples (frame_id, position, device_id, sample_id, label, split, tokens) VALUES (?, ?, ?, ?, 1, 'train', 20)",
                [
                    (n * frames + f + 1, p, n + 1, (n * frames * FRAME_SAMPLES + f * FRAME_SAMPLES + p).to_bytes(16, "big"))
                    for n in block for f in range(frames) for p in range(FRAME_SAMPLES)
                ],
            )
            session.execute(
                insert(ArrivalMinute),
                [
                    {"device_id": n + 1, "minute": now.replace(second=0, microsecond=0) - timedelta(minutes=m), "frames": 1, "samples": FRAME_SAMPLES, "payload_bytes": 33_000, "duplicates": 0, "rejected": 0}
                    for n in block for m in range(0, 60, 6)
                ],
            )
        session.execute(insert(Identity), [{"device": name, "group": f"site-{n % 20}", "created_at": now, "enrolled_at": now, "revoked_reason": ""} for n, name in enumerate(names)])
        session.execute(
            insert(Certificate),
            [{"serial": f"{n:040x}", "device": name, "key_digest": "00" * 32, "pem": b"", "issued_at": now, "expires_at": now + timedelta(days=60), "revoked_reason": ""} for n, name in enumerate(names)],
        )
        insert_run(session, "run-1", {}, now)
        for step in range(EVALUATIONS):
            insert_evaluation(session, "run-1", step, "fleet", "fleet", 0.8, 0.5, 20_000, now - timedelta(minutes=EVALUATIONS - step))
        session.execute(
            insert(Evaluation),
            [{"run_id": 1, "step": step, "scope": "device", "name": name, "score": 0.8, "loss": 0.5, "samples": 10, "at": now} for step in range(EVALUATIONS) for name in names],
        )
        mark_published(session, insert_checkpoint(session, "run-1", 1, "/nowhere", {"accuracy": 0.8}, now), now)
    for name in names:
        report(store, name, frames * FRAME_SAMPLES, now)


def silence(n: int) -> float:
    return 500.0 if n % 20 == 0 else 400.0 if n % 20 == 1 else float(n % 300)


def report(store: Store, name: str, produced: int, at: datetime) -> None:
    count = SpoolCount("5b00" * 4, produced, produced, 0, 0, 0, 0, 0.0, produced // FRAME_SAMPLES + 1, produced // FRAME_SAMPLES + 1)
    health = Health(
        "online", f"session-{name}", at.timestamp(), backbone=BackboneInfo(FINGERPRINT, "bert", 4, 384, "int8"), plan_version=1, checkpoint=1, spool=count,
        forward_seconds=0.04, bytes_sent=33_000, temperature_celsius=50.0, throttled=False, memory_available_bytes=10**9, disk_free_bytes=10**10,
    )
    with store.write() as session:
        record_health(session, name, health, at)


# What people wait for.


def first_paint(place: str, folder: Path, rounds: int) -> dict[str, float]:
    """Milliseconds from asking to the first contentful paint: of a browser that never saw the server, and of one that did."""
    from playwright.sync_api import sync_playwright

    from tests.dashboards.browser import CHROMIUM

    figures: dict[str, list[float]] = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        browser.new_page().goto("about:blank")
        for _ in range(rounds):
            context = browser.new_context()
            page = context.new_page()
            for temperature in ("cold", "warm"):
                for what, path in (("fleet", "/"), ("device", "/devices/device-01234")):
                    page.goto(place + path)
                    painted = page.evaluate(
                        """() => new Promise(done => {
                            const look = () => { const found = performance.getEntriesByName('first-contentful-paint')[0]; found ? done(found.startTime) : setTimeout(look, 10); };
                            look();
                        })"""
                    )
                    figures.setdefault(f"{what}_{temperature}_ms", []).append(painted)
            context.close()
        browser.close()
    return {f"first_paint_{name}": round(statistics.median(values), 1) for name, values in figures.items()}


def cold_server(config: Path, port: int) -> dict[str, float]:
    """The very first fleet page of a server that has just started: milliseconds, and those of its processor time."""
    running = server(config, port)
    with running as place:
        before, began = psutil.Process(running.process.pid).cpu_times(), time.perf_counter()
        httpx.get(place + "/", timeout=120).raise_for_status()
        waited, after = time.perf_counter() - began, psutil.Process(running.process.pid).cpu_times()
    return {
        "first_page_of_a_new_server_ms": round(waited * 1e3, 1),
        "first_page_of_a_new_server_processor_ms": round((after.user + after.system - before.user - before.system) * 1e3, 1),
    }


class server:  # noqa: N801 - used like a function
    """The dashboard as a process of its own."""

    def __init__(self, config: Path, port: int) -> None:
        self.place = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen([sys.executable, "-m", "dashboards", "serve", "--config", str(config), "--port", str(port)], stderr=subprocess.DEVNULL)

    def __enter__(self) -> str:
        wait_until(self._answers, 120, "the dashboard answers")
        return self.place

    def _answers(self) -> bool:
        try:
            return httpx.get(self.place + "/healthz", timeout=60).status_code == 200
        except httpx.TransportError:
            return False

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(60)


class viewers:  # noqa: N801 - used like a function
    """`count` open pages in a process of their own, so that their reading is not counted as ours."""

    def __init__(self, place: str, count: int) -> None:
        self.process = subprocess.Popen([sys.executable, "-m", "benchmarks.dashboard", "--watch", place, "--viewers", str(count)], stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == "watching"

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(30)


async def watch(place: str, count: int) -> None:
    seen = 0
    ready = asyncio.Event()

    async def one() -> None:
        nonlocal seen
        async with httpx.AsyncClient(timeout=None) as client, client.stream("GET", place + "/live/fleet") as answer:
            first = True
            async for line in answer.aiter_raw():
                if first and b"data:" in line:
                    first = False
                    seen += 1
                    if seen == count:
                        ready.set()

    tasks = [asyncio.create_task(one()) for _ in range(count)]
    await ready.wait()
    print("watching", flush=True)
    await asyncio.gather(*tasks)


def cpu_share(pid: int, seconds: float) -> float:
    """Of one core."""
    process = psutil.Process(pid)
    before, began = process.cpu_times(), time.monotonic()
    time.sleep(seconds)
    after = process.cpu_times()
    return (after.user + after.system - before.user - before.system) / (time.monotonic() - began)


def ingest(store: Store, sequence: int, frames: int) -> tuple[float, int]:
    """Frames per second into the store, in the gateway's batches; and the next free sequence."""
    made = [
        received(make_frame("device-00001", n, [f"{n}-{k}" for k in range(16)], spool="1e57" * 4, width=384), datetime.now(timezone.utc))
        for n in range(sequence, sequence + frames)
    ]
    batches = [made[start : start + 64] for start in range(0, frames, 64)]
    began = time.perf_counter()
    for batch in batches:
        with store.write() as session:
            insert_frames(session, batch)
    return frames / (time.perf_counter() - began), sequence + frames


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--viewers", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5, help="of pages painted, and of ingest with and without viewers")
    parser.add_argument("--frames", type=int, default=1280, help="stored in each turn of ingest")
    parser.add_argument("--seconds", type=float, default=30.0, help="that processor time is counted for")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--watch", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.watch:
        asyncio.run(watch(given.watch, given.viewers))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = settings_for(folder)
        config = settings_file(folder, 1883)
        store = make_store(settings)
        began = time.monotonic()
        fill(store, given.devices, given.samples)
        store.checkpoint_log()
        figures: dict[str, object] = {
            "devices": given.devices, "samples": given.samples, "viewers": given.viewers, "filled_seconds": round(time.monotonic() - began, 1),
            "load_average_before": os.getloadavg()[0], "processors": os.cpu_count(),
        }
        print("filled", file=sys.stderr, flush=True)
        figures |= cold_server(config, free_port())
        running = server(config, free_port())
        with running as place:
            figures |= first_paint(place, folder, given.rounds)
            pid = running.process.pid
            figures["idle_core_share"] = round(cpu_share(pid, 5), 4)
            with viewers(place, given.viewers):
                figures["viewers_core_share_quiet_store"] = round(cpu_share(pid, given.seconds), 4)
            with viewers(place, 1):
                figures["one_viewer_core_share"] = round(cpu_share(pid, given.seconds), 4)
            alone, watched, busy, sequence = [], [], [], 1
            _, sequence = ingest(store, sequence, given.frames)  # warm
            for _ in range(given.rounds):
                rate, sequence = ingest(store, sequence, given.frames)
                alone.append(rate)
                with viewers(place, given.viewers):
                    before, began = psutil.Process(pid).cpu_times(), time.monotonic()
                    rate, sequence = ingest(store, sequence, given.frames)
                    after = psutil.Process(pid).cpu_times()
                watched.append(rate)
                busy.append((after.user + after.system - before.user - before.system) / (time.monotonic() - began))
            figures["viewers_core_share_during_ingest"] = round(statistics.mean(busy), 4)
            figures["ingest_alone_frames_per_second"] = round(statistics.median(alone), 1)
            figures["ingest_watched_frames_per_second"] = round(statistics.median(watched), 1)
            figures["ingest_slowdown"] = round(1 - statistics.median(b / a for a, b in zip(alone, watched, strict=True)), 4)
        figures["load_average_after"] = os.getloadavg()[0]
        store.close()
    table = Table("figure", "value", title="Dashboard", title_justify="left")
    for what, value in figures.items():
        table.add_row(what, str(value))
    Console().print(table)
    if given.json:
        options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(given).items()}
        write_json(given.json, figures, [], [], options)


if __name__ == "__main__":
    main()
