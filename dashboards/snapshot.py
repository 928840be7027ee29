"""The fleet at one moment: what every page and `/metrics` share, read in one short transaction."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from coordinator.store.engine import Store
from coordinator.store.fleet import DeviceOverview, FleetMemory, FleetTotals, device_overview, fleet_totals
from coordinator.store.programs import ProgramState, program_states
from coordinator.store.training import StoredCheckpoint, checkpoints
from coordinator.store.views import (
    DeviceAccess,
    Measured,
    device_access,
    log_bytes,
    newest_run,
    score_series,
    task_of_run,
)
from side_tuning.tasks import METRICS, Metric

STATES = ("lost", "late", "quiet", "offline", "on-time")
PLOT_POINTS = 300


@dataclass(frozen=True)
class FleetSnapshot:
    """The fleet at `at` (UTC). Shared between threads: nothing in it is ever changed."""

    at: datetime
    devices: tuple[DeviceOverview, ...]  # by name
    totals: FleetTotals
    access: Mapping[str, DeviceAccess]  # by device, also of those that were never heard of
    programs: tuple[ProgramState, ...]  # by name
    run: str | None  # the newest training run
    metric: Metric  # what that run's scores are
    scores: tuple[Measured, ...]  # of that run over the whole fleet, oldest first
    checkpoints: tuple[StoredCheckpoint, ...]  # newest first
    log_bytes: int | None  # of SQLite's write-ahead log; None on PostgreSQL
    read_seconds: float  # how long reading took

    def states(self) -> dict[str, int]:
        """How many devices are in each state, every state named."""
        counted = Counter(one.state for one in self.devices)
        return {state: counted[state] for state in STATES}  # type: ignore[index]

    def device(self, name: str) -> DeviceOverview | None:
        """The device of this name, if it was ever heard of."""
        return next((one for one in self.devices if one.device == name), None)

    @property
    def samples_per_second(self) -> float:
        """Over the last five minutes, all devices."""
        return sum(one.rate_5m for one in self.devices)


def take_snapshot(store: Store, now: datetime, heartbeat_seconds: float, memory: FleetMemory) -> FleetSnapshot:
    """Read the fleet as it is now."""
    began = time.perf_counter()
    with store.read() as session:
        devices = device_overview(session, now, heartbeat_seconds, memory=memory)
        run = newest_run(session)
        return FleetSnapshot(
            at=now,
            devices=tuple(devices),
            totals=fleet_totals(session, devices),
            access=device_access(session),
            programs=tuple(program_states(session).values()),
            run=run,
            metric=METRICS[task_of_run(session, run)],
            scores=() if run is None else tuple(score_series(session, run, "fleet", limit=PLOT_POINTS)),
            checkpoints=tuple(checkpoints(session)),
            log_bytes=log_bytes(session),
            read_seconds=time.perf_counter() - began,
        )
