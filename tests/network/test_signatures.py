"""A device must accept exactly the bytes that the coordinator's key signed."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from side_tuning.signatures import (
    SignatureError,
    load_public_key,
    load_signing_key,
    make_key,
    public_key_hex,
    sign_manifest,
    verify_manifest,
)
from side_tuning.wire.messages import Blob, CheckpointManifest, SignedManifest, TapPlan


@pytest.fixture
def manifest() -> CheckpointManifest:
    blob = Blob("ladder.safetensors", "ab" * 32, 1234, 4096)
    plan = TapPlan(version=3, labels=("on", "off"), blocks=2)
    return CheckpointManifest(7, "run", 10, 1.5, "cd" * 16, plan, 64, blob, blob, {"accuracy": 0.9})


def test_signed_manifest_survives_the_trip(tmp_path: Path, manifest: CheckpointManifest) -> None:
    make_key(tmp_path / "key")
    key = load_signing_key(tmp_path / "key")
    signed = SignedManifest.from_bytes(sign_manifest(manifest, key).to_bytes())
    assert verify_manifest(signed, key.public_key()) == manifest


def test_every_flipped_byte_is_refused(tmp_path: Path, manifest: CheckpointManifest) -> None:
    make_key(tmp_path / "key")
    key = load_signing_key(tmp_path / "key")
    signed = sign_manifest(manifest, key)
    for position in range(len(signed.manifest)):
        changed = bytearray(signed.manifest)
        changed[position] ^= 0x01
        with pytest.raises(SignatureError):
            verify_manifest(SignedManifest(bytes(changed), signed.signature), key.public_key())
    for position in range(len(signed.signature)):
        changed = bytearray(signed.signature)
        changed[position] ^= 0x80
        with pytest.raises(SignatureError):
            verify_manifest(SignedManifest(signed.manifest, bytes(changed)), key.public_key())


def test_another_key_is_refused(tmp_path: Path, manifest: CheckpointManifest) -> None:
    make_key(tmp_path / "ours")
    make_key(tmp_path / "theirs")
    signed = sign_manifest(manifest, load_signing_key(tmp_path / "theirs"))
    with pytest.raises(SignatureError, match="current public key"):
        verify_manifest(signed, load_signing_key(tmp_path / "ours").public_key())


def test_a_signature_without_the_domain_is_refused(tmp_path: Path, manifest: CheckpointManifest) -> None:
    make_key(tmp_path / "key")
    key = load_signing_key(tmp_path / "key")
    body = manifest.to_bytes()
    with pytest.raises(SignatureError):
        verify_manifest(SignedManifest(body, key.sign(body)), key.public_key())


def test_private_key_is_its_owners_alone_and_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "key"
    make_key(path)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    with pytest.raises(FileExistsError):
        make_key(path)


def test_public_key_reads_as_hexadecimal_and_as_pem(tmp_path: Path) -> None:
    make_key(tmp_path / "key")
    key = load_signing_key(tmp_path / "key")
    (tmp_path / "hex").write_text(public_key_hex(key) + "\n")
    (tmp_path / "pem").write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    raw = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    for name in ("hex", "pem"):
        assert load_public_key(tmp_path / name).public_bytes(Encoding.Raw, PublicFormat.Raw) == raw


@pytest.mark.parametrize("content", [b"", b"zz", b"ab" * 31, b"\xff\xfe", b"-----BEGIN PUBLIC KEY-----\nx\n"])
def test_unreadable_keys_name_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    with pytest.raises(SignatureError, match="key"):
        load_public_key(path)
    with pytest.raises(SignatureError, match="signing key"):
        load_signing_key(path)
    with pytest.raises(SignatureError, match="missing"):
        load_public_key(tmp_path / "missing")
