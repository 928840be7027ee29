"""A store with a small fleet in it, written through the store's own functions, and the dashboard over it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from coordinator.settings import CoordinatorSettings
from coordinator.store.engine import Store
from coordinator.store.health import record_health
from coordinator.store.ingest import insert_frames
from dashboards.server import Server, make_server
from side_tuning.wire.messages import BackboneInfo, Health, SpoolCount
from tests.brokers import free_port
from tests.coordinator.fleet import settings_for
from tests.store.frames import FINGERPRINT, SPOOL, make_frame, received
from tests.waiting import wait_until


def now() -> datetime:
    return datetime.now(timezone.utc)


def dashboard_settings(folder: Path, **dashboard: object) -> CoordinatorSettings:
    return settings_for(folder, dashboard={"port": free_port(), "every_seconds": 0.2, **dashboard})


def send(store: Store, device: str, sequence: int, at: datetime | None = None, **more: object) -> None:
    """One frame with two samples from `device`."""
    frame = make_frame(device, sequence, (f"{device}{sequence}a", f"{device}{sequence}b"), **more)
    with store.write() as session:
        insert_frames(session, [received(frame, at or now())])


def say(store: Store, device: str, produced: int, at: datetime | None = None, **more: object) -> None:
    """A health message in which the device has `produced` samples, all of them receipted."""
    at = at or now()
    count = SpoolCount(SPOOL, produced, produced, 0, 0, 0, 0, 0.0, produced // 2 + 1, produced // 2 + 1)
    values = {
        "backbone": BackboneInfo(FINGERPRINT, "bert", 4, 32, "float"), "plan_version": 1, "spool": count, "forward_seconds": 0.041,
        "temperature_celsius": 51.5, "memory_available_bytes": 700_000_000, "disk_free_bytes": 9_000_000_000, "bytes_sent": 1300 * produced,
        "agent_version": "0.1.0", "load_1m": 0.7, "throttled": False, **more,
    }
    with store.write() as session:
        record_health(session, device, Health("online", f"of-{device}", at.timestamp(), **values), at)


@contextmanager
def serving(settings: CoordinatorSettings) -> Iterator[tuple[str, Server]]:
    """The dashboard on its port, in a thread; ends with its streams open."""
    server = make_server(settings)
    thread = threading.Thread(target=server.run, name="dashboard", daemon=True)
    thread.start()
    wait_until(lambda: server.started or not thread.is_alive(), 60, "the dashboard listens")
    try:
        yield f"http://127.0.0.1:{settings.dashboard.port}", server
    finally:
        server._live.close()
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
