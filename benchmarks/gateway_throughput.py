"""Frames per second through the gateway: real mosquitto, a gateway process, SQLite with synchronous=FULL.

    python -m benchmarks.gateway_throughput [--frames 4000] [--devices 8] [--frame-bytes 20000]

Prints one line; every frame is receipted before the clock stops.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil

from coordinator.store.registry import insert_plan, register_backbone
from tests.brokers import mosquitto
from tests.coordinator.fleet import (
    MANIFEST,
    PLAN,
    ScriptedDevice,
    make_payload,
    make_store,
    settings_file,
    settings_for,
    stored_frames,
)
from tests.waiting import wait_until

SAMPLES = 32  # MiniLM, three taps in int4: 648 bytes a sample


def cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=4000)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--frame-bytes", type=int, default=20_000)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    given = parser.parse_args()
    width = max(8, (given.frame_bytes // given.samples // PLAN.blocks - 12) * 2)
    manifest = replace(MANIFEST, fingerprint="be" * 16, width=width)
    plan = replace(PLAN, version=2)
    with tempfile.TemporaryDirectory() as name, mosquitto(Path(name) / "broker", "max_queued_messages 0") as broker:
        folder = Path(name)
        store = make_store(settings_for(folder, broker.settings))
        with store.write() as session:
            register_backbone(session, manifest)
            insert_plan(session, plan)
        per_device = given.frames // given.devices
        devices = [
            ScriptedDevice(
                f"d{n}",
                broker.settings,
                {s: make_payload(f"d{n}", s, samples=given.samples, manifest=manifest, plan=plan) for s in range(1, per_device + 1)},
                window=64,
                resend_seconds=30,
            )
            for n in range(given.devices)
        ]
        size = sum(len(payload) for one in devices for payload in one.payloads.values()) / given.frames
        log = (folder / "log").open("wb")
        gateway = subprocess.Popen(
            [sys.executable, "-m", "coordinator.cli", "gateway", "--config", str(settings_file(folder, broker.port))], stderr=log
        )
        wait_until(lambda: "listening to" in (folder / "log").read_text(), 60, "the gateway listens")
        cpu_before = cpu_seconds(gateway.pid)
        began = time.monotonic()
        for one in devices:
            one.start()
        wait_until(lambda: all(one.done for one in devices), 300, "all frames are receipted")
        seconds = time.monotonic() - began
        cpu = cpu_seconds(gateway.pid) - cpu_before
        for one in devices:
            one.stop()
        gateway.terminate()
        gateway.wait(30)
        assert len(stored_frames(store)) == per_device * given.devices
        print(
            f"{per_device * given.devices} frames of {size:.0f} bytes with {given.samples} samples in {seconds:.2f} s: "
            f"{per_device * given.devices / seconds:.0f} frames/s, {per_device * given.devices * given.samples / seconds:.0f} samples/s, "
            f"{per_device * given.devices * size / seconds / 1e6:.1f} MB/s; "
            f"{cpu / given.frames * 1e3:.2f} ms of the gateway's processor time a frame"
        )
        store.close()


if __name__ == "__main__":
    main()
