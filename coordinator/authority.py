"""Certificate authorities: make, keep, sign certificates and revocation lists. ECDSA P-256 throughout.

Pure but for `save_authority` and `load_authority`: no clock, no store, no network.
"""

from __future__ import annotations

import hashlib
import ipaddress
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from coordinator.files import write_atomically
from coordinator.settings import ConfigError
from side_tuning.wire.certificates import MAX_CSR_BYTES

Usage = Literal["client", "server"]

# Certificates and revocation lists are valid from a little before they were made: clocks are never quite the same.
BACKDATED = timedelta(hours=1)
PRIVATE_FILE = 0o600
PRIVATE_FOLDER = 0o700


class AuthorityError(ConfigError):
    """An authority's files cannot be used; the text names the file and the cure."""


class RequestError(ValueError):
    """A certificate request that cannot be signed; the text says why."""


@dataclass(frozen=True)
class Authority:
    """A certificate that may sign others, with its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def issue(
        self,
        public_key: ec.EllipticCurvePublicKey,
        common_name: str,
        *,
        now: datetime,
        days: float,
        usage: Usage,
        names: Sequence[str] = (),
    ) -> x509.Certificate:
        """Sign a certificate, valid from an hour before `now` for `days`, but never longer than the authority itself.

        `names` are the host names and addresses that a server answers to.

        Raises:
            AuthorityError: the authority has expired.
        """
        ends = min(now + timedelta(days=days), self.certificate.not_valid_after_utc)
        if ends <= now:
            raise AuthorityError(
                f"{common_name_of(self.certificate)} expired on {ends:%Y-%m-%d}: move its files away, run `coordinator init` "
                "and enrol every device again"
            )
        purpose = ExtendedKeyUsageOID.CLIENT_AUTH if usage == "client" else ExtendedKeyUsageOID.SERVER_AUTH
        builder = (
            _builder(common_name, public_key, now - BACKDATED, ends)
            .issuer_name(self.certificate.subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(self._key_identifier(), critical=False)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName([general_name(name) for name in names]), critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def revocation_list(self, revoked: Iterable[tuple[str, datetime]], *, now: datetime, days: float) -> bytes:
        """The signed list (PEM) of revoked (serial, when), good for `days`: a broker lets nobody in with an outdated one.

        Its number is the time in milliseconds, so that a later list has a higher one without anybody counting.
        """
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(now - BACKDATED)
            .next_update(now + timedelta(days=days))
            .add_extension(x509.CRLNumber(int(now.timestamp() * 1000)), critical=False)
            .add_extension(self._key_identifier(), critical=False)
        )
        for serial, at in revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(int(serial, 16)).revocation_date(at).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def _key_identifier(self) -> x509.AuthorityKeyIdentifier:
        identifier = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def make_authority(common_name: str, *, now: datetime, days: float) -> Authority:
    """A new authority that signs end certificates only (path length 0)."""
    key = new_key()
    builder = (
        _builder(common_name, key.public_key(), now - BACKDATED, now + timedelta(days=days))
        .issuer_name(_name(common_name))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
    )
    return Authority(builder.sign(key, hashes.SHA256()), key)


def save_authority(directory: Path, name: str, authority: Authority) -> None:
    """Write `name.key` (for this user alone) and `name.pem`. The certificate comes last: where it is, the key is."""
    directory.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
    write_atomically(directory / f"{name}.key", key_pem(authority.key), PRIVATE_FILE)
    write_atomically(directory / f"{name}.pem", certificate_pem(authority.certificate))


def load_authority(directory: Path, name: str) -> Authority:
    """Inverse of `save_authority`.

    Raises:
        AuthorityError: a file is missing, others may read the key, or the two do not make an authority.

    """
    certificate_file, key_file = directory / f"{name}.pem", directory / f"{name}.key"
    certificate = load_certificate(certificate_file)
    key = load_key(key_file)
    if certificate.public_key() != key.public_key():
        raise AuthorityError(f"{key_file} is not the key of {certificate_file}; bring both back from one backup")
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound:
        constraints = x509.BasicConstraints(ca=False, path_length=None)
    if not constraints.ca:
        raise AuthorityError(f"{certificate_file} is no authority's certificate; bring it back from a backup")
    return Authority(certificate, key)


def load_certificate(path: Path) -> x509.Certificate:
    """The first certificate in a PEM file; raises `AuthorityError`."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise AuthorityError(f"certificate {path} cannot be read: {error.strerror}; run `coordinator init`, or bring it back from a backup") from error
    except ValueError as error:
        raise AuthorityError(f"certificate {path} is no PEM certificate: {error}; bring it back from a backup") from error


def load_key(path: Path, *, shared: bool = False) -> ec.EllipticCurvePrivateKey:
    """A private key that nobody else may read, unless it is `shared`; raises `AuthorityError`."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        content = path.read_bytes()
    except OSError as error:
        raise AuthorityError(f"key {path} cannot be read: {error.strerror}; run `coordinator init`, or bring it back from a backup") from error
    if mode & 0o077 and not shared:
        raise AuthorityError(f"key {path} can be read by others (mode {mode:04o}): `chmod 600 {path}`, and think about who may have read it")
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise AuthorityError(f"key {path} is no PEM key: {error}; bring it back from a backup") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise AuthorityError(f"key {path} is no elliptic-curve key; bring it back from a backup")
    return key


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Unencrypted PKCS #8: the programs start without anybody at hand to type a password."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def key_digest(public_key: ec.EllipticCurvePublicKey) -> str:
    """sha256 of the SubjectPublicKeyInfo (DER), hexadecimal: names a key in messages and in the store."""
    encoded = public_key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(encoded).hexdigest()


def serial_hex(certificate: x509.Certificate) -> str:
    """Lower-case hexadecimal; 40 digits for certificates made here."""
    return f"{certificate.serial_number:x}"


def common_name_of(subject: x509.Certificate | x509.CertificateSigningRequest) -> str:
    """The one common name; empty where there is none or several."""
    names = subject.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    value = names[0].value if len(names) == 1 else ""
    return value if isinstance(value, str) else ""


def public_key_of(subject: x509.Certificate | x509.CertificateSigningRequest) -> ec.EllipticCurvePublicKey:
    """The P-256 key in a certificate or request; raises `RequestError` for any other kind."""
    try:
        key = subject.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise RequestError(f"its key cannot be read: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise RequestError("its key is no ECDSA P-256 key")
    return key


def read_request(pem: bytes) -> x509.CertificateSigningRequest:
    """A request whose asker has shown to hold its (P-256) key. What else it asks for is for the caller to ignore.

    Raises:
        RequestError: it is too long, no request, of another kind of key, or signed by another.

    """
    if len(pem) > MAX_CSR_BYTES:
        raise RequestError(f"the request has {len(pem)} bytes, at most {MAX_CSR_BYTES} are allowed")
    try:
        request = x509.load_pem_x509_csr(pem)
        public_key_of(request)
        valid = request.is_signature_valid
    except RequestError:
        raise
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise RequestError(f"the request is no PEM certificate request: {error}") from error
    if not valid:
        raise RequestError("the request is not signed with the key that it names")
    return request


def general_name(name: str) -> x509.GeneralName:
    """A subject alternative name: an address if it is one, else a host name."""
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def new_serial() -> int:
    """159 random bits of which the first is set: always 40 hexadecimal digits, whoever prints it."""
    return x509.random_serial_number() | 1 << 158


def _builder(common_name: str, public_key: ec.EllipticCurvePublicKey, begins: datetime, ends: datetime) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(_name(common_name))
        .public_key(public_key)
        .serial_number(new_serial())
        .not_valid_before(begins)
        .not_valid_after(ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _key_usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
