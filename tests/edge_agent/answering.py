"""A small stand-in for the coordinator's enrolment program on a real broker: signs what it is told to, honest or not."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from cryptography import x509
from typing_extensions import Self

from coordinator.authority import Authority, certificate_pem, key_digest, public_key_of
from edge_agent.identity import Identity, IdentityStore
from edge_agent.identity_file import IdentityFacts
from side_tuning.broker_connection import BrokerConnection, Message
from side_tuning.bundle import Bundle
from side_tuning.wire import topics
from side_tuning.wire.certificates import CertificateAnswer, CertificateRequest
from tests.tls_broker import HOST, TlsBroker, utc_now
from tests.waiting import wait_until

DEVICE = "kitchen"
CLAIM = "claim-0123456789abcdef"


def make_bundle(broker: TlsBroker, folder: Path, device: str = "kitchen", claim: str = CLAIM, **changes) -> Path:
    """As `coordinator enrol` writes it."""
    issued = broker.issue(claim, claims=True)
    now = time.time()
    values = {
        "device": device, "claim": claim, "claim_certificate": issued.certificate_file.read_text(), "claim_key": issued.key_file.read_text(),
        "host": HOST, "port": broker.port, "claims_port": broker.claims_port, "authorities": (broker.broker_directory / "fleet-authority.pem").read_text(),
        "checkpoint_public_key": "ab" * 32, "issued_at": now, "expires_at": now + 3600,
    }
    path = folder / f"{device}.bundle"
    path.write_text(Bundle(**{**values, **changes}).to_text())
    path.chmod(0o600)
    return path


Answer = Callable[["Answering", x509.CertificateSigningRequest], CertificateAnswer | None]


class Answering:
    """Answers every request with what `answer` says; as it comes, it issues."""

    def __init__(self, broker: TlsBroker, answer: Answer | None = None, *, days: float = 30.0) -> None:
        self.broker, self.days = broker, days
        self.answer: Answer = answer or Answering.issue
        self.authority = broker.authorities["fleet"]
        self.requests: list[tuple[str, bytes]] = []  # (who asked, the request)
        self.issued: list[x509.Certificate] = []
        self.connection = BrokerConnection(
            broker.client("enrolment"), "enrolment", subscriptions=[topics.all_devices_up("certificate-request")], on_message=self._asked,
        )

    def __enter__(self) -> Self:
        self.connection.start()
        wait_until(lambda: self.connection.connected, 30, "the enrolment program's stand-in is there")
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.stop()

    def _asked(self, message: Message) -> None:
        asker = topics.parse_topic(message.topic).owner
        csr = CertificateRequest.from_bytes(message.payload).csr
        self.requests.append((asker, csr))
        answer = self.answer(self, x509.load_pem_x509_csr(csr))
        if answer is not None:
            self.connection.publish(topics.certificate_answer(asker), answer.to_bytes())

    def issue(self, request: x509.CertificateSigningRequest, name: str = "", by: Authority | None = None, at: float | None = None) -> CertificateAnswer:
        """What an honest program says, but for what is given."""
        key = public_key_of(request)
        device = name or str(request.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value)
        certificate = (by or self.authority).issue(key, device, now=utc_now(), days=self.days, usage="client")
        self.issued.append(certificate)
        return CertificateAnswer(
            "issued", key_digest(key), time.time() if at is None else at,
            certificate=certificate_pem(certificate), authorities=certificate_pem(self.authority.certificate),
        )


def say(status: str, reason: str = "", text: str = "") -> Answer:
    """Always this."""
    return lambda _, request: CertificateAnswer(status, key_digest(public_key_of(request)), time.time(), reason, text)  # type: ignore[arg-type]


def identity_for(broker: TlsBroker, state: Path, days: float) -> Identity:
    """An identity as enrolment leaves it."""
    store = IdentityStore(state)
    key = store.next_key("claim")
    authority = broker.authorities["fleet"]
    certificate = authority.issue(key.public_key(), DEVICE, now=utc_now(), days=days, usage="client")
    facts = IdentityFacts(device=DEVICE, host=HOST, port=broker.port, claim="claim-0123456789abcdef", checkpoint_key=True)
    return store.install(facts, certificate_pem(certificate), certificate_pem(authority.certificate), "ab" * 32)


def private_keys_in(folder: Path, bundle: str) -> list[Path]:
    """Files that hold any line of the bundle's secret, wherever under `folder`."""
    secret = Bundle.model_validate_json(bundle).claim_key.splitlines()[1].encode()
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink() and secret in path.read_bytes()]
