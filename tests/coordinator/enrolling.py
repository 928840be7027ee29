"""What tests of enrolment need: authorities, claims in a store, requests as a device makes them, and the program in a thread."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID

from coordinator.authority import key_digest, make_authority, new_key, save_authority
from coordinator.enrolment import Enrolment, load_authorities
from coordinator.store.engine import open_store
from coordinator.store.identities import add_claim
from coordinator.store.schema import upgrade
from side_tuning.broker_connection import BrokerConnection
from side_tuning.wire import topics
from side_tuning.wire.certificates import CertificateAnswer, CertificateRequest
from tests.coordinator.fleet import now
from tests.waiting import wait_until

WAIT_SECONDS = 60.0


def make_authorities(settings):
    """Both, on disk; the fleet's and the claims'."""
    for name in ("fleet-authority", "claims-authority"):
        save_authority(settings.authority_directory, name, make_authority(f"test {name}", now=now(), days=30))
    return load_authorities(settings)


def make_identity_store(settings):
    settings.data_directory.mkdir(parents=True, exist_ok=True)
    upgrade(settings.database_url)
    return open_store(settings.database_url)


def claim_name(number):
    return f"{topics.CLAIM_PREFIX}{number:016x}"


def give_claim(store, device, number=1, *, expires_at: datetime | None = None, at: datetime | None = None):
    """A claim for `device` in the store; its name."""
    at = at or now()
    with store.write() as session:
        add_claim(
            session, claim_name(number), device, serial=f"{number + 0x1000:x}", at=at, actor="operator",
            expires_at=expires_at or at + timedelta(days=7),
        )
    return claim_name(number)


def make_csr(key, name):
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


@dataclass
class Asker:
    """Asks as `owner` (a claim or a device) for `device`, again and again as an agent does, and keeps every answer."""

    broker: object
    owner: str
    device: str
    key: object = field(default_factory=new_key)
    answers: list[CertificateAnswer] = field(default_factory=list)

    def __post_init__(self):
        self.connection = BrokerConnection(
            self.broker,
            f"asker-{self.owner}-{id(self)}",
            subscriptions=[topics.certificate_answer(self.owner)],
            on_message=lambda message: self.answers.append(CertificateAnswer.from_bytes(message.payload)),
        )
        self.connection.start()
        wait_until(lambda: self.connection.connected, WAIT_SECONDS, "the asker connects")

    def send(self, payload=None, *, wait=True):
        if payload is None:
            payload = CertificateRequest(make_csr(self.key, self.device), 0.0).to_bytes()  # 1970: no clock
        handle = self.connection.publish(topics.certificate_request(self.owner), payload)
        return handle.wait(10) if wait else True

    def ask(self, status=None, payload=None):
        """Repeat the request until an answer to this key (of this status) comes; the answer."""
        wanted, seen = key_digest(self.key.public_key()), len(self.answers)

        def answered():
            if not paused.wait(0):
                self.send(payload)
            fitting = [a for a in self.answers[seen:] if payload is not None or a.key_digest == wanted]
            return next((a for a in fitting if status in (None, a.status)), None)

        paused = _Every(0.5)
        return wait_until(answered, WAIT_SECONDS, f"an answer {status or ''} to {self.owner}; so far {self.answers}")

    def stop(self):
        self.connection.stop()


class _Every:
    """`wait` is False once per interval."""

    def __init__(self, seconds):
        self._seconds, self._timer = seconds, threading.Event()

    def wait(self, _):
        if self._timer.is_set():
            return True
        self._timer.set()
        timer = threading.Timer(self._seconds, self._timer.clear)
        timer.daemon = True
        timer.start()
        return False


class RunningEnrolment:
    """The program in a thread; `shift` moves its clock."""

    def __init__(self, settings, store, authorities):
        self.shift = timedelta()
        self.enrolment = Enrolment(settings, store, authorities, now=lambda: now() + self.shift)
        self.stop = threading.Event()
        self.error = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        try:
            self.enrolment.run(self.stop)
        except BaseException as error:
            self.error = error

    def end(self):
        self.stop.set()
        self.thread.join(30)
        assert not self.thread.is_alive()
        if self.error:
            raise self.error


@contextmanager
def running_enrolment(settings, store, authorities):
    running = RunningEnrolment(settings, store, authorities)
    try:
        wait_until(lambda: running.enrolment.connection.connected or running.error, WAIT_SECONDS, "the enrolment program connects")
        yield running
    finally:
        running.end()


def certificate_of(answer):
    return x509.load_pem_x509_certificate(answer.certificate)


def listed(path):
    """Serials on a revocation list, hexadecimal; None before there is one."""
    if not path.exists():
        return None
    return {f"{row.serial_number:x}" for row in x509.load_pem_x509_crl(path.read_bytes())}
