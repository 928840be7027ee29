"""What the demonstration sees of its fleet: one look at the store, read-only, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone

from coordinator.store.engine import Store
from coordinator.store.fleet import DeviceOverview, FleetTotals, device_overview, fleet_totals
from coordinator.store.registry import newest_plan
from coordinator.store.training import StoredCheckpoint, StoredEvaluation, checkpoints, evaluations
from side_tuning.wire.messages import TapPlan

# Agents report every two seconds here; silent for longer than a few of those is worth showing.
HEARTBEAT_SECONDS = 3.0


@dataclass(frozen=True)
class Observation:
    """The fleet at one moment."""

    devices: Mapping[str, DeviceOverview]
    totals: FleetTotals
    plan: TapPlan | None
    published: StoredCheckpoint | None  # the newest that devices can fetch
    newest: StoredCheckpoint | None  # the newest that the trainer offered
    evaluations: Sequence[StoredEvaluation] = field(default=())  # of the fleet, oldest first

    @property
    def step(self) -> int:
        """The newest step that was evaluated."""
        return self.evaluations[-1].step if self.evaluations else 0

    def produced(self, device: str) -> int:
        """Samples that the device turned into frames, as far as the coordinator knows."""
        return self.devices[device].ledger.produced if device in self.devices else 0

    def refused(self, device: str) -> int:
        """Rows that the device could not use."""
        health = self.devices[device].health if device in self.devices else None
        return sum(health.spool.refused.values()) if health is not None and health.spool is not None else 0

    def spooled(self, device: str) -> int:
        return self.devices[device].ledger.spooled if device in self.devices else 0


def observe(store: Store) -> Observation:
    """One consistent look."""
    with store.read() as session:
        offered = checkpoints(session)
        run = offered[0].run if offered else None
        return Observation(
            devices={one.device: one for one in device_overview(session, datetime.now(timezone.utc), HEARTBEAT_SECONDS)},
            totals=fleet_totals(session),
            plan=newest_plan(session),
            published=next((one for one in offered if one.published_at is not None), None),
            newest=offered[0] if offered else None,
            evaluations=() if run is None else evaluations(session, run),
        )


def scores_at(store: Store, generation: int) -> tuple[float | None, dict[str, float]]:
    """Held-out score of the fleet and of each device, measured by the trainer with the checkpoint `generation`."""
    with store.read() as session:
        found = next((one for one in checkpoints(session) if one.generation == generation), None)
        if found is None:
            return None, {}
        fleet = [one for one in evaluations(session, found.run) if one.step == found.step]
        devices = [one for one in evaluations(session, found.run, "device", limit=100_000) if one.step == found.step]
    return fleet[-1].score if fleet else None, {one.name: one.score for one in devices}
