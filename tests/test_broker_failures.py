"""Every way in which TLS with a broker fails says what is wrong, and no two of them the same."""

from __future__ import annotations

import datetime as dt
import shutil
import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest

from coordinator.authority import Authority, certificate_pem, make_authority, new_key
from side_tuning.broker_connection import BrokerConnection
from side_tuning.broker_settings import BrokerSettings
from tests.brokers import mosquitto, needs_mosquitto
from tests.tls_broker import HOST, Issued, TlsBroker, save, tls_broker, utc_now, write_broker_files
from tests.waiting import wait_until

pytestmark = [pytest.mark.broker, needs_mosquitto]

DAY = dt.timedelta(days=1)


@pytest.fixture(scope="module")
def broker(tmp_path_factory):
    with tls_broker(tmp_path_factory.mktemp("broker")) as running:
        yield running


def failure(settings: BrokerSettings, name: str = "kitchen", trusted_time: float | None = None) -> tuple[str, str]:
    """The kind and the words of a connection that must fail."""
    connection = BrokerConnection(settings, name, reconnect_min_seconds=0.05, trusted_time=lambda: trusted_time)
    connection.start()
    try:
        wait_until(lambda: connection.last_error or connection.connected, 60, "a failure")
        assert not connection.connected
        assert connection.epoch == 0
        return connection.failure_kind, connection.last_error
    finally:
        connection.stop()


def connects(settings: BrokerSettings, name: str = "kitchen", trusted_time: float | None = None) -> bool:
    connection = BrokerConnection(settings, name, trusted_time=lambda: trusted_time)
    connection.start()
    try:
        return bool(wait_until(lambda: connection.connected, 60, "connected"))
    finally:
        connection.stop()


OWN_CERTIFICATES = {
    "expired": ("own-expired", "it has expired"),
    "not yet valid": ("own-refused", "not valid yet by the broker's clock"),
    "foreign": ("own-unknown", "does not know the authority"),
    "revoked": ("own-revoked", "it was revoked"),
    "a claim's": ("own-unknown", "does not know the authority"),
    "none": ("own-missing", "asks for a client certificate"),
}


def foreign_authority() -> Authority:
    """Another fleet's, with the same name."""
    return make_authority("fleet authority of a test", now=utc_now(), days=100)


def issue(authority: Authority, folder: Path, *, starting: dt.datetime | None = None, days: float = 10, names: Sequence[str] = ()) -> Issued:
    """A certificate for a server with these names or else for the client "kitchen", valid from an hour before `starting`."""
    key = new_key()
    usage: Literal["client", "server"] = "server" if names else "client"
    certificate = authority.issue(
        key.public_key(), "broker" if names else "kitchen", now=starting or utc_now(), days=days, usage=usage, names=names
    )
    return save(certificate, key, folder, f"{certificate.serial_number:x}")


def own_certificate(broker: TlsBroker, case: str) -> Issued | None:
    fleet, folder = broker.authorities["fleet"], broker.folder / "clients"
    match case:
        case "expired":
            return issue(fleet, folder, starting=utc_now() - 2 * DAY, days=1)
        case "not yet valid":
            return issue(fleet, folder, starting=utc_now() + DAY)
        case "foreign":
            return issue(foreign_authority(), folder)
        case "a claim's":
            return broker.issue("claim-0123456789abcdef", claims=True)
        case "revoked":
            broker.revoke("garage")
            broker.reload()
            return broker.issue("garage")
    return None


@pytest.mark.parametrize("case", OWN_CERTIFICATES)
def test_a_refused_certificate_of_our_own_is_told_by_its_cause(broker: TlsBroker, case: str):
    kind, words = OWN_CERTIFICATES[case]
    settings = broker.settings(own_certificate(broker, case))
    told_kind, told = failure(settings)
    assert (told_kind, words in told) == (kind, True), told
    assert f"127.0.0.1:{broker.port}" in told
    assert case == "none" or str(settings.certificate_file) in told


BROKER_CERTIFICATES = {
    "expired": ("broker-dates", "has expired"),
    "not yet valid": ("broker-dates", "is this device's clock right?"),
    "another name": ("broker-untrusted", "for another name than broker.host"),
    "foreign": ("broker-untrusted", "the authority that signed it"),
}


@contextmanager
def broker_that_shows(folder: Path, signer: Authority | None = None, **certificate: Any) -> Iterator[BrokerSettings]:
    """A broker with this certificate of its own; settings of a device that trusts the fleet's authority."""
    fleet = write_broker_files(folder)["fleet"]
    shown = issue(signer or fleet, folder / "shown", **{"names": [HOST], **certificate})
    shutil.copy(shown.certificate_file, folder / "broker" / "broker.pem")
    shutil.copy(shown.key_file, folder / "broker" / "broker.key")
    with tls_broker(folder, broker_directory=folder / "broker") as running:
        yield running.settings(issue(fleet, folder / "clients"))


def broker_certificate(case: str) -> dict[str, Any]:
    return {
        "expired": {"starting": utc_now() - 2 * DAY, "days": 1},
        "not yet valid": {"starting": utc_now() + DAY},
        "another name": {"names": ["broker.example", "10.1.2.3"]},
        "foreign": {"signer": foreign_authority()},
    }[case]


@pytest.mark.parametrize("case", BROKER_CERTIFICATES)
def test_a_wrong_certificate_of_the_broker_is_told_by_its_cause(tmp_path: Path, case: str):
    kind, words = BROKER_CERTIFICATES[case]
    with broker_that_shows(tmp_path, **broker_certificate(case)) as settings:
        told_kind, told = failure(settings)
    assert (told_kind, words in told) == (kind, True), told


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_a_broker_that_speaks_only_old_tls_is_told(tmp_path):
    """mosquitto cannot be made to speak TLS 1.1 with today's OpenSSL alone; a small server can refuse everything newer."""
    authority = foreign_authority()
    issued = issue(authority, tmp_path, names=[HOST])
    (tmp_path / "authority.pem").write_bytes(certificate_pem(authority.certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.load_cert_chain(issued.certificate_file, issued.key_file)
    with socket.create_server((HOST, 0)) as server:

        def serve() -> None:
            while True:
                try:
                    peer, _ = server.accept()
                except OSError:
                    return
                with peer:
                    try:
                        context.wrap_socket(peer, server_side=True)
                    except (ssl.SSLError, OSError):
                        continue

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        kind, told = failure(BrokerSettings(host=HOST, port=server.getsockname()[1], ca_file=tmp_path / "authority.pem"))
        server.shutdown(socket.SHUT_RDWR)
    assert (kind, "at least TLS 1.2" in told) == ("tls", True), told


def test_tls_to_a_plain_port_and_the_reverse_are_told(broker: TlsBroker, tmp_path):
    with mosquitto(tmp_path) as plain:
        kind, told = failure(broker.client("kitchen").model_copy(update={"port": plain.port}))
        assert (kind, "is that port the TLS listener?" in told) == ("no-tls", True), told
    kind, told = failure(BrokerSettings(host=HOST, port=broker.port, tls=False))
    assert (kind, "set tls = true" in told) == ("no-tls", True), told


def test_each_failure_is_distinct():
    words = [words for _, words in (*OWN_CERTIFICATES.values(), *BROKER_CERTIFICATES.values())]
    assert len(set(words)) == len(words) - 1  # a claim's certificate is as foreign to the devices' listener as any other


def test_a_refused_publish_says_that_the_rules_forbid_it(broker: TlsBroker):
    connection = BrokerConnection(broker.client("kitchen"), "kitchen")
    connection.start()
    try:
        wait_until(lambda: connection.connected, 30, "connected")
        handle = connection.publish("mobillm/v1/garage/up/health", b"x")
        wait_until(lambda: handle.failed, 30, "refused")
        assert "access rules do not let this name write" in handle.rc
    finally:
        connection.stop()


# Clocks: the system's cannot be changed here, so the certificates' dates are far from it.


def test_with_a_trusted_time_dates_are_checked_against_it_alone(tmp_path: Path):
    """To a device in 1970 every certificate begins in the future, as this one does to this machine."""
    begins, ends = utc_now() + 20 * DAY, utc_now() + 25 * DAY
    with broker_that_shows(tmp_path, starting=begins, days=5) as settings:
        assert failure(settings)[0] == "broker-dates"
        assert connects(settings, trusted_time=(begins + DAY).timestamp())
        assert connects(settings, trusted_time=utc_now().timestamp())  # begins later than what has certainly passed
        kind, told = failure(settings, trusted_time=(ends + DAY).timestamp())
        assert (kind, "has expired" in told) == ("broker-dates", True), told


@pytest.mark.parametrize("case", ["another name", "foreign"])
def test_a_trusted_time_loosens_neither_chain_nor_name(tmp_path: Path, case: str):
    with broker_that_shows(tmp_path, **broker_certificate(case)) as settings:
        assert failure(settings, trusted_time=0.0)[0] == "broker-untrusted"


def test_files_that_vanish_are_told_and_awaited(broker: TlsBroker):
    settings = broker.client("hall")
    assert settings.key_file is not None
    connection = BrokerConnection(settings, "hall", reconnect_min_seconds=0.05)
    key = settings.key_file.read_bytes()
    settings.key_file.unlink()
    connection.start()
    try:
        wait_until(lambda: connection.failure_kind == "files", 30, "told")
        settings.key_file.write_bytes(key)
        wait_until(lambda: connection.connected, 30, "connected")
    finally:
        connection.stop()
