"""MAIN FLOW 3: certificate request -> rules -> sign -> COMMIT (certificate, claim, audit) -> answer; revocations -> lists -> cut off.

The only program that holds the authorities' keys. Everybody else writes rows (a claim, an approval, a revocation), and
about once a second this program acts on them.

Two threads: the network thread only queues requests, bounded and at most one per asker and second; the main loop does the
rest. Rules: what is answered is in the store; while the store is out of reach requests are neither kept nor answered, their
askers repeat them; a repeated request gets the same certificate.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy.orm import Session

from coordinator.authority import (
    Authority,
    AuthorityError,
    RequestError,
    certificate_pem,
    common_name_of,
    key_digest,
    load_authority,
    public_key_of,
    read_request,
    serial_hex,
)
from coordinator.certificate_dates import enrolments_dates
from coordinator.cut_off import CutOffs
from coordinator.enrolment_limits import Gate, Refusals, Waiting
from coordinator.enrolment_rules import Decision, RequestFacts, decide_claim, decide_renewal
from coordinator.files import held
from coordinator.gateway import FIRST_RETRY_SECONDS, HUNG_SECONDS
from coordinator.heartbeat import Heartbeat
from coordinator.identities import (
    CLAIMS_AUTHORITY,
    CLAIMS_REVOKED,
    FLEET_AUTHORITY,
    FLEET_REVOKED,
    Renewals,
    broker_settings_for,
)
from coordinator.revocation import RevocationList
from coordinator.settings import CoordinatorSettings
from coordinator.store import identities
from coordinator.store.audit import audit
from coordinator.store.engine import OUT_OF_REACH, Store, open_store
from coordinator.store.enrolment import (
    approved_requests,
    replaced_certificates,
    revoked_devices,
    unknown_serials,
)
from coordinator.store.timestamps import utc_now
from side_tuning.broker_connection import BrokerConnection, Connected, Message
from side_tuning.repeats import Repeats
from side_tuning.wire import topics
from side_tuning.wire.bounded import FrameError
from side_tuning.wire.certificates import (
    MAX_REQUEST_BYTES,
    AnswerStatus,
    CertificateAnswer,
    CertificateRequest,
)

logger = logging.getLogger(__name__)

REQUESTS = topics.all_devices_up("certificate-request")
CLIENT_ID = "enrolment"

QUEUE_MESSAGES = 256
IDLE_SECONDS = 0.2
CHORES_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 5.0


class EnrolmentError(RuntimeError):
    """The enrolment program cannot go on; the text says why."""


@dataclass(frozen=True)
class Authorities:
    """Who signs devices' certificates, and who signed the claims'."""

    fleet: Authority
    claims: Authority


def load_authorities(settings: CoordinatorSettings) -> Authorities:
    """Both authorities as `coordinator init` made them; raises `AuthorityError`."""
    folder = settings.authority_directory
    return Authorities(load_authority(folder, FLEET_AUTHORITY), load_authority(folder, CLAIMS_AUTHORITY))


@dataclass(frozen=True)
class _Asked:
    """A request: who asks (a claim or a device; the broker vouches for it), and for what."""

    owner: str
    facts: RequestFacts
    key: ec.EllipticCurvePublicKey | None = None
    csr: bytes = b""

    @property
    def is_claim(self) -> bool:
        return self.owner.startswith(topics.CLAIM_PREFIX)


class Enrolment:
    """Answers requests and acts on what people decided."""

    def __init__(
        self, settings: CoordinatorSettings, store: Store, authorities: Authorities, now: Callable[[], datetime] = utc_now
    ) -> None:
        self._settings = settings
        self._store = store
        self._authorities = authorities
        self._now = now
        self._waiting = Waiting(QUEUE_MESSAGES)
        self._gate = Gate()
        self._refusals = Refusals()
        self._told = Repeats()
        broker = broker_settings_for(settings, CLIENT_ID)
        self.connection = BrokerConnection(
            broker, CLIENT_ID, subscriptions=[REQUESTS], on_message=self._received, on_connected=self._connected
        )
        folder = settings.broker_directory
        self._fleet_list = RevocationList(folder / FLEET_REVOKED, authorities.fleet)
        self._claims_list = RevocationList(folder / CLAIMS_REVOKED, authorities.claims)
        self.cut_offs = CutOffs(broker, authorities.fleet)
        self._renewals = Renewals(settings)
        self._chores_at = self._ticked_at = time.monotonic()
        self._tries: Counter[str] = Counter()  # in a row, by what they keep from happening
        self._answered: Counter[str] = Counter()
        self._dates = enrolments_dates(settings)

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop`.

        Raises:
            EnrolmentError: the network thread died or hangs.
        """
        heartbeat = Heartbeat(
            CLIENT_ID,
            store=self._store,
            alive_file=self._settings.alive_file(CLIENT_ID),
            figures=self._figures,
            looping=self._looping,
            now=self._now,
        )
        self.connection.start()
        try:
            with heartbeat:
                while not stop.is_set():
                    self._ticked_at = time.monotonic()
                    self._go_round(stop)
                    self._check_network()
        finally:
            self.connection.stop()

    def _go_round(self, stop: threading.Event) -> None:
        if (message := self._waiting.take(IDLE_SECONDS)) is not None:
            self._while_in_reach("nobody gets a certificate", partial(self._serve, message), stop)
        if time.monotonic() >= self._chores_at and self._while_in_reach("no revocation takes effect", self._run_chores, stop):
            self._chores_at = time.monotonic() + CHORES_SECONDS

    def _figures(self) -> dict[str, Any]:
        return {
            "connected": self.connection.connected,
            "broker": self.connection.address,
            "broker_error": self.connection.last_error,
            "broker_certificate_expires_at": self.connection.peer_certificate_expires_at,
            "queue_messages": len(self._waiting),
            "dropped_messages": self._waiting.dropped,
            "turned_away": self._gate.turned_away,  # requests of askers that ask more than once a second
            "answers_issued": self._answered["issued"],
            "answers_waiting": self._answered["waiting"],
            "answers_refused": self._answered["refused"],
            "cut_offs_pending": self.cut_offs.pending,
            **self._dates(),
        }

    def _looping(self) -> bool:
        return self.connection.tick_age_seconds < HUNG_SECONDS and time.monotonic() - self._ticked_at < HUNG_SECONDS

    # The network thread.

    def _received(self, message: Message) -> None:
        if not self._gate.admit(message.topic, time.monotonic()):
            return
        # One byte too many is enough to refuse it for.
        self._waiting.put(replace(message, payload=message.payload[: MAX_REQUEST_BYTES + 1]))

    def _connected(self, connected: Connected) -> None:
        level = logging.INFO if connected.epoch == 1 else logging.DEBUG
        logger.log(level, "listening to %s at %s, storing in %r", REQUESTS, self.connection.address, self._store.url)

    # The main loop.

    def _while_in_reach(self, trouble: str, work: Callable[[], None], stop: threading.Event) -> bool:
        """Do `work`; False if the store or the disk is out of reach, which is said once as `trouble`. A bug in it ends nothing."""
        try:
            work()
        except (*OUT_OF_REACH, OSError) as error:
            self._tries[trouble] += 1
            level = logging.ERROR if self._tries[trouble] == 1 else logging.DEBUG
            logger.log(level, "%s for now, trying again: %s", trouble, error)
            stop.wait(min(FIRST_RETRY_SECONDS * 2 ** min(self._tries[trouble], 16), LONGEST_PAUSE_SECONDS))
            return False
        except AuthorityError as error:
            if self._told.count(str(error)) == 1:
                logger.error("nothing can be signed: %s", error)
        except Exception as error:
            if self._told.count(f"{type(error).__name__}: {error}") == 1:
                logger.exception("something failed that should not")
        else:
            if tries := self._tries.pop(trouble, 0):
                logger.info("the store works again after %d tries", tries)
        return True

    def _check_network(self) -> None:
        if not self.connection.thread_alive:
            raise EnrolmentError("the network thread died; its reason is in the log above")
        if self.connection.tick_age_seconds > HUNG_SECONDS:
            raise EnrolmentError(f"the network thread has not moved for {self.connection.tick_age_seconds:.0f} s")

    # Requests.

    def _serve(self, message: Message) -> None:
        try:
            topic = topics.parse_topic(message.topic)
        except FrameError as error:
            if self._told.count(str(error)) == 1:
                logger.warning("a certificate request was thrown away: %s", error)
            return
        if message.retain or topic.arguments or topic.owner == topics.FLEET:
            return  # requests are not retained: an old one would come back for ever
        try:
            asked = read_asked(topic.owner, CertificateRequest.from_bytes(message.payload).csr)
        except FrameError as error:
            asked = _Asked(topic.owner, RequestFacts(error=str(error)))
        self._serve_asked(asked)

    def _serve_asked(self, asked: _Asked) -> None:
        now = self._time()
        with self._store.read() as session:
            decision = self._decide(session, asked, now)
        if decision.outcome in ("issue", "hold"):
            with self._store.write() as session:
                decision = self._carry_out(session, asked, self._decide(session, asked, now), now)  # decided again: alone now
        if decision.outcome == "refuse":
            self._note_refusal(asked.owner, decision, now)
        self._answer(asked, decision, now)

    def _decide(self, session: Session, asked: _Asked, now: datetime) -> Decision:
        if not asked.is_claim:
            identity = identities.find_identity(session, asked.owner)
            return decide_renewal(asked.facts, asked.owner, identity, identities.certificates_of(session, asked.owner), now=now)
        claim = identities.find_claim(session, asked.owner)
        identity = certificate = held_key = None
        if claim is not None:
            identity = identities.find_identity(session, claim.device)
            certificate = identities.certificate_for_key(session, claim.device, asked.facts.key_digest)
            held_key = None if claim.request is None else read_asked(claim.id, claim.request).facts.key_digest
        by_hand = self._settings.enrolment.approval == "manual"
        return decide_claim(asked.facts, claim, identity, certificate, held_key, by_hand=by_hand, now=now)

    def _carry_out(self, session: Session, asked: _Asked, decision: Decision, now: datetime) -> Decision:
        """Sign and store, or keep for a person; gives the decision with its certificate."""
        device = decision.device or ""
        if decision.outcome == "hold":
            identities.hold_request(session, asked.owner, request=asked.csr, at=now)
            logger.info("%s asks for its certificate: %s", device, decision.text)
        if decision.outcome != "issue" or asked.key is None:
            return decision
        days = self._settings.enrolment.certificate_days
        certificate = self._authorities.fleet.issue(asked.key, device, now=now, days=days, usage="client")
        if asked.is_claim:
            identities.spend_claim(session, asked.owner, key_digest=asked.facts.key_digest, at=now)
        identities.add_certificate(
            session,
            serial=serial_hex(certificate),
            device=device,
            key_digest=asked.facts.key_digest,
            pem=certificate_pem(certificate),
            issued_at=now,
            expires_at=certificate.not_valid_after_utc,
            claim=asked.owner if asked.is_claim else None,
            actor=asked.owner,
        )
        logger.info("%s gets a certificate, asked for by %s", device, asked.owner)
        return replace(decision, certificate=identities.certificate_for_key(session, device, asked.facts.key_digest))

    def _note_refusal(self, owner: str, decision: Decision, now: datetime) -> None:
        times = self._refusals.count(owner, decision.reason, time.monotonic())
        if times is None:
            return
        more = f" ({times} times since the last entry)" if times > 1 else ""
        detail = f"{decision.reason}: {decision.text}{more}"
        logger.warning("%s got no certificate: %s", owner, detail)
        with self._store.write() as session:
            audit(session, at=now, actor=owner, action="certificate refused", device=decision.device, outcome="denied", detail=detail)

    def _answer(self, asked: _Asked, decision: Decision, now: datetime) -> None:
        certificate = b"" if decision.certificate is None else decision.certificate.pem
        status: AnswerStatus = "issued" if certificate else "refused" if decision.outcome == "refuse" else "waiting"
        answer = CertificateAnswer(
            status=status,
            key_digest=asked.facts.key_digest,
            at=now.timestamp(),
            reason=decision.reason,
            text=decision.text[:1000],
            certificate=certificate,
            authorities=certificate_pem(self._authorities.fleet.certificate) if certificate else b"",
        )
        self._answered[status] += 1
        self.connection.publish(topics.certificate_answer(asked.owner), answer.to_bytes())

    # What people decided, and what time brings.

    def _run_chores(self) -> None:
        now = self._time()
        with self._store.read() as session:
            approved = approved_requests(session, now)
            replaced = replaced_certificates(session, now)
        if replaced:
            with self._store.write() as session:
                for serial, _ in replaced:
                    identities.revoke_certificate(session, serial, at=now, actor=CLIENT_ID, reason="the device uses a newer one")
        listed = self._fleet_list.held()
        with self._store.read() as session:
            certificates = identities.revoked_certificates(session, now)
            # Older than the list: a database from a backup must not let in whom a later one had shut out.
            forgotten = unknown_serials(session, listed.keys() - {serial for serial, _ in certificates})
            claims = identities.revoked_claims(session, now)
            shut_out = revoked_devices(session)
        changed = self._fleet_list.follow([*certificates, *((serial, listed[serial]) for serial in sorted(forgotten))], now)
        self._claims_list.follow(claims, now)
        self.cut_offs.note(shut_out, now, list_changed=changed)
        if self.connection.connected:
            self.cut_offs.run_due(now)
        for claim, request in approved:
            self._serve_asked(read_asked(claim, request))
        self._renewals.run_due(self._authorities.fleet, now)

    def _time(self) -> datetime:
        """The time; raises `AuthorityError` where it cannot be right, before anything is dated by it."""
        now, made = self._now(), self._authorities.fleet.certificate.not_valid_before_utc
        if now < made:
            raise AuthorityError(
                f"this machine's clock shows {now:%Y-%m-%d %H:%M}, but the authority was made on {made:%Y-%m-%d}: set the clock, "
                "or let it be set over the network"
            )
        return now


def read_asked(owner: str, csr: bytes) -> _Asked:
    """A request (PEM), read; what is wrong with it is in the facts, never raised."""
    try:
        request = read_request(csr)
        key = public_key_of(request)
    except RequestError as error:
        return _Asked(owner, RequestFacts(error=str(error)))
    return _Asked(owner, RequestFacts(common_name_of(request), key_digest(key)), key, csr)


def run(settings: CoordinatorSettings, stop: threading.Event) -> None:
    """The `coordinator enrolment` program, until `stop`."""
    taken = EnrolmentError(f"another enrolment program runs with the data_directory {settings.data_directory}; stop that one")
    with held(settings.data_directory / "enrolment.lock", taken):
        authorities = load_authorities(settings)
        store = open_store(settings.database_url)
        try:
            Enrolment(settings, store, authorities).run(stop)
        finally:
            store.close()
