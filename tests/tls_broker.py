"""A real mosquitto with the production files (broker_config/), paths and ports rewritten to a folder, and its authorities.

    with tls_broker(tmp_path) as broker:
        kitchen = BrokerConnection(broker.client("kitchen"), "kitchen", subscriptions=[...])
        claim = BrokerConnection(broker.client("claim-0123456789abcdef", claims=True), "claim-0123456789abcdef")
        broker.revoke("kitchen")
        broker.reload()

With the coordinator's own files: `tls_broker(folder, broker_directory=settings.broker_directory, port=..., claims_port=...)`; then
`issue`, `client` and `revoke` are not to be used.

The production rules give every client the name in its certificate as its client id, whatever it asks for: to take over a
device's connection (and so end it) one needs a certificate in the device's name.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from coordinator.authority import Authority, certificate_pem, key_pem, make_authority, new_key, serial_hex
from coordinator.files import write_atomically
from side_tuning.broker_settings import BrokerSettings
from tests.brokers import RunningBroker, accepts_connections, free_port, mosquitto_program
from tests.waiting import wait_until

BROKER_CONFIG = Path(__file__).parents[1] / "broker_config"
HOST = "127.0.0.1"


def utc_now() -> datetime:
    return datetime.now(timezone.utc)


@dataclass(frozen=True)
class Issued:
    """A certificate with the files that programs read."""

    certificate: x509.Certificate
    certificate_file: Path
    key_file: Path


def save(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, folder: Path, file_name: str) -> Issued:
    issued = Issued(certificate, folder / f"{file_name}.pem", folder / f"{file_name}.key")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(issued.certificate_file, certificate_pem(certificate))
    write_atomically(issued.key_file, key_pem(key), 0o600)
    return issued


def odd_certificate(
    authority: Authority,
    folder: Path,
    file_name: str,
    *,
    name: str,
    usage: x509.ObjectIdentifier | None = ExtendedKeyUsageOID.CLIENT_AUTH,
    not_before: datetime | None = None,
    not_after: datetime | None = None,
) -> Issued:
    """What coordinator/authority.py would never sign: another purpose (None: any), other dates, any name ("": no name at all)."""
    key = new_key()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)] if name else [])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before or utc_now() - timedelta(hours=1))
        .not_valid_after(not_after or utc_now() + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    )
    if usage is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    return save(builder.sign(authority.key, hashes.SHA256()), key, folder, file_name)


@dataclass
class TlsBroker:
    """A running broker and the authorities that it trusts ("fleet" and "claims"; none where the coordinator has them)."""

    folder: Path
    port: int
    claims_port: int
    running: RunningBroker
    broker_directory: Path
    authorities: dict[str, Authority] = field(default_factory=dict)
    issued: dict[tuple[str, bool], Issued] = field(default_factory=dict)
    revoked: dict[str, list[tuple[str, datetime]]] = field(default_factory=lambda: {"fleet": [], "claims": []})

    def issue(self, name: str, *, claims: bool = False) -> Issued:
        """The certificate for `name`, made on the first call."""
        if (name, claims) not in self.issued:
            key = new_key()
            authority = self.authorities["claims" if claims else "fleet"]
            certificate = authority.issue(key.public_key(), name, now=utc_now(), days=10, usage="client")
            self.issued[name, claims] = save(certificate, key, self.folder / "clients", f"{name}-{len(self.issued)}")
        return self.issued[name, claims]

    def settings(self, issued: Issued | None, *, claims: bool = False) -> BrokerSettings:
        """How to reach the devices' port, or the claims', with this certificate (or none)."""
        return BrokerSettings(
            host=HOST,
            port=self.claims_port if claims else self.port,
            ca_file=self.broker_directory / "fleet-authority.pem",
            certificate_file=issued.certificate_file if issued else None,
            key_file=issued.key_file if issued else None,
            reconnect_max_seconds=0.5,
        )

    def client(self, name: str, *, claims: bool = False) -> BrokerSettings:
        """Settings for a client with a certificate in this name, from the right authority for the port."""
        return self.settings(self.issue(name, claims=claims), claims=claims)

    def revoke(self, name: str, *, claims: bool = False) -> None:
        """Write the revocation list; the broker knows it after `reload`. A connection that is up stays up."""
        kind = "claims" if claims else "fleet"
        self.revoked[kind].append((serial_hex(self.issue(name, claims=claims).certificate), utc_now()))
        self.write_revocations(kind)

    def write_revocations(self, kind: str, *, days: float = 30) -> None:
        content = self.authorities[kind].revocation_list(self.revoked[kind], now=utc_now(), days=days)
        write_atomically(self.broker_directory / f"{kind}-revoked.pem", content)

    def reload(self) -> None:
        """SIGHUP, and wait until mosquitto has read its files again."""
        assert self.running.process is not None
        before = self.log().count("Reloading config.")
        self.running.process.send_signal(signal.SIGHUP)
        wait_until(lambda: self.log().count("Reloading config.") > before, 60, "mosquitto reloads")
        self.knock()  # it says so before it reads, in the loop that also accepts connections

    def knock(self) -> None:
        """Return when the broker's loop has come round: it has turned away a client without a certificate, on each port."""
        context = ssl.create_default_context(cafile=str(self.broker_directory / "fleet-authority.pem"))
        for port in (self.port, self.claims_port):
            with (
                suppress(OSError),
                socket.create_connection((HOST, port), timeout=60) as plain,
                context.wrap_socket(plain, server_hostname=HOST) as tls,
            ):
                tls.recv(1)

    def log(self) -> str:
        return self.running.log.read_text(errors="replace")

    def wait_until_up(self) -> None:
        # Said after mosquitto has set itself up for signals, which is later than its first listener: a HUP before that ends it.
        wait_until(lambda: re.search(r"mosquitto version .* running", self.log()), 60, "mosquitto runs")
        wait_until(lambda: accepts_connections(self.claims_port), 60, f"the broker listens on port {self.claims_port} for claims")


def write_broker_files(folder: Path) -> dict[str, Authority]:
    """What the coordinator's broker_directory holds, made by two new authorities, in `folder`/broker."""
    directory = folder / "broker"
    directory.mkdir(parents=True, exist_ok=True)
    now = utc_now()
    authorities = {kind: make_authority(f"{kind} authority of a test", now=now, days=100) for kind in ("fleet", "claims")}
    for kind, authority in authorities.items():
        write_atomically(directory / f"{kind}-authority.pem", certificate_pem(authority.certificate))
        write_atomically(directory / f"{kind}-revoked.pem", authority.revocation_list([], now=now, days=30))
    key = new_key()
    server = authorities["fleet"].issue(key.public_key(), "broker", now=now, days=30, usage="server", names=[HOST, "localhost"])
    save(server, key, directory, "broker")
    return authorities


def write_configuration(folder: Path, broker_directory: Path, *, port: int, claims_port: int, extra: str = "") -> Path:
    """mosquitto.conf as shipped but for paths, ports and the address; the access rules are the shipped files."""
    text = (BROKER_CONFIG / "mosquitto.conf").read_text(encoding="utf-8")
    replaced = {
        "listener 8883": f"listener {port} {HOST}",
        "listener 8884": f"listener {claims_port} {HOST}",
        " /mosquitto/broker/": f" {broker_directory}/",
        " /mosquitto/config/": f" {BROKER_CONFIG}/",
        " /mosquitto/data/": f" {folder}/data/",
    }
    for old, new in replaced.items():
        assert old in text, old
        text = text.replace(old, new)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    # Started as root (containers), mosquitto would drop to a user that cannot read the test's files.
    user = "user root\n" if os.geteuid() == 0 else ""
    path = folder / "mosquitto.conf"
    path.write_text(f"{text}\nlog_type information\n{user}{extra}\n", encoding="utf-8")
    return path


@contextmanager
def tls_broker(
    folder: Path, *, broker_directory: Path | None = None, port: int | None = None, claims_port: int | None = None, extra: str = "",
) -> Iterator[TlsBroker]:
    """A running broker with the production configuration.

    Args:
        folder: where authorities, certificates, data, configuration and log go.
        broker_directory: the coordinator's; none makes one from two test authorities.
        port: of the devices' listener; none takes a free one.
        claims_port: of the claims' listener.
        extra: more lines of configuration.

    """
    program = mosquitto_program()
    assert program is not None, "mark the test with needs_mosquitto"
    folder.mkdir(parents=True, exist_ok=True)
    authorities: dict[str, Authority] = {}
    if broker_directory is None:
        authorities = write_broker_files(folder)
        broker_directory = folder / "broker"
    port, claims_port = port or free_port(), claims_port or free_port()
    configuration = write_configuration(folder, broker_directory, port=port, claims_port=claims_port, extra=extra)
    running = RunningBroker([program, "-c", str(configuration)], port, folder / "mosquitto.log")
    broker = TlsBroker(folder, port, claims_port, running, broker_directory, authorities)
    try:
        running.start()
        broker.wait_until_up()
        yield broker
    finally:
        running.stop()
