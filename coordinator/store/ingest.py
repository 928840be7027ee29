"""What the gateway writes: a batch of received frames, all or nothing, with one outcome for each.

Rules: a frame is named by (device, spool, sequence) and a sample by (device, sample id); whatever comes twice is
stored once and said to be a duplicate. Few statements a batch, whatever its size. The caller commits, and only then
acknowledges and sends `receipts_for`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from sqlalchemy import func, select, tuple_, update
from sqlalchemy.orm import Session

from coordinator import arrivals
from coordinator.store.accounts import advance_spool, insert_into, open_counts
from coordinator.store.counts import AnyDevice, AnySpool, DeviceCounts, SpoolCounts, write_counts
from coordinator.store.errors import StoreError
from coordinator.store.health import record_health
from coordinator.store.models import ArrivalMinute, Device, FrameRow, Rejection, SampleRow, Spool
from coordinator.store.parts import WholeFrame, keep_parts
from coordinator.store.receipts import receipts_for
from coordinator.store.rejections import RejectedMessage, has_identity, insert_rejection, keep_rejected
from coordinator.store.statements import bind_moment, insert_rows
from coordinator.store.timestamps import from_seconds, to_seconds
from side_tuning.wire.frame import Frame, Part

_FRAME_COLUMNS = (
    "spool_id", "sequence", "span", "received_at", "captured_at", "payload_bytes", "samples", "produced", "backbone", "plan_version", "mode", "has_body",
)  # fmt: skip
_SAMPLE_COLUMNS = ("frame_id", "position", "device_id", "sample_id", "label", "split", "tokens")
_LAST_ROWS = "SELECT (SELECT coalesce(max(id), 0) FROM frames), (SELECT coalesce(max(id), 0) FROM samples)"

Outcome = Literal["stored", "duplicate", "rejected", "part"]
# Why a frame must not be accepted, or None. The gateway's rules (registered backbone, known plan, shapes).
FrameCheck = Callable[[Frame], str | None]


@dataclass(frozen=True)
class ReceivedFrame:
    """A message from a device's frame topic. `reason` says why it is rejected; then `frame` may be None."""

    device: str  # from the topic
    topic: str
    payload: bytes
    received_at: datetime
    frame: Frame | Part | None = None
    reason: str | None = None
    spool: str | None = None  # known from the header or the message's properties, even where `frame` is None
    sequence: int | None = None


@dataclass(frozen=True)
class FrameOutcome:
    """What became of one message. `samples` is how many were new, `duplicate_samples` how many the store had."""

    outcome: Outcome
    reason: str = ""
    samples: int = 0
    duplicate_samples: int = 0


def insert_frames(session: Session, batch: Sequence[ReceivedFrame], check: FrameCheck | None = None) -> list[FrameOutcome]:
    """Store a batch. Messages with a `reason` become rejections; parts wait until their frame is complete.

    `check` is asked about a frame that was joined from its parts, which the caller cannot have looked at.
    """
    if not batch:
        return []
    first_at = min(item.received_at for item in batch)
    named = [item for item in batch if has_identity(*_identity(item))]
    devices, spools = open_counts(
        session, (item.device for item in batch), ((item.device, str(_identity(item)[0])) for item in named), first_at
    )
    work = _Batch(session, devices, spools, batch)

    work.store_whole([place for place, item in enumerate(batch) if isinstance(item.frame, Frame) and item.reason is None])
    work.store_parts([place for place, item in enumerate(batch) if isinstance(item.frame, Part) and item.reason is None], check)
    work.reject([place for place, item in enumerate(batch) if item.frame is None or item.reason is not None])
    return work.finish()


def accept_rejected(session: Session, rejection_id: int, frame: Frame) -> FrameOutcome:
    """Store a frame that had been rejected and would be accepted now; its rejection goes, the ledger moves over."""
    rejection = session.get_one(Rejection, rejection_id)
    if rejection.payload is None:
        raise StoreError(f"rejection {rejection_id} has no payload any more: retention dropped it, the frame cannot be tried again")
    name = session.scalars(select(Device.name).where(Device.id == rejection.device_id)).one()
    was = None if rejection.spool_id is None else session.scalars(select(Spool.spool).where(Spool.id == rejection.spool_id)).one()
    named = {(name, one) for one in (was, frame.spool) if one is not None}
    devices, spools = open_counts(session, [name], named, rejection.received_at)
    device, spool = devices[name], None if was is None else spools[name, was]
    item = ReceivedFrame(name, rejection.topic, rejection.payload, rejection.received_at, frame, None, frame.spool, frame.sequence)
    if spool is None:
        device.unattributed_rejections -= 1
    else:
        spool.rejected_frames -= 1
        spool.known_sequences -= rejection.span
        # Its sequence lies below stored_through by now; storing it takes it back from "skipped".
        spool.skipped_sequences += rejection.span if rejection.sequence is not None and rejection.sequence <= spool.stored_through else 0
        if rejection.samples is None:
            spool.unreadable_frames -= 1
        else:
            spool.rejected_samples -= rejection.samples
    span = rejection.span
    session.delete(rejection)
    session.flush()
    work = _Batch(session, devices, spools, [item], counts_as_arrival=False)
    work.store_whole([0], span=span)
    return work.finish()[0]


def _identity(item: ReceivedFrame) -> tuple[str | None, int | None]:
    if item.frame is not None:
        return item.frame.spool, item.frame.sequence
    return item.spool, item.sequence


class _Batch:
    """The state of one `insert_frames` call: rows it works on, outcomes so far, and what moves the counters."""

    def __init__(
        self,
        session: Session,
        devices: dict[str, DeviceCounts],
        spools: dict[tuple[str, str], SpoolCounts],
        batch: Sequence[ReceivedFrame],
        *,
        counts_as_arrival: bool = True,
    ) -> None:
        self.counts_as_arrival = counts_as_arrival
        self.session = session
        self.bind = bind_moment(session)
        self.devices = devices
        self.spools = spools
        self.batch = batch
        self.outcomes: dict[int, FrameOutcome] = {}
        self.fresh: dict[int, list[tuple[int, int]]] = defaultdict(list)  # spool id -> spans that came in
        self.minutes: dict[tuple[int, datetime], dict[str, int]] = {}

    def spool_of(self, item: ReceivedFrame) -> SpoolCounts | None:
        spool, sequence = _identity(item)
        return self.spools[item.device, str(spool)] if has_identity(spool, sequence) else None

    def store_whole(self, places: Sequence[int], span: int = 1) -> None:
        """Frames that came in one message."""
        frames: dict[int, WholeFrame] = {}
        for place in places:
            item = self.batch[place]
            spool = self.spool_of(item)
            assert spool is not None
            assert isinstance(item.frame, Frame)
            frames[place] = WholeFrame(spool, item.frame, item.payload, item.received_at, span)
        self._store(frames)

    def store_parts(self, places: Sequence[int], check: FrameCheck | None) -> None:
        """Parts, and the frames that they complete."""
        if not places:
            return
        spools: dict[int, SpoolCounts] = {}
        for place in places:
            spool = self.spool_of(self.batch[place])
            assert spool is not None
            spools[place] = spool
        kept = keep_parts(self.session, {place: (spools[place], self.batch[place]) for place in places})
        complete: dict[int, WholeFrame] = {}
        for place in places:
            item, spool = self.batch[place], spools[place]
            assert isinstance(item.frame, Part)
            if place in kept.duplicates:
                self._count_duplicate(place, spool)
                continue
            self.fresh[spool.id].append((item.frame.sequence, 1))
            self.outcomes[place] = FrameOutcome("part")
        for place, whole in kept.complete.items():
            reason = whole if isinstance(whole, str) else (check(whole.frame) if check else None)
            part = self.batch[place].frame
            assert isinstance(part, Part)
            if reason is not None:
                message = RejectedMessage(
                    device=self.batch[place].device,
                    topic=self.batch[place].topic,
                    payload=kept.payloads[place],
                    reason=reason,
                    received_at=self.batch[place].received_at,
                    spool=part.spool,
                    sequence=part.first,
                    span=part.count,
                    samples=part.samples,
                    produced=part.produced,
                )
                self._reject(place, message, was_here=True)
            elif not isinstance(whole, str):
                complete[place] = whole
        self._store(complete)

    def reject(self, places: Sequence[int]) -> None:
        for place in places:
            item = self.batch[place]
            frame = item.frame
            samples: int | None = None
            if isinstance(frame, Frame):
                samples = len(frame.samples)
            elif isinstance(frame, Part):  # the whole frame's count, told once
                samples = frame.samples if frame.index == 0 else 0
            message = RejectedMessage(
                device=item.device,
                topic=item.topic,
                payload=item.payload,
                reason=item.reason or "the frame could not be read",
                received_at=item.received_at,
                spool=_identity(item)[0],
                sequence=_identity(item)[1],
                samples=samples,
                produced=0 if frame is None else frame.produced,
            )
            self._reject(place, message)

    def finish(self) -> list[FrameOutcome]:
        """Move every touched spool on, write the counts per minute, and give the outcomes in the order of the batch."""
        by_id = {spool.id: spool for spool in self.spools.values()}
        for spool_id, spans in self.fresh.items():
            advance_spool(self.session, by_id[spool_id], spans)
        self.session.flush()
        write_counts(self.session, list(self.devices.values()))
        write_counts(self.session, list(self.spools.values()))
        self.session.expire_all()  # mapped rows of the same devices, read before, are old now
        if self.minutes:
            insert = insert_into(self.session, ArrivalMinute)
            counts = ("frames", "samples", "payload_bytes", "duplicates", "rejected")
            add = {name: getattr(ArrivalMinute, name) + insert.excluded[name] for name in counts}
            rows = [{"device_id": device, "minute": minute, **counted} for (device, minute), counted in self.minutes.items()]
            self.session.execute(insert.on_conflict_do_update(index_elements=["device_id", "minute"], set_=add), rows)
        return [self.outcomes[place] for place in range(len(self.batch))]

    def _store(self, frames: dict[int, WholeFrame]) -> None:
        """Insert whole frames, their samples and bodies; what is there already becomes a duplicate."""
        new: dict[tuple[int, int], int] = {}  # (spool id, sequence) -> place
        rejected = self._rejected_already(frames.values())
        for place, whole in frames.items():
            key = (whole.spool.id, whole.frame.sequence)
            if key in new or key in rejected:
                self._count_duplicate(place, whole.spool)
            else:
                new[key] = place
        if not new:
            return
        # There is one writer, so every row above these is ours: short ranges instead of an answer for each row.
        last_frame, last_sample = self.session.connection().exec_driver_sql(_LAST_ROWS).one()
        rows = [self._frame_row(frames[place]) for place in new.values()]
        insert_rows(self.session, "frames", _FRAME_COLUMNS, rows, conflict="ON CONFLICT (spool_id, sequence) DO NOTHING")
        table = FrameRow.__table__
        inserted = self.session.connection().execute(
            select(table.c.id, table.c.spool_id, table.c.sequence).where(table.c.id > last_frame)
        )
        stored = {new[spool_id, sequence]: frame_id for frame_id, spool_id, sequence in inserted}
        for place in new.values():
            if place not in stored:
                self._count_duplicate(place, frames[place].spool)
        if not stored:
            return
        fresh_samples = self._insert_samples({frame_id: frames[place] for place, frame_id in stored.items()}, last_sample)
        self._insert_bodies({frame_id: frames[place].payload for place, frame_id in stored.items()}, fresh_samples)
        for place, frame_id in sorted(stored.items()):
            self._count_stored(place, frames[place], fresh_samples.get(frame_id, 0))

    def _rejected_already(self, frames: Iterable[WholeFrame]) -> set[tuple[int, int]]:
        keys = [(whole.spool.id, whole.frame.sequence) for whole in frames if whole.spool.rejected_frames]
        if not keys:
            return set()
        known = self.session.execute(
            select(Rejection.spool_id, Rejection.sequence).where(tuple_(Rejection.spool_id, Rejection.sequence).in_(keys))
        )
        return {(spool_id, sequence) for spool_id, sequence in known if spool_id is not None and sequence is not None}

    def _insert_samples(self, frames: dict[int, WholeFrame], last_sample: int) -> dict[int, int]:
        """Insert the samples that their device has not sent before; how many of each frame that were."""
        rows = [
            (frame_id, position, whole.spool.device_id, bytes.fromhex(sample.id), sample.label, sample.split, sample.tokens)
            for frame_id, whole in frames.items()
            for position, sample in enumerate(whole.frame.samples)
        ]
        inserted = insert_rows(self.session, "samples", _SAMPLE_COLUMNS, rows, conflict="ON CONFLICT (device_id, sample_id) DO NOTHING")
        if inserted == len(rows):
            return {frame_id: len(whole.frame.samples) for frame_id, whole in frames.items()}
        counted = select(SampleRow.frame_id, func.count()).where(SampleRow.id > last_sample).group_by(SampleRow.frame_id)
        return {frame_id: samples for frame_id, samples in self.session.execute(counted)}  # noqa: C416 - a Row is no pair to mypy

    def _insert_bodies(self, payloads: dict[int, bytes], fresh_samples: dict[int, int]) -> None:
        useful = [(frame_id, payload) for frame_id, payload in payloads.items() if fresh_samples.get(frame_id)]
        insert_rows(self.session, "frame_bodies", ("frame_id", "payload"), useful)
        useless = [frame_id for frame_id in payloads if not fresh_samples.get(frame_id)]
        if useless:  # a re-flashed card sends everything again: the bodies are here already
            self.session.execute(update(FrameRow).where(FrameRow.id.in_(useless)).values(has_body=False))

    def _reject(self, place: int, message: RejectedMessage, *, was_here: bool = False) -> None:
        item, spool = self.batch[place], self.spool_of(self.batch[place])
        reason, sequence, span = message.reason, message.sequence, message.span
        if keep_rejected(self.session, self.devices[item.device], spool, message, was_here=was_here):
            if spool is not None and sequence is not None:
                self.fresh[spool.id].append((sequence, span))
            self._minute(item)["rejected"] += 1
            self.outcomes[place] = FrameOutcome("rejected", reason)
        elif spool is None:
            self.outcomes[place] = FrameOutcome("rejected", reason)
        else:
            self._count_duplicate(place, spool)

    def _count_stored(self, place: int, whole: WholeFrame, new_samples: int) -> None:
        item, spool, frame = self.batch[place], whole.spool, whole.frame
        device = self.devices[item.device]
        if not whole.from_parts:  # parts were counted one by one
            spool.known_sequences += whole.span
            if frame.sequence <= spool.stored_through:  # below the floor, given up by the device, and yet here
                spool.skipped_sequences = max(spool.skipped_sequences - whole.span, 0)
        spool.highest_sequence = max(spool.highest_sequence, frame.sequence + whole.span - 1)
        spool.stored_frames += 1
        spool.stored_samples += new_samples
        spool.stored_bytes += len(whole.payload)
        spool.duplicate_samples += len(frame.samples) - new_samples
        spool.produced_seen = max(spool.produced_seen, frame.produced)
        spool.newest_frame_at = whole.received_at
        self.fresh[spool.id].append((frame.sequence, whole.span))
        device.backbone = frame.backbone
        if self.counts_as_arrival:
            record_arrival(device, new_samples, whole.received_at)
        minute = self._minute(item)
        minute["frames"] += 1
        minute["samples"] += new_samples
        minute["payload_bytes"] += len(whole.payload)
        self.outcomes[place] = FrameOutcome("stored", "", new_samples, len(frame.samples) - new_samples)

    def _frame_row(self, whole: WholeFrame) -> tuple[object, ...]:
        frame = whole.frame
        return (
            whole.spool.id, frame.sequence, whole.span, self.bind(whole.received_at), self.bind(from_seconds(frame.captured_at)), len(whole.payload),
            len(frame.samples), frame.produced, frame.backbone, frame.plan_version, frame.mode, True,
        )  # fmt: skip

    def _count_duplicate(self, place: int, spool: AnySpool) -> None:
        spool.duplicate_frames += 1
        self._minute(self.batch[place])["duplicates"] += 1
        self.outcomes[place] = FrameOutcome("duplicate", "stored or rejected before")

    def _minute(self, item: ReceivedFrame) -> dict[str, int]:
        key = (self.devices[item.device].id, item.received_at.replace(second=0, microsecond=0))
        return self.minutes.setdefault(key, {"frames": 0, "samples": 0, "payload_bytes": 0, "duplicates": 0, "rejected": 0})


def record_arrival(device: AnyDevice, samples: int, received_at: datetime) -> None:
    """Bring a device's rate and pace up to date with one more frame."""
    rate, pace = rate_of(device), pace_of(device)
    at = to_seconds(received_at)
    rate, pace = rate.add(samples, at), pace.add(at)
    assert rate.started_at is not None
    assert pace.last_at is not None
    device.rate_started_at = from_seconds(rate.started_at)
    device.rate_sum_60, device.rate_sum_300, device.rate_sum_3600 = rate.sums
    device.interval_seconds, device.interval_deviation_seconds = pace.interval, pace.deviation
    device.last_arrival_at = from_seconds(pace.last_at)


def rate_of(device: AnyDevice) -> arrivals.RateEstimate:
    if device.rate_started_at is None or device.last_arrival_at is None:
        return arrivals.RateEstimate()
    sums = (device.rate_sum_60, device.rate_sum_300, device.rate_sum_3600)
    return arrivals.RateEstimate(to_seconds(device.rate_started_at), to_seconds(device.last_arrival_at), sums)


def pace_of(device: AnyDevice) -> arrivals.Pace:
    if device.last_arrival_at is None:
        return arrivals.Pace()
    return arrivals.Pace(to_seconds(device.last_arrival_at), device.interval_seconds, device.interval_deviation_seconds)


__all__ = [
    "FrameCheck", "FrameOutcome", "Outcome", "ReceivedFrame", "accept_rejected", "insert_frames", "insert_rejection",
    "pace_of", "rate_of", "receipts_for", "record_arrival", "record_health",
]
