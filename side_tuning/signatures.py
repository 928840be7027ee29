"""Ed25519 signatures over checkpoint manifests and backbone offers: the coordinator signs, every device verifies.

The private key is PEM (PKCS#8) in a file only its owner reads; the public key travels as PEM or as 64 hexadecimal
digits. Nothing is interpreted before its signature has been checked. Each kind of message has a domain of its own in front of
what is signed, so that none can pass for another.
"""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from side_tuning.wire.backbone_messages import BackboneOffer
from side_tuning.wire.messages import CheckpointManifest, SignedManifest


class SignatureError(ValueError):
    """A key that cannot be read, or a manifest that its key did not sign; the text says which and the cure."""


def make_key(path: Path) -> None:
    """Write a new private key to `path`, readable by its owner only; refuses to replace an existing file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    # O_EXCL: two processes that start together must not sign with different keys.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())


def load_signing_key(path: Path) -> Ed25519PrivateKey:
    """Read the private key that `make_key` wrote."""
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise SignatureError(f"signing key {path} cannot be read: {error}; restore it from a backup or make a new one") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise SignatureError(f"signing key {path} is not an Ed25519 key; make one with `make_key`")
    return key


def public_key_hex(key: Ed25519PrivateKey) -> str:
    """The public half as 64 hexadecimal digits, the form that goes into a device's key file."""
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def load_public_key(path: Path) -> Ed25519PublicKey:
    """Read a public key: 64 hexadecimal digits, or PEM."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SignatureError(f"public key {path} cannot be read: {error}; copy it from the coordinator") from error
    try:
        if content.lstrip().startswith(b"-----BEGIN"):
            key = load_pem_public_key(content)
        else:
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(content.decode("ascii").strip()))
    except ValueError as error:
        raise SignatureError(
            f"public key {path} is neither 64 hexadecimal digits nor PEM ({error}); copy the coordinator's public key"
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise SignatureError(f"public key {path} is not an Ed25519 key; copy the coordinator's public key")
    return key


def sign_manifest(manifest: CheckpointManifest, key: Ed25519PrivateKey) -> SignedManifest:
    body = manifest.to_bytes()
    return SignedManifest(body, key.sign(SignedManifest.SIGNATURE_DOMAIN + body))


def verify_manifest(signed: SignedManifest, public_key: Ed25519PublicKey) -> CheckpointManifest:
    """The manifest, if `public_key` signed it; else `SignatureError`. Malformed signed bytes raise `FrameError`."""
    _check(signed, SignedManifest.SIGNATURE_DOMAIN, public_key, "checkpoint manifest")
    return CheckpointManifest.from_bytes(signed.manifest)


def sign_offer(offer: BackboneOffer, key: Ed25519PrivateKey) -> SignedManifest:
    body = offer.to_bytes()
    return SignedManifest(body, key.sign(BackboneOffer.SIGNATURE_DOMAIN + body))


def verify_offer(signed: SignedManifest, public_key: Ed25519PublicKey) -> BackboneOffer:
    """The offer, if `public_key` signed it; else `SignatureError`. Malformed signed bytes raise `FrameError`."""
    _check(signed, BackboneOffer.SIGNATURE_DOMAIN, public_key, "backbone offer")
    return BackboneOffer.from_bytes(signed.manifest)


def _check(signed: SignedManifest, domain: bytes, public_key: Ed25519PublicKey, what: str) -> None:
    try:
        public_key.verify(signed.signature, domain + signed.manifest)
    except InvalidSignature:
        raise SignatureError(
            f"the {what} was not signed by the configured key; check that the device carries the coordinator's current public key"
        ) from None
