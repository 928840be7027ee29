"""Misused claims and certificates against the real enrolment program behind real mosquitto: no certificate, a reason, an audit row.

The broker runs with what `coordinator init` writes. Each case has a device and a claim of its own, so one site serves all.
"""

import base64
import itertools
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from coordinator.authority import key_digest, key_pem, new_key, serial_hex
from coordinator.enrolment import load_authorities
from coordinator.identities import broker_settings_for, make_identities
from coordinator.settings import load_settings
from coordinator.store import identities
from coordinator.store.audit import audit_entries
from side_tuning.broker_connection import BrokerConnection
from side_tuning.wire import topics
from side_tuning.wire.certificates import CertificateRequest
from tests.access.conftest import WAIT_SECONDS, Client, token
from tests.brokers import free_port, needs_mosquitto
from tests.coordinator.enrolling import (
    Asker,
    certificate_of,
    make_csr,
    make_identity_store,
    running_enrolment,
)
from tests.coordinator.fleet import now
from tests.tls_broker import save, tls_broker
from tests.waiting import wait_until

pytestmark = [pytest.mark.broker, needs_mosquitto]

_numbers = itertools.count(1)


class Site:
    """A coordinator's files and store, its broker, and what people do with them."""

    def __init__(self, settings, store, broker, folder):
        self.settings, self.store, self.broker, self.folder = settings, store, broker, folder
        self.authorities = load_authorities(settings)
        self._askers = []

    def claim(self, *, expires_in=timedelta(days=7), known=True):
        """A device's name, and a claim for it: in the store (if `known`), with a certificate that the broker accepts."""
        number = next(_numbers)
        device, claim = f"device-{number}", f"{topics.CLAIM_PREFIX}{number:020x}"
        issued = self._issue(self.authorities.claims, claim)
        if known:
            with self.store.write() as session:
                at = now() - timedelta(days=1)
                identities.add_claim(session, claim, device, serial=serial_hex(issued.certificate), at=at, expires_at=now() + expires_in, actor="operator")
        return device, claim, self.broker.settings(issued, claims=True)

    def enrolled(self):
        """A device with its certificate: its name and how it reaches the broker."""
        device, claim, settings = self.claim()
        asker = self.asker(settings, claim, device)
        answer = asker.ask("issued")
        return device, claim, self.broker.settings(save(certificate_of(answer), asker.key, self.folder, device))

    def asker(self, settings, owner, name, **options):
        self._askers.append(Asker(settings, owner, name, **options))
        return self._askers[-1]

    def stranger(self, name):
        """A certificate of the fleet's authority in a name that the store does not know."""
        return self.broker.settings(self._issue(self.authorities.fleet, name))

    def audited(self, actor):
        with self.store.read() as session:
            return [row for row in audit_entries(session, limit=1000) if row.actor == actor]

    def certificates(self, device):
        with self.store.read() as session:
            return identities.certificates_of(session, device)

    def act(self, work):
        with self.store.write() as session:
            work(session)

    def stop_askers(self):
        while self._askers:
            self._askers.pop().stop()

    def _issue(self, authority, name):
        key = new_key()
        return save(authority.issue(key.public_key(), name, now=now(), days=1, usage="client"), key, self.folder, f"{name}-{next(_numbers)}")


@pytest.fixture(scope="module")
def whole_site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("enrolment")
    port, claims_port = free_port(), free_port()
    config = folder / "coordinator.toml"
    config.write_text(
        f'data_directory = "{folder / "data"}"\n[broker]\nhost = "127.0.0.1"\nport = {port}\nreconnect_max_seconds = 0.5\n'
        f'[enrolment]\nclaims_port = {claims_port}\n[task]\nlabels = ["a", "b"]\n'
    )
    settings = load_settings(config)
    make_identities(settings, now())
    store = make_identity_store(settings)
    with tls_broker(folder / "mosquitto", broker_directory=settings.broker_directory, port=port, claims_port=claims_port) as broker:
        site = Site(settings, store, broker, folder / "clients")
        with running_enrolment(settings, store, site.authorities):
            yield site
    store.close()


@pytest.fixture
def site(whole_site):
    yield whole_site
    whole_site.stop_askers()


def refused(site, owner, answer, reason, device):
    """The answer and the audit say the same, and there is no certificate more."""
    assert (answer.status, answer.reason, answer.certificate) == ("refused", reason, b"")
    assert answer.text
    rows = [row for row in site.audited(owner) if row.outcome == "denied"]
    assert [row.action for row in rows] == ["certificate refused"]
    assert rows[0].detail.startswith(f"{reason}: ")
    assert rows[0].device == device


def test_a_claim_gets_one_certificate_for_its_device(site):
    """So that the tests below could fail."""
    device, claim, settings = site.claim()
    answer = site.asker(settings, claim, device).ask("issued")
    certificate = certificate_of(answer)
    assert [row.serial for row in site.certificates(device)] == [serial_hex(certificate)]
    assert [(row.action, row.outcome, row.device) for row in site.audited(claim)] == [("certificate issued", "done", device)]
    assert certificate.subject.rfc4514_string() == f"CN={device}"


def test_a_spent_claim_gives_another_key_nothing(site):
    device, claim, settings = site.claim()
    site.asker(settings, claim, device).ask("issued")
    site.stop_askers()
    refused(site, claim, site.asker(settings, claim, device).ask(), "claim-spent", device)
    assert len(site.certificates(device)) == 1


def test_an_expired_claim(site):
    device, claim, settings = site.claim(expires_in=-timedelta(minutes=1))
    refused(site, claim, site.asker(settings, claim, device).ask(), "claim-expired", device)
    assert site.certificates(device) == []


def test_a_withdrawn_claim_gets_nothing_and_is_soon_not_even_let_in(site):
    device, claim, settings = site.claim()
    site.act(lambda session: identities.withdraw_claim(session, claim, at=now(), actor="operator"))
    refused(site, claim, site.asker(settings, claim, device).ask(), "claim-withdrawn", device)
    site.stop_askers()
    assert_shut_out(site, settings, claim)
    assert site.certificates(device) == []


def assert_shut_out(site, settings, name):
    """The enrolment program has written it to a revocation list, and the broker has read that."""

    def shut_out():
        site.broker.reload()
        connection = BrokerConnection(settings, name)
        connection.start()
        wait_until(lambda: connection.connected or connection.failures, WAIT_SECONDS, "accepted or refused")
        words = "" if connection.epoch else connection.last_error
        connection.stop()
        return words

    assert "was revoked" in wait_until(shut_out, WAIT_SECONDS, f"{name} is on its revocation list")


def test_a_claim_that_was_never_issued(site):
    """Signed by the right authority, so the broker lets it in; the store has no such claim (one from before a restore, say)."""
    device, claim, settings = site.claim(known=False)
    refused(site, claim, site.asker(settings, claim, device).ask(), "unknown-claim", None)
    assert site.certificates(device) == []


def test_the_claim_of_a_device_that_was_revoked(site):
    device, claim, settings = site.claim()
    site.act(lambda session: identities.revoke_device(session, device, at=now(), actor="operator", reason="stolen"))
    answer = site.asker(settings, claim, device).ask()
    refused(site, claim, answer, "revoked", device)
    assert site.certificates(device) == []


FOREIGN_NAMES = (
    "kitchen", "gateway", "enrolment", "doctor", "fleet", "broker", "claim-00000000000000000001", "+", "#", "$SYS", "a/b", "mobillm/v1/#",
    " ", "DEVICE-1", "device", "x" * 64, "",
)


@pytest.mark.parametrize("name", FOREIGN_NAMES)
def test_a_claim_gives_no_other_name(site, name):
    device, claim, settings = site.claim()
    asker = site.asker(settings, claim, name)
    payload = None if name else CertificateRequest(nameless(asker.key), 0.0).to_bytes()
    refused(site, claim, asker.ask(payload=payload), "wrong-name", device)
    assert site.certificates(device) == []


def nameless(key):
    return x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _csr(key, name):
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _signed_by_nobody(name):
    """The last bytes are the signature."""
    der = bytearray(x509.load_pem_x509_csr(make_csr(new_key(), name)).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    return b"-----BEGIN CERTIFICATE REQUEST-----\n" + base64.encodebytes(bytes(der)) + b"-----END CERTIFICATE REQUEST-----\n"


BAD_REQUESTS = {
    "not signed with its key": _signed_by_nobody,
    "another kind of key": lambda name: _csr(rsa.generate_private_key(65537, 2048), name),
    "another curve": lambda name: _csr(ec.generate_private_key(ec.SECP384R1()), name),
    "a private key": lambda _: key_pem(new_key()),
    "no PEM": lambda _: b"please",
    "nothing": lambda _: b"",
}


@pytest.mark.parametrize("kind", BAD_REQUESTS)
def test_a_request_that_cannot_be_signed(site, kind):
    device, claim, settings = site.claim()
    asker = site.asker(settings, claim, device)
    answer = asker.ask(payload=CertificateRequest(BAD_REQUESTS[kind](device), 0.0).to_bytes())
    refused(site, claim, answer, "bad-request", device)
    assert site.certificates(device) == []


@pytest.mark.parametrize("payload", [b"", b"\x00", b"\xc1" * 100, b"A" * 20_000], ids=["empty", "a zero", "no message", "20 kB"])
def test_what_is_no_request_at_all(site, payload):
    device, claim, settings = site.claim()
    refused(site, claim, site.asker(settings, claim, device).ask(payload=payload), "bad-request", device)


# Devices that ask for their next certificate.


def test_a_device_gets_its_next_certificate(site):
    """So that the tests below could fail."""
    device, _, settings = site.enrolled()
    site.stop_askers()
    site.asker(settings, device, device).ask("issued")
    assert len(site.certificates(device)) == 2


@pytest.mark.parametrize("name", ["gateway", "enrolment", "kitchen", "claim-00000000000000000001", "+", "#"])
def test_a_device_gets_no_other_name(site, name):
    device, _, settings = site.enrolled()
    refused(site, device, site.asker(settings, device, name).ask(), "wrong-name", device)
    assert len(site.certificates(device)) == 1


def test_a_device_cannot_ask_in_anothers_place(site):
    """The broker stops the request, on another's topic; so nobody answers, and nothing is issued."""
    device, _, settings = site.enrolled()
    other, _, _ = site.enrolled()
    client = Client(settings, device, [topics.certificate_answer(other), topics.certificate_answer(device)]).start()
    key = new_key()
    request = CertificateRequest(make_csr(key, other), 0.0).to_bytes()
    assert "Not authorized" in client.publish(topics.certificate_request(other), request)
    client.stop()
    site.asker(settings, device, device).ask("issued")  # what was sent before has been dealt with
    assert [row.key_digest for row in site.certificates(other)] != [key_digest(key.public_key())]
    assert len(site.certificates(other)) == 1
    assert client.messages() == []


def test_a_certificate_in_a_name_that_nobody_enrolled(site):
    name = f"stranger-{next(_numbers)}"
    refused(site, name, site.asker(site.stranger(name), name, name).ask(), "unknown-claim", name)
    assert site.certificates(name) == []


@pytest.mark.parametrize("name", ["gateway", "doctor"])
def test_a_program_gets_no_certificate_as_a_device(site, name):
    """Theirs come from `coordinator init`. The request is thrown away: its topic names no device."""
    client = Client(broker_settings_for(site.settings, name), name, [f"mobillm/v1/{name}/down/certificate"]).start()
    before = len(site.audited(name))
    assert client.publish(f"mobillm/v1/{name}/up/certificate-request", CertificateRequest(make_csr(new_key(), name), 0.0).to_bytes()) == "success"
    device, claim, settings = site.claim()
    site.asker(settings, claim, device).ask("issued")  # comes after it
    client.stop()
    assert client.messages() == []
    assert len(site.audited(name)) == before
    assert site.certificates(name) == []


def test_a_request_that_is_retained_is_not_served_again(site):
    """Answered while it is live; from the broker's memory it would come back at every connection."""
    device, claim, settings = site.claim()
    asker = site.asker(settings, claim, device)
    payload = CertificateRequest(make_csr(asker.key, device), 0.0).to_bytes()
    wait_until(lambda: asker.connection.publish(topics.certificate_request(claim), payload, retain=True).wait(10), WAIT_SECONDS, "it is retained")
    asker.ask("issued")
    assert len(site.certificates(device)) == 1


def test_a_bundle_is_worthless_once_its_device_is_in(site):
    """Whoever finds it later is not even let in."""
    device, claim, settings = site.claim()
    answer = site.asker(settings, claim, device).ask("issued")
    site.stop_askers()
    site.act(lambda session: identities.mark_certificate_seen(session, device, serial_hex(certificate_of(answer)), at=now()))
    assert_shut_out(site, settings, claim)


def test_a_revoked_device_is_thrown_out_and_stays_out(site):
    device, _, settings = site.enrolled()
    site.stop_askers()
    ended = []
    connection = BrokerConnection(settings, device, on_disconnected=ended.append)
    connection.start()
    wait_until(lambda: connection.connected, WAIT_SECONDS, "it comes in")
    site.act(lambda session: identities.revoke_device(session, device, at=now(), actor="operator", reason="stolen"))
    try:
        wait_until(lambda: ended, WAIT_SECONDS, "it is thrown out")
    finally:
        connection.stop()
    assert_shut_out(site, settings, device)
    rows = site.audited("operator")
    assert ("device revoked", device) in [(row.action, row.device) for row in rows]


def test_nobody_else_serves_certificates(site):
    """A device that pretends to be the enrolment program: its answers go nowhere, and it sees no requests."""
    device, _, settings = site.enrolled()
    _, claim, claim_settings = site.claim()
    site.stop_askers()
    impostor = Client(settings, "enrolment", [topics.all_devices_up("certificate-request"), f"mobillm/v1/{device}/down/command"]).start()
    asker = site.asker(claim_settings, claim, "somebody")
    asker.ask("refused")
    forged = token("forged")
    assert "Not authorized" in impostor.publish(topics.certificate_answer(claim), forged)
    asker.ask("refused")
    impostor.stop()
    assert impostor.messages() == []
