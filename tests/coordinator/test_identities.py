"""`make_identities`: everything a broker and our programs need, made once, renewed in time, never half-written."""

import shutil
import socket
import ssl
import stat
import threading
from datetime import datetime, timedelta, timezone

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from coordinator.authority import AuthorityError, load_authority, make_authority, save_authority, serial_hex
from coordinator.files import held
from coordinator.identities import (
    PROGRAMS,
    Renewals,
    broker_settings_for,
    identity_directory,
    make_identities,
)
from coordinator.settings import ConfigError
from side_tuning.broker_settings import BrokerSettings
from side_tuning.broker_tls import tls_context
from tests.coordinator.fleet import settings_for

NOW = datetime.now(timezone.utc).replace(microsecond=0)


def tls_settings(folder, public_host="", host="localhost"):
    return settings_for(folder, BrokerSettings(host=host), enrolment={"public_host": public_host})


@pytest.fixture
def settings(tmp_path):
    made = tls_settings(tmp_path, "fleet.example.org")
    make_identities(made, NOW)
    return made


def contents(settings):
    return {path: path.read_bytes() for path in settings.data_directory.rglob("*") if path.is_file()}


def certificate(path):
    return x509.load_pem_x509_certificate(path.read_bytes())


def shake_hands(server_context, client_context, name):
    """One TLS connection on the loopback; gives both sides' failure, if any."""
    failures = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            connection, _ = listening.accept()
            with connection:
                try:
                    with server_context.wrap_socket(connection, server_side=True) as secure:
                        secure.sendall(b"ok")
                except OSError as error:
                    failures.append(error)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with (
                socket.create_connection(listening.getsockname(), timeout=60) as connection,
                client_context.wrap_socket(connection, server_hostname=name) as secure,
            ):
                if secure.recv(2) != b"ok":
                    failures.append(ConnectionError("closed"))
        except OSError as error:
            failures.append(error)
        thread.join(60)
    return failures


def broker_context(settings):
    """As the broker's listener for devices: a certificate of the fleet authority that is on no list."""
    folder = settings.broker_directory
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "broker.pem", folder / "broker.key")
    context.load_verify_locations(folder / "fleet-authority.pem")
    context.load_verify_locations(folder / "fleet-revoked.pem")
    context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def test_all_files_are_there_and_the_secret_ones_are_private(settings):
    data = settings.data_directory
    files = {str(path.relative_to(data)) for path in data.rglob("*") if path.is_file()} - {"authority/init.lock"}
    assert files == {
        *(f"authority/{name}-authority.{end}" for name in ("fleet", "claims") for end in ("key", "pem")),
        *(f"broker/{name}-{what}.pem" for name in ("fleet", "claims") for what in ("authority", "revoked")),
        "broker/broker.pem",
        "broker/broker.key",
        *(f"identities/{name}/{file}" for name in PROGRAMS for file in ("client.pem", "client.key", "authorities.pem")),
    }
    for path in data.rglob("*.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for folder in (settings.authority_directory, *(data / "identities" / name for name in PROGRAMS)):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1", "broker", "fleet.example.org"])
def test_our_programs_and_the_broker_accept_each_other_under_every_name(settings, name):
    client = tls_context(broker_settings_for(settings, "gateway"))
    assert shake_hands(broker_context(settings), client, name) == []


def test_a_wrong_host_name_a_claim_or_a_revoked_certificate_is_refused(settings):
    gateway = broker_settings_for(settings, "gateway")
    assert "Hostname mismatch" in str(shake_hands(broker_context(settings), tls_context(gateway), "elsewhere.example.org"))

    claims = load_authority(settings.authority_directory, "claims-authority")
    key = x509.load_pem_x509_certificate(gateway.certificate_file.read_bytes()).public_key()
    foreign = claims.issue(key, "gateway", now=NOW, days=1, usage="client")
    original = gateway.certificate_file.read_bytes()
    gateway.certificate_file.write_bytes(foreign.public_bytes(Encoding.PEM))
    assert shake_hands(broker_context(settings), tls_context(gateway), "localhost") != []

    gateway.certificate_file.write_bytes(original)
    fleet = load_authority(settings.authority_directory, "fleet-authority")
    revoked = fleet.revocation_list([(serial_hex(certificate(gateway.certificate_file)), NOW)], now=NOW, days=1)
    (settings.broker_directory / "fleet-revoked.pem").write_bytes(revoked)
    assert "revoked" in str(shake_hands(broker_context(settings), tls_context(gateway), "localhost"))


def test_again_changes_nothing(settings):
    before = contents(settings)
    assert make_identities(settings, NOW + timedelta(days=200)) == []
    assert contents(settings) == before


def test_certificates_are_renewed_when_a_third_is_left_with_the_same_keys(settings):
    before = contents(settings)
    done = make_identities(settings, NOW + timedelta(days=250))
    assert len([line for line in done if "the old one ends on" in line]) == 1 + len(PROGRAMS)
    changed = {path.name for path, content in contents(settings).items() if content != before[path]}
    assert changed == {"broker.pem", "client.pem"}


def test_a_program_that_runs_for_years_renews_what_lies_beside_it_and_makes_no_keys(settings, caplog):
    """Each program's key may lie in a volume of its own: one that is not here is no reason for another."""
    fleet = load_authority(settings.authority_directory, "fleet-authority")
    shutil.rmtree(identity_directory(settings, "gateway"))
    (identity_directory(settings, "doctor") / "client.key").chmod(0o644)
    before = contents(settings)
    renewals = Renewals(settings)
    renewals.run_due(fleet, NOW)
    assert contents(settings) == before
    later = NOW + timedelta(days=250)
    for _ in range(3):
        renewals.run_due(fleet, later)
    changed = {path.parent.name for path, content in contents(settings).items() if content != before[path]}
    assert changed == {"broker", "enrolment"}
    assert caplog.text.count("chmod 600") == 2  # once a day


def test_a_new_public_host_reissues_the_brokers_certificate_only(settings, tmp_path):
    """Devices that were given the old name still find the broker under it."""
    before = contents(settings)
    moved = tls_settings(tmp_path, "10.1.2.3")
    (line,) = make_identities(moved, NOW)
    assert "10.1.2.3" in line
    assert "it has a new name" in line
    changed = [path.name for path, content in contents(settings).items() if content != before[path]]
    assert changed == ["broker.pem"]
    for name in ("10.1.2.3", "fleet.example.org", "localhost"):
        assert shake_hands(broker_context(moved), tls_context(broker_settings_for(moved, "doctor")), name) == []
    assert make_identities(settings, NOW) == []


def test_lists_of_revoked_certificates_are_left_alone_unless_another_authoritys(settings):
    fleet = load_authority(settings.authority_directory, "fleet-authority")
    file = settings.broker_directory / "fleet-revoked.pem"
    kept = fleet.revocation_list([("4b" * 20, NOW)], now=NOW, days=30)
    file.write_bytes(kept)
    make_identities(settings, NOW)
    assert file.read_bytes() == kept
    file.write_bytes(make_authority("other", now=NOW, days=1).revocation_list([], now=NOW, days=30))
    assert "empty revocation list" in "".join(make_identities(settings, NOW))


def test_a_crash_in_the_first_run_is_made_good_by_the_next(tmp_path):
    settings = tls_settings(tmp_path)
    save_authority(settings.authority_directory, "fleet-authority", make_authority("half made", now=NOW, days=1))
    (settings.authority_directory / "fleet-authority.pem").unlink()
    make_identities(settings, NOW)
    fleet = load_authority(settings.authority_directory, "fleet-authority")
    certificate(settings.broker_directory / "broker.pem").verify_directly_issued_by(fleet.certificate)


def test_a_lost_authority_is_never_replaced_in_silence(settings):
    """A new one would shut out every device."""
    shutil.rmtree(settings.authority_directory)
    with pytest.raises(AuthorityError, match=r"fleet-authority\.pem is gone.*backup"):
        make_identities(settings, NOW)


def test_damaged_certificates_and_lost_keys_of_ours_are_made_anew(settings):
    folder = identity_directory(settings, "gateway")
    (folder / "client.pem").write_bytes(b"rubbish")
    (identity_directory(settings, "doctor") / "client.key").unlink()
    assert len(make_identities(settings, NOW)) == 2
    for name in ("gateway", "doctor"):
        tls_context(broker_settings_for(settings, name))


def test_certificates_from_a_clock_ahead_are_issued_again(settings):
    before = contents(settings)
    ahead = NOW + timedelta(days=1000)
    make_identities(settings, ahead)
    assert len(make_identities(settings, NOW)) == 1 + len(PROGRAMS)
    renewals = Renewals(settings)
    fleet = load_authority(settings.authority_directory, "fleet-authority")
    renewals.run_due(fleet, ahead)
    renewals.run_due(fleet, NOW)
    assert certificate(settings.broker_directory / "broker.pem").not_valid_before_utc < NOW
    assert contents(settings).keys() == before.keys()


def test_a_clock_that_starts_in_1970_changes_no_certificate(settings):
    """What it dated would have expired when the clock is set."""
    before = contents(settings)
    (line,) = make_identities(settings, datetime(1970, 1, 2, tzinfo=timezone.utc))
    assert "clock" in line
    assert contents(settings) == before


def test_two_at_once_are_told_apart_and_a_bad_host_name_is_told(tmp_path):
    settings = tls_settings(tmp_path)
    settings.authority_directory.mkdir(parents=True)
    with (
        held(settings.authority_directory / "init.lock", RuntimeError()),
        pytest.raises(AuthorityError, match=r"another `coordinator init`"),
    ):
        make_identities(settings, NOW)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"enrolment\.public_host"):
            make_identities(tls_settings(tmp_path, "büro.example.org"), NOW)


def test_an_authority_near_its_end_is_warned_of_each_time(settings):
    late = NOW + timedelta(days=3500)
    make_identities(settings, late)
    lines = make_identities(settings, late)
    assert [line.startswith("WARNING") for line in lines] == [True, True]


def test_settings_without_tls_or_with_files_of_their_own_are_left_alone(settings, tmp_path):
    plain = settings_for(tmp_path)
    assert broker_settings_for(plain, "gateway") == plain.broker
    own = settings.model_copy(update={"broker": BrokerSettings(host="h", ca_file=tmp_path / "own.pem")})
    assert broker_settings_for(own, "gateway") == own.broker
    assert broker_settings_for(settings, "trainer") == settings.broker
