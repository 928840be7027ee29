"""A real mosquitto with the production files (broker_config/), paths and ports rewritten to a folder, and its authorities.

    with tls_broker(tmp_path) as broker:
        kitchen = BrokerConnection(broker.client("kitchen"), "kitchen", subscriptions=[...])
        claim = BrokerConnection(broker.client("claim-0123456789abcdef", claims=True), "claim-0123456789abcdef")
        broker.revoke("kitchen"); broker.reload()

`Authority` here makes what no right authority would sign (see `ClientCertificate`'s options), hence not coordinator/authority.py.
What the coordinator writes may take its place: `tls_broker(..., broker_directory=settings.broker_directory)` uses its files.

The production rules give every client the name in its certificate as its client id, whatever it asks for: to take over a
device's connection (and so end it) one needs a certificate in the device's name.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import re
import signal
import socket
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from side_tuning.broker_connection import BrokerSettings
from tests.brokers import RunningBroker, accepts_connections, free_port, mosquitto_program
from tests.waiting import wait_until

BROKER_CONFIG = Path(__file__).parents[1] / "broker_config"
HOST = "127.0.0.1"
DAY = dt.timedelta(days=1)


def utc_now() -> dt.datetime:
    return dt.datetime.now(dt.timezone.utc)


@dataclass(frozen=True)
class Issued:
    """A certificate and its key, as objects and as the files that programs read."""

    certificate: x509.Certificate
    certificate_file: Path
    key_file: Path


class Authority:
    """A small test authority that signs whatever it is told to, and revokes."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.certificate_file = folder / f"{name}.pem"
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.revoked: list[int] = []
        folder.mkdir(parents=True, exist_ok=True)
        now = utc_now()
        certificate = (
            x509.CertificateBuilder()
            .subject_name(self.subject).issuer_name(self.subject).public_key(self.key.public_key())
            .serial_number(x509.random_serial_number()).not_valid_before(now - DAY).not_valid_after(now + 30 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(authority=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        self.certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def issue(
        self,
        common_name: str,
        file_name: str,
        *,
        usage: str | None = "client",
        not_before: dt.datetime | None = None,
        not_after: dt.datetime | None = None,
        addresses: Sequence[str] = (),
    ) -> Issued:
        """A certificate and key under `folder`; `usage` None leaves the extended key usage out, "" names another purpose."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)] if common_name else [])
        now = utc_now()
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject).issuer_name(self.subject).public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(not_before or now - dt.timedelta(hours=1)).not_valid_after(not_after or now + 10 * DAY)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(authority=False), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        if usage is not None:
            purpose = {"client": ExtendedKeyUsageOID.CLIENT_AUTH, "server": ExtendedKeyUsageOID.SERVER_AUTH}.get(
                usage, ExtendedKeyUsageOID.CODE_SIGNING
            )
            builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        if addresses:
            names = [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses]
            builder = builder.add_extension(x509.SubjectAlternativeName([*names, x509.DNSName("localhost")]), critical=False)
        return save(builder.sign(self.key, hashes.SHA256()), key, self.folder, file_name)

    def write_revocations(self, path: Path, *, next_update: dt.datetime | None = None) -> None:
        """Atomically, as the coordinator does: the broker never sees half a list."""
        # Of two lists with the same date OpenSSL keeps the one that it read first, and dates are whole seconds.
        last_update = utc_now() - dt.timedelta(hours=1) + dt.timedelta(seconds=len(self.revoked))
        builder = x509.CertificateRevocationListBuilder().issuer_name(self.subject).last_update(last_update)
        builder = builder.next_update(next_update or utc_now() + 30 * DAY)
        for serial in self.revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(last_update).build()
            builder = builder.add_revoked_certificate(entry)
        temporary = path.with_suffix(".new")
        temporary.write_bytes(builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        temporary.replace(path)


def save(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, folder: Path, file_name: str) -> Issued:
    issued = Issued(certificate, folder / f"{file_name}.pem", folder / f"{file_name}.key")
    issued.certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    issued.key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    issued.key_file.chmod(0o600)
    return issued


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority, key_cert_sign=authority, crl_sign=authority, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )


@dataclass
class TlsBroker:
    """A running broker and whom it trusts. `fleet` and `claims` are None where the coordinator's own files are used."""

    folder: Path
    port: int
    claims_port: int
    running: RunningBroker
    broker_directory: Path
    authorities: dict[str, Authority] = field(default_factory=dict)  # "fleet" and "claims"
    _issued: dict[tuple[str, bool], Issued] = field(default_factory=dict)

    def issue(self, name: str, *, claims: bool = False) -> Issued:
        """The certificate for `name`, made on the first call."""
        if (name, claims) not in self._issued:
            file_name = re.sub(r"[^A-Za-z0-9-]", "_", name) + f"-{len(self._issued)}"
            self._issued[name, claims] = self.authorities["claims" if claims else "fleet"].issue(name, file_name)
        return self._issued[name, claims]

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
        self.authorities[kind].revoked.append(self.issue(name, claims=claims).certificate.serial_number)
        self.authorities[kind].write_revocations(self.broker_directory / f"{kind}-revoked.pem")

    def reload(self) -> None:
        """SIGHUP, and wait until mosquitto has read its files again."""
        before = self._log().count("Reloading config.")
        assert self.running.process is not None
        self.running.process.send_signal(signal.SIGHUP)
        wait_until(lambda: self._log().count("Reloading config.") > before, 30, "mosquitto reloads")
        # It says so first and reads then, in the loop that also accepts connections: a handshake that it refuses comes after.
        self.knock()

    def knock(self) -> None:
        """Returns once the broker's loop has come round: a client without a certificate has been turned away."""
        context = ssl.create_default_context(cafile=str(self.broker_directory / "fleet-authority.pem"))
        for port in (self.port, self.claims_port):
            try:
                with socket.create_connection((HOST, port), timeout=30) as plain, context.wrap_socket(plain, server_hostname=HOST) as tls:
                    tls.recv(1)
            except OSError:
                pass

    def _log(self) -> str:
        return self.running.log.read_text(errors="replace")


def write_broker_files(folder: Path) -> dict[str, Authority]:
    """What the coordinator's broker_directory holds, from two new authorities."""
    authorities = {kind: Authority(folder / "authorities", f"{kind}-authority") for kind in ("fleet", "claims")}
    directory = folder / "broker"
    directory.mkdir(parents=True, exist_ok=True)
    for kind, authority in authorities.items():
        (directory / f"{kind}-authority.pem").write_bytes(authority.certificate_file.read_bytes())
        authority.write_revocations(directory / f"{kind}-revoked.pem")
    server = authorities["fleet"].issue("broker", "broker", usage="server", addresses=[HOST])
    (directory / "broker.pem").write_bytes(server.certificate_file.read_bytes())
    (directory / "broker.key").write_bytes(server.key_file.read_bytes())
    (directory / "broker.key").chmod(0o600)
    return authorities


def write_configuration(folder: Path, broker_directory: Path, *, port: int, claims_port: int, extra: str = "") -> Path:
    """mosquitto.conf as shipped but for paths, ports and the address; the access rules are the shipped files."""
    text = (BROKER_CONFIG / "mosquitto.conf").read_text(encoding="utf-8")
    replaced = {
        "listener 8883": f"listener {port} {HOST}",
        "listener 8884": f"listener {claims_port} {HOST}",
        "/mosquitto/broker/": f"{broker_directory}/",
        "/mosquitto/config/": f"{BROKER_CONFIG}/",
        "/mosquitto/data/": f"{folder}/data/",
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
        extra: more lines of configuration, which fall to the claims' listener or to all.

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
    running.start()
    wait_until(lambda: accepts_connections(claims_port), 30, f"the broker listens on port {claims_port} for claims")
    try:
        yield TlsBroker(folder, port, claims_port, running, broker_directory, authorities)
    finally:
        running.stop()
