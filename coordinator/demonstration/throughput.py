"""How many frames a second the gateway can store: full frames of this run, sent again as other devices' to a fresh one.

Same broker program, same kind of database, nothing else running. Sender, broker and gateway share this machine, so it
is a lower bound.
"""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from dataclasses import replace
from pathlib import Path
from typing import cast

from coordinator.demonstration.errors import DemoError
from coordinator.demonstration.fleet import LOOPBACK, free_port
from coordinator.demonstration.observation import Observation
from coordinator.demonstration.processes import Child
from coordinator.demonstration.toml import write_toml
from coordinator.local_broker import BrokerChoice, broker_command
from coordinator.settings import CoordinatorSettings, load_settings
from coordinator.store.engine import Store, open_store
from coordinator.store.fleet import fleet_totals
from coordinator.store.registry import backbones, insert_plan, register_backbone
from coordinator.store.schema import upgrade
from coordinator.store.training import frame_payloads, training_samples_after
from side_tuning.broker_connection import BrokerConnection, PublishHandle
from side_tuning.wire import topics
from side_tuning.wire.frame import Frame, decode_frame, encode_frame

FRAMES = 1_000
SENDERS = 4
WINDOW_FRAMES = 128
EXAMPLES = 16
LOOKED_AT_SAMPLES = 20_000
CONNECTING_SECONDS = 30.0
STORING_SECONDS = 120.0


def measure_gateway(store: Store, seen: Observation, folder: Path, *, broker: str) -> float | None:
    """Frames stored per second, from the first publish to the last commit; None without frames to send."""
    examples = _fullest_frames(store)
    if not examples or seen.plan is None:
        return None
    config = folder / "coordinator.toml"
    broker_settings = {"host": LOOPBACK, "port": free_port(), "tls": False}
    write_toml(config, {"data_directory": str(folder / "data"), "broker": broker_settings, "task": {"kind": seen.plan.task, "labels": list(seen.plan.labels)}})
    settings = load_settings(config)
    _register(settings, store, seen)
    command = broker_command(cast("BrokerChoice", broker), settings)
    assert command is not None, broker
    children = [
        Child("broker", command, folder / "broker.log"),
        Child("gateway", [sys.executable, "-m", "coordinator.cli", "gateway", "--config", str(config)], folder / "gateway.log"),
    ]
    connection = BrokerConnection(settings.broker, "throughput", reconnect_min_seconds=0.1)
    fresh = open_store(settings.database_url, read_only=True)
    payloads = _as_other_devices(examples)
    try:
        for child in children:
            child.start()
        connection.start()
        _store_one(connection, fresh, children, payloads.popleft())
        began = time.monotonic()
        _send(connection, children, payloads)
        _wait_until_stored(fresh, children, FRAMES + 1)
        return FRAMES / (time.monotonic() - began)
    finally:
        connection.stop()
        fresh.close()
        for child in reversed(children):
            child.end()


def _fullest_frames(store: Store) -> list[Frame]:
    with store.read() as session:
        samples = Counter(sample.frame_id for sample in training_samples_after(session, 0, LOOKED_AT_SAMPLES))
        payloads = frame_payloads(session, [frame for frame, _ in samples.most_common(EXAMPLES)])
    return [decode_frame(payload) for payload in payloads.values()]


def _register(settings: CoordinatorSettings, store: Store, seen: Observation) -> None:
    assert seen.plan is not None
    upgrade(settings.database_url)
    with store.read() as session:
        known = [row.manifest for row in backbones(session).values()]
    fresh = open_store(settings.database_url)
    try:
        with fresh.write() as session:
            for manifest in known:
                register_backbone(session, manifest)
            insert_plan(session, seen.plan)
    finally:
        fresh.close()


def _as_other_devices(examples: list[Frame]) -> deque[tuple[str, bytes, dict[str, str]]]:
    """(device, payload, properties) of one frame to warm up with and those that count, encoded before the clock starts."""
    frames: deque[tuple[str, bytes, dict[str, str]]] = deque()
    produced = [0] * SENDERS
    for number in range(FRAMES + 1):
        sender, sequence = number % SENDERS, number // SENDERS + 1
        example = examples[number % len(examples)]
        produced[sender] += len(example.samples)
        device, spool = f"sender-{sender + 1}", f"{sender + 1:016x}"
        samples = tuple(sample._replace(id=f"{number:08x}{place:08x}") for place, sample in enumerate(example.samples))
        frame = replace(example, device=device, spool=spool, sequence=sequence, produced=produced[sender], samples=samples)
        frames.append((device, encode_frame(frame), {"spool": spool, "sequence": str(sequence)}))
    return frames


def _store_one(connection: BrokerConnection, fresh: Store, children: list[Child], first: tuple[str, bytes, dict[str, str]]) -> None:
    """Until one frame is through, gateway and broker are still starting."""
    deadline = time.monotonic() + CONNECTING_SECONDS
    while not _stored(fresh):
        if time.monotonic() > deadline:
            raise DemoError(f"the gateway stored nothing within {CONNECTING_SECONDS:.0f} s. It last said:\n{children[-1].last_words()}")
        _check(children)
        if connection.connected:
            device, payload, properties = first
            connection.publish(topics.activations(device), payload, properties=properties).wait(2.0)
        time.sleep(0.2)


def _send(connection: BrokerConnection, children: list[Child], payloads: deque[tuple[str, bytes, dict[str, str]]]) -> None:
    window: deque[PublishHandle] = deque()
    while payloads:
        device, payload, properties = payloads.popleft()
        window.append(connection.publish(topics.activations(device), payload, properties=properties))
        if len(window) >= WINDOW_FRAMES and not window.popleft().wait(30.0):
            _check(children)
            raise DemoError(f"the broker did not take a frame: {connection.last_error or 'no acknowledgement within 30 s'}")


def _wait_until_stored(fresh: Store, children: list[Child], frames: int) -> None:
    deadline = time.monotonic() + STORING_SECONDS
    while (stored := _stored(fresh)) < frames:
        _check(children)
        if time.monotonic() > deadline:
            raise DemoError(f"the gateway stored {stored} of {frames} frames within {STORING_SECONDS:.0f} s. It last said:\n{children[-1].last_words()}")
        time.sleep(0.02)


def _stored(fresh: Store) -> int:
    with fresh.read() as session:
        return fleet_totals(session).frames_stored


def _check(children: list[Child]) -> None:
    for child in children:
        child.check()
