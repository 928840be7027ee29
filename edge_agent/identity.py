"""The device's identity on its disk: a key made here, the certificate for it, whom to trust.

Rules: key and certificate change together (a folder appears whole under its serial number, then the link `identity` moves to
it atomically); the folder before stays until the new one has connected; a key whose certificate has not come yet is kept,
so that the same question can be asked again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from edge_agent.checkpoint_store import write_file
from edge_agent.identity_file import (
    AUTHORITIES,
    CERTIFICATE,
    CHECKPOINT_KEY,
    FACTS,
    IDENTITY,
    KEY,
    IdentityError,
    IdentityFacts,
    read_facts,
)
from edge_agent.spool_file import sync_folder

NEXT = "next"
CLAIM = "claim"  # in NEXT: what its key is for


@dataclass(frozen=True)
class Identity:
    """The identity in use."""

    facts: IdentityFacts
    certificate: x509.Certificate
    authorities: bytes  # PEM

    @property
    def serial(self) -> str:
        return serial_hex(self.certificate)

    @property
    def begins(self) -> float:
        return self.certificate.not_valid_before_utc.timestamp()

    @property
    def ends(self) -> float:
        """Seconds since 1970."""
        return self.certificate.not_valid_after_utc.timestamp()


class IdentityStore:
    """STATE/identity and STATE/identities."""

    def __init__(self, state_directory: Path) -> None:
        self.state = state_directory
        self.link = state_directory / IDENTITY
        self.folder = state_directory / "identities"
        self._next = self.folder / NEXT

    @contextmanager
    def held(self) -> Iterator[None]:
        """Only one program at a time obtains an identity. Raises `IdentityError`."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = (self.folder / ".lock").open("wb")
        except OSError as error:
            raise IdentityError(f"{self.folder} cannot be written: {error.strerror}; make the state directory writable for this user") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise IdentityError(f"another edge-agent is enrolling this device ({self.folder}); wait for it, or stop it") from error
            yield

    def load(self) -> Identity | None:
        """The identity in use; None: this device is not enrolled.

        Raises:
            IdentityError: it is there and cannot be used.

        """
        self._finish_switch()
        facts = read_facts(self.state)
        if facts is None:
            return None
        try:
            certificate = x509.load_pem_x509_certificate((self.link / CERTIFICATE).read_bytes())
            authorities = (self.link / AUTHORITIES).read_bytes()
            key = load_key((self.link / KEY).read_bytes())
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise IdentityError(f"the identity in {self.link} is damaged: {error}; remove it and enrol anew") from error
        if key_digest(key.public_key()) != key_digest(certificate.public_key()):
            raise IdentityError(f"{KEY} and {CERTIFICATE} in {self.link} do not belong together; remove the folder and enrol anew")
        return Identity(facts, certificate, authorities)

    def next_key(self, purpose: str) -> ec.EllipticCurvePrivateKey:
        """The key to ask a certificate for: the one of an unanswered request for the same purpose (a claim, or a renewal), else new."""
        with suppress(OSError, ValueError, TypeError, UnsupportedAlgorithm):
            if (self._next / CLAIM).read_text(encoding="ascii") == purpose:
                return load_key((self._next / KEY).read_bytes())
        self.forget_next()
        self._next.mkdir(mode=0o700, parents=True)
        key = ec.generate_private_key(ec.SECP256R1())
        content = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        with os.fdopen(os.open(self._next / KEY, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        write_file(self._next / CLAIM, purpose.encode("ascii"))  # last: a key without it is not used
        sync_folder(self._next)
        sync_folder(self.folder)
        return key

    def forget_next(self) -> None:
        shutil.rmtree(self._next, ignore_errors=True)

    def install(self, facts: IdentityFacts, certificate: bytes, authorities: bytes, checkpoint_key: str) -> Identity:
        """The next key has its certificate: this is the identity from now on."""
        serial = serial_hex(x509.load_pem_x509_certificate(certificate))
        write_file(self._next / CERTIFICATE, certificate)
        write_file(self._next / AUTHORITIES, authorities)
        if checkpoint_key:
            write_file(self._next / CHECKPOINT_KEY, checkpoint_key.encode("ascii"))
        write_file(self._next / FACTS, facts.model_dump_json(indent=2).encode())
        sync_folder(self._next)
        target = self.folder / serial
        shutil.rmtree(target, ignore_errors=True)  # the same certificate once more, after a crash
        self._next.rename(target)
        sync_folder(self.folder)
        self._switch(target)
        (target / CLAIM).unlink(missing_ok=True)  # not before: the key would be forgotten by a crash in between, the claim spent on it
        identity = self.load()
        assert identity is not None, "it was just written"
        return identity

    def leftovers(self) -> list[Path]:
        """Folders that are not in use, whole or half removed."""
        used = self.link.resolve()
        return [path for path in self.folder.glob("*") if path.is_dir() and path.name != NEXT and path.resolve() != used]

    def others(self) -> list[Path]:
        """Complete identities that are not in use, the newest first."""
        return sorted((path for path in self.leftovers() if (path / FACTS).exists()), key=lambda path: path.stat().st_mtime, reverse=True)

    def drop_others(self) -> None:
        """The identity in use has proved itself."""
        for path in self.leftovers():
            shutil.rmtree(path, ignore_errors=True)

    def go_back(self) -> bool:
        """Give up the identity in use for the one before; False if there is none."""
        others = self.others()
        if not others:
            return False
        bad = self.link.resolve()
        self._switch(others[0])
        shutil.rmtree(bad, ignore_errors=True)
        return True

    def _switch(self, target: Path) -> None:
        if self.link.is_dir() and not self.link.is_symlink():  # copied here by hand, links resolved
            self.link.rename(self.folder / "before")
        aside = self.state / f".{IDENTITY}.new"
        aside.unlink(missing_ok=True)
        aside.symlink_to(target.relative_to(self.state))
        aside.replace(self.link)
        sync_folder(self.state)

    def _finish_switch(self) -> None:
        """A crash between the new folder and the link to it must not leave the device without an identity."""
        if not self.link.exists():
            others = self.others()
            if others:
                self._switch(others[0])


def certificate_request(key: ec.EllipticCurvePrivateKey, device: str) -> bytes:
    """A PKCS #10 request (PEM) for this device's name."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, device)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def check_certificate(pem: bytes, key: ec.EllipticCurvePrivateKey, device: str, authorities: bytes) -> x509.Certificate:
    """The certificate, if it is for this key and device and comes from one of these authorities.

    Raises:
        IdentityError: it is not; the text says what is wrong.

    """
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        digest = key_digest(certificate.public_key())
        trusted = x509.load_pem_x509_certificates(authorities)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise IdentityError(f"it cannot be read: {error}") from error
    if digest != key_digest(key.public_key()):
        raise IdentityError("it is for another key")
    names = [str(attribute.value) for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if names != [device]:
        raise IdentityError(f"it is for the name {', '.join(names) or 'none'!r}, not {device!r}")
    if not any(_issued_by(certificate, authority) for authority in trusted):
        raise IdentityError("it does not come from this fleet's authority")
    return certificate


def check_authorities(pem: bytes) -> bytes:
    """`pem`, if it holds authorities' certificates and nothing else; raises `IdentityError`."""
    try:
        certificates = x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise IdentityError(f"its authorities cannot be read: {error}") from error
    if not all(_is_authority(certificate) for certificate in certificates):
        raise IdentityError("what it calls authorities are none")
    return b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in certificates)


def certificate_in(path: Path | None) -> tuple[str, float | None]:
    """Serial (hexadecimal) and end (seconds since 1970) of the first certificate in a file; empty if there is none to read."""
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes()) if path is not None else None
    except (OSError, ValueError):
        certificate = None
    return ("", None) if certificate is None else (serial_hex(certificate), certificate.not_valid_after_utc.timestamp())


def serial_hex(certificate: x509.Certificate) -> str:
    return f"{certificate.serial_number:x}"


def key_digest(public_key: object) -> str:
    """sha256 of the SubjectPublicKeyInfo (DER), hexadecimal: names a key in messages."""
    if not isinstance(public_key, ec.EllipticCurvePublicKey):
        raise TypeError("not an elliptic-curve key")
    encoded = public_key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(encoded).hexdigest()


def load_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """A private key as this module writes it; raises `ValueError` or `TypeError`."""
    key = serialization.load_pem_private_key(pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError("not an elliptic-curve key")
    return key


def _issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    if not _is_authority(authority):
        return False
    try:
        certificate.verify_directly_issued_by(authority)
    except Exception:  # wrong name, wrong key, unknown algorithm: cryptography has an exception for each
        return False
    return True


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return False
