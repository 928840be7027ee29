"""The enrolment program with real mosquitto and a real store: one claim, one key, one certificate, whatever happens in between."""

import os
import signal
import subprocess
import sys
import threading
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from sqlalchemy import func, select

from coordinator.authority import common_name_of, key_digest, new_key, public_key_of, serial_hex
from coordinator.cut_off import cut_off
from coordinator.revocation import RevocationList
from coordinator.store.audit import audit_entries
from coordinator.store.identities import (
    approve_device,
    certificates_of,
    find_claim,
    find_identity,
    mark_certificate_seen,
    revoke_device,
    withdraw_claim,
)
from coordinator.store.models import AuditEntry, Certificate
from side_tuning.broker_connection import BrokerConnection
from side_tuning.wire import topics
from side_tuning.wire.certificates import CertificateRequest
from tests.brokers import mosquitto, needs_mosquitto
from tests.coordinator.enrolling import (
    WAIT_SECONDS,
    Asker,
    certificate_of,
    claim_name,
    give_claim,
    listed,
    make_authorities,
    make_csr,
    make_identity_store,
    running_enrolment,
)
from tests.coordinator.fleet import now, settings_file, settings_for
from tests.waiting import wait_until

pytestmark = [pytest.mark.broker, needs_mosquitto]


@pytest.fixture
def broker(tmp_path):
    with mosquitto(tmp_path / "broker") as running:
        yield running


@pytest.fixture
def settings(tmp_path, broker):
    return settings_for(tmp_path, broker.settings)


@pytest.fixture
def authorities(settings):
    return make_authorities(settings)


@pytest.fixture
def store(settings):
    opened = make_identity_store(settings)
    yield opened
    opened.close()


@pytest.fixture
def asker(broker):
    made = []

    def maker(owner, device="kitchen", **more):
        made.append(Asker(broker.settings, owner, device, **more))
        return made[-1]

    yield maker
    for one in made:
        one.stop()


def actions(store, device="kitchen"):
    with store.read() as session:
        return [(row.action, row.outcome, row.detail) for row in audit_entries(session, device)]


def test_a_claim_becomes_a_certificate_and_repeating_gives_the_same(settings, store, authorities, asker):
    claim = give_claim(store, "kitchen")
    with running_enrolment(settings, store, authorities):
        device = asker(claim)
        answer = device.ask("issued")
        assert device.ask("issued").certificate == answer.certificate, "the first answer could have been lost"
        thief = asker(claim)
        refused = thief.ask()
    certificate = certificate_of(answer)
    certificate.verify_directly_issued_by(authorities.fleet.certificate)
    assert common_name_of(certificate) == "kitchen"
    assert public_key_of(certificate) == device.key.public_key()
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert x509.load_pem_x509_certificate(answer.authorities) == authorities.fleet.certificate
    assert abs(answer.at - now().timestamp()) < 3600, "the coordinator's time, for a device that has none"
    assert (refused.status, refused.reason) == ("refused", "claim-spent")
    with store.read() as session:
        (row,) = certificates_of(session, "kitchen")
        assert row.serial == serial_hex(certificate)
        assert find_claim(session, claim).key_digest == key_digest(device.key.public_key())
        assert find_identity(session, "kitchen").enrolled_at is not None
    done = actions(store)
    assert [action for action, outcome, _ in done if outcome == "done"] == ["certificate issued", "claim issued"]
    assert ("certificate refused", "denied") in [entry[:2] for entry in done]


def test_refusals_have_their_reason_and_an_audit_row(settings, store, authorities, asker):
    give_claim(store, "late", 2, at=now() - timedelta(days=8), expires_at=now() - timedelta(days=1))
    give_claim(store, "gone", 3)
    with store.write() as session:
        withdraw_claim(session, claim_name(3), at=now(), actor="operator")
    give_claim(store, "kitchen", 4)
    weak = CertificateRequest(make_csr(rsa.generate_private_key(65537, 2048), "kitchen"), 0.0).to_bytes()
    with running_enrolment(settings, store, authorities):
        cases = [
            (asker(claim_name(1)).ask(), "unknown-claim"),
            (asker(claim_name(2), "late").ask(), "claim-expired"),
            (asker(claim_name(3), "gone").ask(), "claim-withdrawn"),
            (asker(claim_name(4), "attic").ask(), "wrong-name"),
            (asker(claim_name(4)).ask(payload=weak), "bad-request"),
            (asker(claim_name(4)).ask(payload=b"no message"), "bad-request"),
            (asker(claim_name(4)).ask(payload=bytes(500_000)), "bad-request"),
            (asker("stranger", "stranger").ask(), "unknown-claim"),
        ]
        assert asker(claim_name(4)).ask("issued"), "what was refused did not spend it"
    for answer, reason in cases:
        assert (answer.status, answer.reason) == ("refused", reason)
        assert answer.text
        assert not answer.certificate
    with store.read() as session:
        rows = [row for row in audit_entries(session) if row.outcome == "denied"]
    assert {row.detail.split(":")[0] for row in rows} == {reason for _, reason in cases}
    assert {row.actor for row in rows} == {*(claim_name(number) for number in (1, 2, 3, 4)), "stranger"}


def test_a_person_approves_where_the_settings_say_so(tmp_path, broker, store, authorities, asker):
    settings = settings_for(tmp_path, broker.settings, enrolment={"approval": "manual"})
    claim = give_claim(store, "kitchen")
    with running_enrolment(settings, store, authorities):
        device, thief = asker(claim), asker(claim)
        waiting = device.ask("waiting")
        assert "coordinator devices approve kitchen" in waiting.text
        assert thief.ask().reason == "claim-spent", "another key must not slip under the approval"
        with store.read() as session:
            assert find_claim(session, claim).state(now()) == "waiting"
        with store.write() as session:
            approve_device(session, "kitchen", at=now(), actor="operator")
        wait_until(lambda: any(answer.status == "issued" for answer in device.answers), WAIT_SECONDS, "signed without being asked again")
        assert device.ask("issued")


def test_a_device_renews_and_its_old_certificate_ends_once_it_uses_the_new_one(settings, store, authorities, asker):
    claim = give_claim(store, "kitchen")
    fleet_list = settings.broker_directory / "fleet-revoked.pem"
    claims_list = settings.broker_directory / "claims-revoked.pem"
    with running_enrolment(settings, store, authorities):
        first = certificate_of(asker(claim).ask("issued"))
        wait_until(lambda: fleet_list.exists() and claims_list.exists(), WAIT_SECONDS)
        with store.write() as session:
            mark_certificate_seen(session, "kitchen", serial_hex(first), at=now())
        wait_until(lambda: listed(claims_list) == {f"{0x1001:x}"}, WAIT_SECONDS, "a claim that did its work is worthless")
        assert asker("kitchen", "attic").ask().reason == "wrong-name"
        renewing = asker("kitchen")
        second = certificate_of(renewing.ask("issued"))
        assert certificate_of(renewing.ask("issued")) == second
        assert listed(fleet_list) == set(), "both are good while nobody knows which one the device uses"
        with store.write() as session:
            mark_certificate_seen(session, "kitchen", serial_hex(second), at=now())
        wait_until(lambda: listed(fleet_list) == {serial_hex(first)}, WAIT_SECONDS, "the old one is revoked")
    assert "certificate revoked" in [action for action, *_ in actions(store)]


def test_a_revoked_device_is_listed_thrown_out_and_gets_nothing_more(settings, store, authorities, broker, asker):
    claim = give_claim(store, "kitchen")
    lost, others = [], []
    with running_enrolment(settings, store, authorities):
        certificate = certificate_of(asker(claim).ask("issued"))
        # A hostile device that clings to its connection; another one nobody revoked.
        clinging = BrokerConnection(broker.settings, "kitchen", on_disconnected=lost.append, reconnect_min_seconds=600)
        bystander = BrokerConnection(broker.settings, "attic", on_disconnected=others.append)
        for one in (clinging, bystander):
            one.start()
        wait_until(lambda: clinging.connected and bystander.connected, WAIT_SECONDS)
        with store.write() as session:
            revoke_device(session, "kitchen", at=now(), actor="operator", reason="stolen")
        wait_until(lambda: listed(settings.broker_directory / "fleet-revoked.pem") == {serial_hex(certificate)}, WAIT_SECONDS)
        wait_until(lambda: lost, WAIT_SECONDS, "it is thrown out")
        assert not others
        assert asker("kitchen").ask().reason == "revoked"
        assert asker(claim).ask().reason == "revoked"
        clinging.stop()
        bystander.stop()


def test_a_hostile_asker_fills_neither_the_disk_nor_the_queue_and_others_are_served(settings, store, authorities, asker):
    give_claim(store, "kitchen", 1)
    give_claim(store, "attic", 2)
    with running_enrolment(settings, store, authorities) as running:
        hostile = asker(claim_name(1), "garage")
        stop = threading.Event()

        def flood():
            payloads = [CertificateRequest(make_csr(new_key(), "garage"), 0.0).to_bytes(), b"\xff" * 500]
            while not stop.is_set():
                handles = [hostile.connection.publish(topics.certificate_request(claim_name(1)), payloads[n % 2]) for n in range(100)]
                handles[-1].wait(5)

        thread = threading.Thread(target=flood)
        thread.start()
        try:
            gate = running.enrolment._gate
            wait_until(lambda: gate.turned_away > 2000, 120, "the flood runs")
            assert asker(claim_name(2), "attic").ask("issued")
        finally:
            stop.set()
            thread.join()
    with store.read() as session:
        denied = session.scalar(select(func.count()).select_from(AuditEntry).where(AuditEntry.outcome == "denied"))
    assert 1 <= denied <= 12, "a few rows a reason, however long a slow machine takes"


DIES_BEFORE_THE_ANSWER = """
import os, signal, sys
from coordinator.enrolment import Enrolment
from coordinator import cli

def die(self, asked, decision, now):
    if decision.certificate is not None:
        os.kill(os.getpid(), signal.SIGKILL)

Enrolment._answer = die
sys.argv[1:] = ["enrolment", "--config", sys.argv[1]]
cli.main()
"""


def test_killed_between_commit_and_answer_the_next_run_gives_the_same_certificate(settings, store, authorities, asker):
    claim = give_claim(store, "kitchen")
    config = settings_file(settings.data_directory.parent, settings.broker.port)
    device = asker(claim)
    process = subprocess.Popen([sys.executable, "-c", DIES_BEFORE_THE_ANSWER, str(config)], stderr=subprocess.PIPE, text=True)

    def killed():
        device.send()
        return process.poll() is not None

    wait_until(killed, 120, "the program dies")
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    assert device.answers == []
    with store.read() as session:
        (row,) = certificates_of(session, "kitchen")
    with running_enrolment(settings, store, authorities):
        assert device.ask("issued").certificate == row.pem
    with store.read() as session:
        assert session.scalar(select(func.count()).select_from(Certificate)) == 1


def test_as_a_process_it_ends_on_sigterm_and_says_what_is_missing(tmp_path, settings, store, broker):
    config = settings_file(tmp_path, broker.port)
    command = [sys.executable, "-m", "coordinator.cli", "enrolment", "--config", str(config)]
    without = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert without.returncode == 78
    assert "coordinator init" in without.stderr
    make_authorities(settings)
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    wait_until(lambda: "listening to" in log.read_text(), 120, "it listens")
    second = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "another enrolment program" in second.stderr
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert "Traceback" not in log.read_text()


def test_a_store_that_is_away_stops_nothing_for_good(settings, store, authorities, asker, caplog):
    claim = give_claim(store, "kitchen")
    database = settings.data_directory / "coordinator.db"
    with running_enrolment(settings, store, authorities):
        device = asker(claim)
        moved = database.rename(database.with_suffix(".away"))
        database.mkdir()  # where it was is no file: it cannot be opened
        store.close()  # pooled connections would still reach it
        device.send()
        wait_until(lambda: any("trying again" in record.getMessage() for record in caplog.records), WAIT_SECONDS)
        device.send()
        assert device.answers == []
        database.rmdir()
        moved.rename(database)
        assert device.ask("issued")


def test_nothing_is_signed_while_the_coordinators_own_clock_is_wrong(settings, store, authorities, asker, caplog):
    claim = give_claim(store, "kitchen")
    with running_enrolment(settings, store, authorities) as running:
        wait_until((settings.broker_directory / "fleet-revoked.pem").exists, WAIT_SECONDS)
        running.shift = timedelta(days=-20_000)
        device = asker(claim)
        device.send()
        wait_until(lambda: any("set the clock" in record.getMessage() for record in caplog.records), WAIT_SECONDS)
        assert device.answers == []
        running.shift = timedelta()
        assert device.ask("issued")


def test_revocation_lists_are_left_alone_while_they_are_good(tmp_path, authorities, settings):
    moment = now()
    path = tmp_path / "list.pem"
    one = RevocationList(path, authorities.fleet)
    assert one.follow([("2a", moment)], moment)
    assert not one.follow([("2a", moment)], moment + timedelta(days=20))
    assert one.follow([("2a", moment)], moment + timedelta(days=40)), "well before the broker would let nobody in"
    other = RevocationList(path, authorities.fleet)
    assert not other.follow([("2a", moment)], moment + timedelta(days=40)), "what another run wrote counts"
    assert one.follow([], moment + timedelta(days=41))
    assert listed(path) == set()
    for spoiled in (b"", b"rubbish", authorities.claims.revocation_list([], now=moment + timedelta(days=41), days=365)):
        path.write_bytes(spoiled)
        assert one.follow([], moment + timedelta(days=41)), "damaged, or another authority's"
    path.unlink()
    assert one.follow([], moment + timedelta(days=41))
    assert one.follow([], moment), "made by a clock that was ahead: not valid yet, so the broker would let nobody in"
    assert not one.follow([], moment)


def test_a_database_from_a_backup_lets_nobody_in_again(settings, store, authorities, asker):
    path = settings.broker_directory / "fleet-revoked.pem"
    RevocationList(path, authorities.fleet).follow([("2a", now())], now())  # by a later database, which is lost
    claim = give_claim(store, "kitchen")
    with running_enrolment(settings, store, authorities):
        certificate = certificate_of(asker(claim).ask("issued"))
        with store.write() as session:
            revoke_device(session, "kitchen", at=now(), actor="operator")
        wait_until(lambda: listed(path) == {"2a", serial_hex(certificate)}, WAIT_SECONDS)


def test_over_tls_the_program_comes_in_as_the_device_to_throw_it_out(tmp_path, settings, authorities):
    """As in production: the broker takes user name and client id from the certificate."""
    folder = tmp_path / "tls"
    issue(authorities.fleet, folder, "broker", usage="server", names=["127.0.0.1"])
    for name in ("kitchen", "enrolment"):
        issue(authorities.fleet, folder, name)
    authority = settings.authority_directory / "fleet-authority.pem"
    listener = (
        f"cafile {authority}\ncertfile {folder}/broker.pem\nkeyfile {folder}/broker.key\nrequire_certificate true\n"
        "use_identity_as_username true\nuse_username_as_clientid true\n"
    )
    with mosquitto(tmp_path / "tls-broker", anonymous=False, listener_extra=listener) as broker:

        def files_of(name):
            return broker.settings.model_copy(
                update={"tls": True, "ca_file": authority, "certificate_file": folder / f"{name}.pem", "key_file": folder / f"{name}.key"}
            )

        lost = []
        clinging = BrokerConnection(files_of("kitchen"), "a name of its own", on_disconnected=lost.append, reconnect_min_seconds=600)
        clinging.start()
        wait_until(lambda: clinging.connected, WAIT_SECONDS)
        assert cut_off(files_of("enrolment"), "attic", authorities.fleet, now())
        assert not lost
        assert cut_off(files_of("enrolment"), "kitchen", authorities.fleet, now())
        wait_until(lambda: lost, WAIT_SECONDS, "it is thrown out")
        clinging.stop()


def issue(authority, folder, name, **more):
    from coordinator.authority import PRIVATE_FILE, certificate_pem, key_pem
    from coordinator.files import write_atomically

    key = new_key()
    certificate = authority.issue(key.public_key(), name, now=now(), days=1, **{"usage": "client", **more})
    write_atomically(folder / f"{name}.pem", certificate_pem(certificate))
    write_atomically(folder / f"{name}.key", key_pem(key), PRIVATE_FILE)
