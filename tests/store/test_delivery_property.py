"""Whatever a network does to the messages of honest devices, nothing is lost, stored twice or receipted too early."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from sqlalchemy import select

from coordinator.store.engine import open_store
from coordinator.store.fleet import device_overview, fleet_totals
from coordinator.store.health import record_health
from coordinator.store.ingest import ReceivedFrame, insert_frames, receipts_for
from coordinator.store.models import Device, FramePart, FrameRow, Rejection, SampleRow, Spool
from coordinator.store.schema import upgrade
from side_tuning.wire.frame import encode_frame, split_frame
from side_tuning.wire.messages import Receipt
from tests.store.frames import after, make_frame, received, report, unreadable

DEVICES = ("kitchen", "attic")


@dataclass
class SpooledItem:
    sequence: int
    payload: bytes
    samples: int  # counted on the first part only, as the real spool does


@dataclass
class DeviceSpool:
    """What an honest agent keeps: the real one's counters, in memory."""

    device: str
    name: str
    next_sequence: int = 1
    pending: dict[int, SpooledItem] = field(default_factory=dict)
    produced: int = 0
    receipted: int = 0
    dropped: int = 0
    floor_reported: int = 0
    reports: int = 0

    def append(self, names: list[int], large: bool) -> None:
        self.produced += len(names)
        width = 64 if large else 4
        frame = make_frame(self.device, self.next_sequence, names, self.produced, self.name, width)
        payloads = split_frame(encode_frame(frame), 1024) if large else [encode_frame(frame)]
        for place, payload in enumerate(payloads):
            self.pending[self.next_sequence] = SpooledItem(self.next_sequence, payload, len(names) if place == 0 else 0)
            self.next_sequence += 1

    def acknowledge(self, told: Receipt) -> None:
        for sequence in [n for n in self.pending if n <= told.stored_through or n in told.stored_ahead]:
            self.receipted += self.pending.pop(sequence).samples

    def drop_oldest(self) -> None:
        """A frame goes whole: a part that is left without its first makes no frame any more."""
        oldest = min(self.pending)
        self.dropped += self.pending.pop(oldest).samples
        while self.pending and self.pending[min(self.pending)].samples == 0:
            del self.pending[min(self.pending)]

    @property
    def floor(self) -> int:
        return min(self.pending, default=self.next_sequence)


class Delivery(RuleBasedStateMachine):
    """Two devices, a coordinator with a real SQLite store, and a network without manners."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        url = f"sqlite:///{self.folder}/store.db"
        upgrade(url)
        self.store = open_store(url)
        self.spools = {name: DeviceSpool(name, "5b" * 8) for name in DEVICES}
        self.old_spools: list[DeviceSpool] = []
        self.flight: list[ReceivedFrame] = []
        self.names = 0
        self.seconds = 0.0
        self.flashed = 0

    def now(self) -> datetime:
        self.seconds += 0.25
        return after(self.seconds)

    @rule(device=st.sampled_from(DEVICES), samples=st.integers(1, 3), repeat=st.booleans(), large=st.integers(0, 4))
    def produce(self, device: str, samples: int, repeat: bool, large: int) -> None:
        fresh = list(range(self.names, self.names + samples))
        if repeat and self.names:  # an agent that forgot what it had sent
            fresh[0] = self.names // 2
        if large == 0:
            fresh = list(range(self.names, self.names + 16))
        self.names += len(fresh)
        self.spools[device].append(fresh, large == 0)

    @rule(device=st.sampled_from(DEVICES), choose=st.randoms(use_true_random=False), copies=st.integers(1, 2))
    def publish(self, device: str, choose, copies: int) -> None:
        pending = list(self.spools[device].pending.values())
        for item in choose.sample(pending, min(len(pending), 4)):
            self.flight.extend([received(item.payload)] * copies)

    @rule(choose=st.randoms(use_true_random=False), damage=st.integers(0, 2), keep=st.booleans())
    def deliver(self, choose, damage: int, keep: bool) -> None:
        """A batch in any order; now and then a message is damaged, or stays in the broker to come again."""
        choose.shuffle(self.flight)
        batch, self.flight = self.flight[:5], self.flight[5:]
        if keep:
            self.flight.extend(batch[:2])
        if batch and damage == 0:
            hurt = batch[0]
            assert hurt.sequence is not None
            batch[0] = unreadable(hurt.device, hurt.sequence, spool=hurt.spool, payload=hurt.payload[:40])
        self._insert(batch)

    @rule(device=st.sampled_from(DEVICES))
    def receipt_arrives(self, device: str) -> None:
        spool = self.spools[device]
        with self.store.read() as session:
            told = receipts_for(session, [(device, spool.name)]).get((device, spool.name))
        if told is not None:
            spool.acknowledge(told)

    @rule(device=st.sampled_from(DEVICES))
    def full_spool_drops(self, device: str) -> None:
        if self.spools[device].pending:
            self.spools[device].drop_oldest()

    @rule(device=st.sampled_from(DEVICES))
    def report_arrives(self, device: str) -> None:
        self._report(self.spools[device])

    @rule(device=st.sampled_from(DEVICES))
    def card_is_flashed_anew(self, device: str) -> None:
        if self.spools[device].produced == 0 or self.flashed == 2:
            return
        self.flashed += 1
        self.old_spools.append(self.spools[device])
        self.spools[device] = DeviceSpool(device, f"{self.flashed:02x}" * 8)
        self.flight = [item for item in self.flight if item.device != device]

    @invariant()
    def receipts_tell_the_truth(self) -> None:
        with self.store.read() as session:
            told = receipts_for(session, {(s.device, s.name) for s in self._all()})
            safe = self._safe_sequences(session)
        for key, receipt in told.items():
            here, floor = safe.get(key, Counter()), self._spool(key).floor_reported
            missing = [n for n in range(1, receipt.stored_through + 1) if n >= floor and n not in here]
            assert not missing, (key, receipt, missing)
            assert set(receipt.stored_ahead) <= set(here)
            open_next = receipt.stored_through + 1
            assert open_next not in here, "the receipt could have said more"
            assert {n for n in here if n > receipt.stored_through} == set(receipt.stored_ahead)
            assert {n for n, _ in receipt.rejected} <= set(here)
            assert max(here.values(), default=1) == 1, "a sequence is in the store twice"

    @invariant()
    def every_ledger_balances(self) -> None:
        with self.store.read() as session:
            for device in device_overview(session, after(self.seconds)):
                for spool in device.spools:
                    assert spool.ledger.balanced, (device.device, spool)
                    produced = self._spool((device.device, spool.spool)).produced
                    assert spool.ledger.produced <= produced
                    parts = (spool.ledger.stored, spool.ledger.stored_again, spool.ledger.rejected, spool.ledger.dropped)
                    assert sum(parts) + spool.ledger.abandoned + spool.ledger.missing == spool.ledger.produced

    def teardown(self) -> None:
        try:
            self._settle()
        finally:
            self.store.close()
            shutil.rmtree(self.folder)

    def _settle(self) -> None:
        """The network heals: all is resent, receipted and reported; then every count must be exact."""
        for spool in self.spools.values():
            self._insert([received(item.payload) for item in spool.pending.values()])
            self.receipt_arrives(spool.device)
            assert not spool.pending
            self._report(spool)
        self.receipts_tell_the_truth()
        self.every_ledger_balances()
        with self.store.read() as session:
            for device in device_overview(session, after(self.seconds)):
                assert device.ledger.settled, device
                assert device.gap_frames == 0
            totals = fleet_totals(session)
            assert totals.frames_stored == len(session.scalars(select(FrameRow.id)).all())
            assert totals.samples_stored == len(session.scalars(select(SampleRow.id)).all())
            assert totals.frames_rejected == len(session.scalars(select(Rejection.id)).all())
            for spool_row in session.scalars(select(Spool).where(Spool.superseded_at.is_(None))):
                assert spool_row.assembling_samples == 0

    def _insert(self, batch: list[ReceivedFrame]) -> None:
        with self.store.write() as session:
            outcomes = insert_frames(session, [_at(item, self.now) for item in batch])
        assert len(outcomes) == len(batch)

    def _report(self, spool: DeviceSpool) -> None:
        spooled = sum(item.samples for item in spool.pending.values())
        spool.reports += 1
        now = self.now()
        health = report(
            spool.produced, spool.receipted, spooled, spool.floor, now, spool.dropped, spool.name, session=f"{spool.name}{spool.reports}"
        )
        with self.store.write() as session:
            record_health(session, spool.device, health, now)
        spool.floor_reported = spool.floor

    def _all(self) -> list[DeviceSpool]:
        return [*self.spools.values(), *self.old_spools]

    def _spool(self, key: tuple[str, str]) -> DeviceSpool:
        return next(spool for spool in self._all() if (spool.device, spool.name) == key)

    def _safe_sequences(self, session) -> dict[tuple[str, str], Counter]:
        names = {
            spool_id: (device, spool)
            for spool_id, device, spool in session.execute(select(Spool.id, Device.name, Spool.spool).join(Spool.device))
        }
        safe: dict[tuple[str, str], Counter] = {name: Counter() for name in names.values()}
        for model in (FrameRow, Rejection):
            for spool_id, first, span in session.execute(select(model.spool_id, model.sequence, model.span)):
                safe[names[spool_id]].update(range(first, first + span))
        for spool_id, sequence in session.execute(select(FramePart.spool_id, FramePart.sequence)):
            safe[names[spool_id]][sequence] += 1
        return safe


def _at(item: ReceivedFrame, now: Callable[[], datetime]) -> ReceivedFrame:
    from dataclasses import replace

    return replace(item, received_at=now())


TestDelivery = Delivery.TestCase
TestDelivery.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
