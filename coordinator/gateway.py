"""MAIN FLOW 1: broker -> decode -> batch -> COMMIT -> acknowledge + receipt.

Four threads: the network thread only puts messages into a bounded queue; the writer stores them in batches; the desk sends
parts of backbones to devices that ask; the main thread sends plans, checkpoints and orders, applies retention and watches the
others. One that dies ends the program with
its reason, and the supervisor starts it anew: whatever was not acknowledged comes again.

Rules: a message is acknowledged in its order of arrival, after its batch is on disk, the bad ones too (they are kept
with their reason). While the store cannot be written nothing is acknowledged and nothing is lost.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy.orm import Session

from coordinator.backbone_desk import BackboneDesk
from coordinator.backbone_offers import BackboneOffers, BackboneShelf
from coordinator.certificate_dates import CertificateDates, own_certificate
from coordinator.chores import Chores
from coordinator.counters import Commits, Counters, Reports, gateway_figures
from coordinator.files import held
from coordinator.heartbeat import Heartbeat
from coordinator.identities import broker_settings_for
from coordinator.ingest import Registry, decode_payload, device_of, refusal, shorten
from coordinator.intake import Arrived, Intake
from coordinator.outbox import Outbox, ensure_signing_key
from coordinator.receipts import ReceiptDesk
from coordinator.settings import CoordinatorSettings, GatewaySettings
from coordinator.store.engine import OUT_OF_REACH, Store, open_store
from coordinator.store.enrolment import revoked_devices
from coordinator.store.health import record_health
from coordinator.store.identities import mark_certificate_seen
from coordinator.store.ingest import FrameOutcome, ReceivedFrame, insert_frames
from coordinator.store.registry import backbones, plans
from coordinator.store.rejections import insert_rejection
from coordinator.store.timestamps import utc_now
from side_tuning.broker_connection import BrokerConnection, Connected, Message
from side_tuning.repeats import Repeats
from side_tuning.wire import topics
from side_tuning.wire.bounded import FrameError
from side_tuning.wire.frame import Frame
from side_tuning.wire.messages import Health

logger = logging.getLogger(__name__)

T = TypeVar("T")

FRAMES = topics.all_devices_up("activations")
HEALTH = topics.all_devices_up("health")
BACKBONE_REQUESTS = topics.all_devices_up("backbone-request")

IDLE_SECONDS = 0.25
FIRST_RETRY_SECONDS = 0.2
LONGEST_RETRY_SECONDS = 15.0
REGISTRY_SECONDS = 1.0
HUNG_SECONDS = 90.0  # the network thread goes round twice a second


class GatewayError(RuntimeError):
    """The gateway cannot go on; the text says which part of it failed and why."""


@dataclass(frozen=True)
class _Report:
    """A health message, read; `reason` says why it cannot be."""

    device: str
    topic: str
    payload: bytes
    received_at: datetime
    retained: bool
    health: Health | None
    reason: str = ""


class Writer:
    """Takes batches out of the queue, stores them, acknowledges them, sends receipts."""

    def __init__(
        self,
        settings: GatewaySettings,
        store: Store,
        *,
        connection: BrokerConnection,
        intake: Intake,
        receipts: ReceiptDesk,
        stop: threading.Event,
    ) -> None:
        self._settings = settings
        self._store = store
        self._connection = connection
        self._intake = intake
        self._receipts = receipts
        self._stop = stop
        self._registry, self._registry_at = Registry(), float("-inf")
        self.counters = Counters()
        self.commits = Commits()
        self.ticked_at = time.monotonic()
        self._rejections = Repeats()

    def run(self) -> None:
        """Until the queue is closed and empty."""
        while True:
            self.ticked_at = time.monotonic()
            wait = min(IDLE_SECONDS, self._receipts.due_in())
            batch = self._intake.take(self._settings.batch_frames, wait_seconds=wait, gather_seconds=self._settings.batch_seconds)
            if batch:
                self.commits.under_way_since = batch[0].received_at
            if batch and not self._store_batch(batch):
                return  # stopped while the store was out of reach; nothing acknowledged, the broker sends it again
            self._receipts.publish_due()
            if not batch and self._intake.closed:
                self._receipts.publish_due(now=True)
                return

    def _store_batch(self, batch: Sequence[Arrived]) -> bool:
        """Decode, commit, acknowledge. False if the program is to end before the store could be written."""
        work = self._until_stored(lambda: self._decode_batch(batch))
        if work is None:
            return False
        began = time.monotonic()
        outcomes = self._until_stored(lambda: self._commit(work))
        if outcomes is None:
            return False
        self.commits.count(time.monotonic() - began)
        self.commits.under_way_since = None
        self._connection.acknowledge_all([arrived.message for arrived in batch])
        self._count(work, outcomes)
        for item in work:
            if isinstance(item, _Report):
                if item.health is not None and item.health.spool is not None:
                    self._receipts.mark(item.device, item.health.spool.spool)
            elif (spool := item.frame.spool if item.frame is not None else item.spool) is not None:
                self._receipts.mark(item.device, spool)
        return True

    # Decoding.

    def _decode_batch(self, batch: Sequence[Arrived]) -> list[ReceivedFrame | _Report]:
        decoded = [self._decode(arrived) for arrived in batch if not arrived.dropped]
        work = [item for item in decoded if item is not None]
        whole = [item.frame for item in work if isinstance(item, ReceivedFrame) and isinstance(item.frame, Frame)]
        old = time.monotonic() - self._registry_at > REGISTRY_SECONDS  # a device may have been revoked
        if whole and (old or any(not self._registry.knows(frame) for frame in whole)):  # a plan or backbone may be new
            self._registry, self._registry_at = load_registry(self._store), time.monotonic()
        return [self._judge(item) if isinstance(item, ReceivedFrame) else item for item in work]

    def _decode(self, arrived: Arrived) -> ReceivedFrame | _Report | None:
        message = arrived.message
        try:
            if message.topic.endswith("/health"):
                return self._decode_health(device_of(message.topic, "health"), arrived)
            device = device_of(message.topic, "activations")
        except FrameError as error:
            self.counters.unattributable += 1
            logger.warning("a message was thrown away (%d so far): %s", self.counters.unattributable, error)
            return None
        found = decode_payload(device, message.payload, message.properties, max_body_bytes=self._settings.max_body_bytes)
        return ReceivedFrame(
            device, message.topic, message.payload, arrived.received_at, found.frame, found.reason, found.spool, found.sequence
        )

    def _decode_health(self, device: str, arrived: Arrived) -> _Report | None:
        message = arrived.message
        if not message.payload:
            return None  # somebody cleared the retained message
        health, reason = None, ""
        try:
            health = Health.from_bytes(message.payload)
        except FrameError as error:
            reason = shorten(str(error))
        return _Report(device, message.topic, message.payload, arrived.received_at, message.retain, health, reason)

    def _judge(self, item: ReceivedFrame) -> ReceivedFrame:
        if not isinstance(item.frame, Frame) or item.reason is not None:
            return item
        reason = refusal(item.frame, self._registry)
        if reason is None:
            return item
        return ReceivedFrame(
            item.device, item.topic, item.payload, item.received_at, item.frame, shorten(reason), item.spool, item.sequence
        )

    def _tell_rejection(self, device: str, reason: str) -> None:
        count = self._rejections.count(f"{device}: {reason}")
        level = logging.WARNING if count == 1 else logging.DEBUG
        logger.log(level, "rejected a message of %s (kept; `coordinator rejections list` shows all of them): %s", device, reason)

    # Storing.

    def _commit(self, work: Sequence[ReceivedFrame | _Report]) -> list[FrameOutcome]:
        """One transaction for the batch; if one message makes it fail, each in a transaction of its own."""
        if not work:
            return []
        try:
            with self._store.write() as session:
                return self._write(session, work)
        except OUT_OF_REACH:
            raise
        except Exception:
            if len(work) > 1:
                logger.exception("a batch of %d could not be stored; storing its messages one by one", len(work))
                return [outcome for item in work for outcome in self._commit([item])]
            logger.exception("a message could not be stored; setting it aside")
            return [self._set_aside(work[0])]

    def _write(self, session: Session, work: Sequence[ReceivedFrame | _Report]) -> list[FrameOutcome]:
        frames = [item for item in work if isinstance(item, ReceivedFrame)]
        outcomes = insert_frames(session, frames, self._check_joined)
        for item in work:
            if not isinstance(item, _Report):
                continue
            if item.health is not None:
                record_health(session, item.device, item.health, item.received_at, retained=item.retained)
                if item.health.certificate_serial:
                    mark_certificate_seen(session, item.device, item.health.certificate_serial, at=item.received_at)
            else:
                _reject(session, item, item.reason)
        return outcomes

    def _check_joined(self, frame: Frame) -> str | None:
        if not self._registry.knows(frame):
            self._registry = load_registry(self._store)
        reason = refusal(frame, self._registry)
        return None if reason is None else shorten(reason)

    def _set_aside(self, item: ReceivedFrame | _Report) -> FrameOutcome:
        reason = "the store could not take it; see the gateway's log"
        with self._store.write() as session:
            _reject(session, item, reason)
        return FrameOutcome("rejected", reason)

    def _until_stored(self, attempt: Callable[[], T]) -> T | None:
        """`attempt` again and again while the store is out of reach; says so once. None when told to stop."""
        pause, began = FIRST_RETRY_SECONDS, time.monotonic()
        tries = 0
        while True:
            self.ticked_at = time.monotonic()
            try:
                result = attempt()
            except OUT_OF_REACH as error:
                tries += 1
                if tries == 1:
                    logger.error("nothing is stored or acknowledged for now, trying again: %s", error)
                else:
                    logger.debug("still not stored after %d tries: %s", tries, error)
                if self._stop.wait(pause):
                    return None
                pause = min(pause * 2, LONGEST_RETRY_SECONDS)
            else:
                if tries:
                    logger.info("the store works again after %.1f s and %d tries", time.monotonic() - began, tries)
                return result

    def _count(self, work: Sequence[ReceivedFrame | _Report], outcomes: Sequence[FrameOutcome]) -> None:
        counters = self.counters
        counters.health += sum(isinstance(item, _Report) for item in work)
        counters.payload_bytes += sum(len(item.payload) for item in work if isinstance(item, ReceivedFrame))
        for item in work:
            if isinstance(item, _Report) and item.reason:
                self._tell_rejection(item.device, item.reason)
        for item, outcome in zip((item for item in work if isinstance(item, ReceivedFrame)), outcomes, strict=False):
            if outcome.outcome == "rejected":
                self._tell_rejection(item.device, outcome.reason)
        for outcome in outcomes:
            counters.samples += outcome.samples
            counters.frames += outcome.outcome == "stored"
            counters.parts += outcome.outcome == "part"
            counters.duplicates += outcome.outcome == "duplicate"
            counters.rejected += outcome.outcome == "rejected"


def load_registry(store: Store) -> Registry:
    with store.read() as session:
        manifests = {fingerprint: row.manifest for fingerprint, row in backbones(session).items()}
        return Registry(manifests, {row.version: row.plan for row in plans(session)}, frozenset(revoked_devices(session)))


def _reject(session: Session, item: ReceivedFrame | _Report, reason: str) -> None:
    spool, sequence = (item.spool, item.sequence) if isinstance(item, ReceivedFrame) else (None, None)
    insert_rejection(
        session,
        device=item.device,
        topic=item.topic,
        payload=item.payload,
        reason=reason,
        received_at=item.received_at,
        spool=spool,
        sequence=sequence,
    )


class Gateway:
    """Connects the parts, watches them, and ends them in order."""

    def __init__(self, settings: CoordinatorSettings, store: Store, now: Callable[[], datetime] = utc_now) -> None:
        self._settings = settings
        self._store = store
        self._now = now
        self._stop = threading.Event()
        self._intake = Intake(settings.gateway.queue_messages, settings.gateway.queue_bytes)
        self.connection = BrokerConnection(
            broker_settings_for(settings, "gateway"),
            settings.gateway.client_id,
            subscriptions=[FRAMES, HEALTH, BACKBONE_REQUESTS],
            on_message=self._received,
            on_connected=self._connected,
            manual_ack=True,
            clean_start=False,
            session_expiry_seconds=settings.gateway.session_expiry_seconds,
            receive_maximum=settings.gateway.receive_maximum,
        )
        self._receipts = ReceiptDesk(store, self.connection, settings.gateway.receipt_seconds)
        self.writer = Writer(
            settings.gateway, store, connection=self.connection, intake=self._intake, receipts=self._receipts, stop=self._stop
        )
        key = ensure_signing_key(settings)
        shelf = BackboneShelf(settings.data_directory)
        self._outbox = Outbox(settings, store, self.connection, key, now, backbones=BackboneOffers(store, shelf, key))
        self.desk = BackboneDesk(
            shelf, self.connection, settings.publishing.backbone_bytes_per_second, busy=lambda: len(self._intake) > settings.gateway.batch_frames
        )
        self._failure: tuple[str, BaseException] | None = None
        self._ticked_at = time.monotonic()
        self._dates = CertificateDates(own_certificate(settings, "gateway"), {})

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop`; then finish what has been received, commit, acknowledge, leave.

        Raises:
            GatewayError: a thread died or hangs.
        """
        parts = {"writer": self.writer.run, "desk": lambda: self.desk.run(self._stop)}
        threads = [threading.Thread(target=self._run_part, args=(name, part), name=name, daemon=True) for name, part in parts.items()]
        for thread in threads:
            thread.start()
        self.connection.start()
        reports = Reports(self._settings.gateway.report_seconds, self.writer.counters, self._intake)
        chores = Chores(self._settings, self._store, self._outbox, self.connection, self._now)
        heartbeat = Heartbeat(
            "gateway",
            store=self._store,
            alive_file=self._settings.alive_file("gateway"),
            figures=self._figures,
            looping=self._looping,
            now=self._now,
        )
        try:
            with heartbeat:
                while not stop.wait(self._settings.publishing.poll_seconds):
                    self._ticked_at = time.monotonic()
                    self._check_parts()
                    chores.run_due()
                    reports.log_due()
        finally:
            self._stop.set()
            self._intake.close()
            for thread in threads:
                thread.join(30)
            self.connection.stop()
        self._check_parts()
        reports.log("in all", Counters(), time.monotonic() - reports.started_at)

    def _figures(self) -> dict[str, Any]:
        writer = self.writer
        return gateway_figures(
            writer.counters, writer.commits, self._intake, self.connection, wal_bytes=self._store.log_bytes, now=self._now()
        ) | self._dates()

    def _looping(self) -> bool:
        now = time.monotonic()
        return self.connection.tick_age_seconds < HUNG_SECONDS and all(
            now - tick < HUNG_SECONDS for tick in (self._ticked_at, self.writer.ticked_at, self.desk.ticked_at)
        )

    def _received(self, message: Message) -> None:
        if message.topic.endswith("/backbone-request"):
            self.desk.offer(message)
            self.connection.acknowledge(message)  # never stored; whoever is not answered asks again
        else:
            self._intake.put(message, self._now())

    def _connected(self, connected: Connected) -> None:
        # The broker may have lost its retained messages; receipts are what lets devices forget frames.
        self._receipts.mark_all()
        logger.log(
            logging.INFO if connected.epoch == 1 else logging.DEBUG,
            "listening to %s and %s at %s (MQTT %s), storing in %r",
            FRAMES,
            HEALTH,
            self.connection.address,
            connected.protocol,
            self._store.url,
        )

    def _run_part(self, name: str, part: Callable[[], None]) -> None:
        try:
            part()
        except BaseException as error:
            self._failure = self._failure or (name, error)
            logger.exception("the %s died", name)

    def _check_parts(self) -> None:
        if self._failure is not None:
            name, error = self._failure
            raise GatewayError(f"the {name} died: {type(error).__name__}: {error}") from error
        if not self._stop.is_set():
            if not self.connection.thread_alive:
                raise GatewayError("the network thread died; its reason is in the log above")
            if self.connection.tick_age_seconds > HUNG_SECONDS:
                raise GatewayError(f"the network thread has not moved for {self.connection.tick_age_seconds:.0f} s")


def run(settings: CoordinatorSettings, stop: threading.Event) -> None:
    """The `coordinator gateway` program, until `stop`."""
    taken = GatewayError(
        f"another gateway runs with the data_directory {settings.data_directory}; stop that one, or give this one its own "
        "data_directory and gateway.client_id"
    )
    with held(settings.data_directory / "gateway.lock", taken):
        store = open_store(settings.database_url)
        try:
            Gateway(settings, store).run(stop)
        finally:
            store.close()
