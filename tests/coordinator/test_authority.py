"""Authorities: what they sign holds before OpenSSL, their keys stay private, and damaged files are told in words."""

import contextlib
import ipaddress
import stat
import subprocess
from datetime import datetime, timedelta, timezone

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from coordinator.authority import (
    AuthorityError,
    RequestError,
    certificate_pem,
    common_name_of,
    key_digest,
    load_authority,
    make_authority,
    new_key,
    public_key_of,
    read_request,
    save_authority,
    serial_hex,
)

NOW = datetime.now(timezone.utc).replace(microsecond=0)
AUTHORITY = make_authority("tests fleet authority", now=NOW, days=3650)
SUBJECT = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kitchen")])


def issue(name="kitchen", *, authority=AUTHORITY, key=None, now=NOW, days=90.0, usage="client", names=()):
    return authority.issue((key or new_key()).public_key(), name, now=now, days=days, usage=usage, names=names)


def openssl(*arguments):
    return subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, timeout=60)


def request(key, name=SUBJECT):
    return x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())


def pem(thing):
    return thing.public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(("usage", "purpose", "other"), [("client", "sslclient", "sslserver"), ("server", "sslserver", "sslclient")])
def test_openssl_accepts_a_certificate_for_its_purpose_alone(tmp_path, usage, purpose, other):
    save_authority(tmp_path, "fleet-authority", AUTHORITY)
    leaf = tmp_path / "leaf.pem"
    leaf.write_bytes(certificate_pem(issue(usage=usage)))
    verify = ("verify", "-x509_strict", "-CAfile", tmp_path / "fleet-authority.pem", "-purpose")
    accepted, refused = openssl(*verify, purpose, leaf), openssl(*verify, other, leaf)
    assert accepted.returncode == 0, accepted.stderr
    assert refused.returncode != 0


def test_openssl_refuses_what_is_on_the_revocation_list_and_only_that(tmp_path):
    save_authority(tmp_path, "fleet-authority", AUTHORITY)
    good, bad = issue("good"), issue("bad")
    for name, certificate in (("good", good), ("bad", bad)):
        (tmp_path / name).write_bytes(certificate_pem(certificate))
    crl = tmp_path / "revoked.pem"
    check = ("verify", "-x509_strict", "-crl_check", "-CAfile", tmp_path / "fleet-authority.pem", "-CRLfile", crl)

    crl.write_bytes(AUTHORITY.revocation_list([], now=NOW, days=30))
    assert openssl(*check, tmp_path / "good", tmp_path / "bad").returncode == 0
    crl.write_bytes(AUTHORITY.revocation_list([(serial_hex(bad), NOW)], now=NOW + timedelta(seconds=1), days=30))
    assert openssl(*check, tmp_path / "good").returncode == 0
    refused = openssl(*check, tmp_path / "bad")
    assert refused.returncode != 0
    assert "certificate revoked" in refused.stderr

    number = openssl("crl", "-in", crl, "-noout", "-crlnumber").stdout.strip()
    assert int(number.partition("=")[2], 16) == int(NOW.timestamp() * 1000) + 1000


def test_an_authority_signs_end_certificates_only(tmp_path):
    """A device's key that signs another certificate gains nothing by it."""
    device_key = new_key()
    device = issue(key=device_key)
    forged = issue("boss", authority=type(AUTHORITY)(device, device_key))
    save_authority(tmp_path, "fleet-authority", AUTHORITY)
    (tmp_path / "device").write_bytes(certificate_pem(device))
    (tmp_path / "forged").write_bytes(certificate_pem(forged))
    result = openssl("verify", "-CAfile", tmp_path / "fleet-authority.pem", "-untrusted", tmp_path / "device", tmp_path / "forged")
    assert result.returncode != 0
    assert AUTHORITY.certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0


def test_a_server_answers_to_names_and_addresses():
    names = issue("broker", usage="server", names=["broker", "::1", "192.168.1.9"]).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert names.value.get_values_for_type(x509.DNSName) == ["broker"]
    assert set(names.value.get_values_for_type(x509.IPAddress)) == {ipaddress.ip_address("::1"), ipaddress.ip_address("192.168.1.9")}


def test_no_certificate_outlives_its_authority():
    short = make_authority("short", now=NOW, days=10)
    assert issue(authority=short, days=90).not_valid_after_utc == NOW + timedelta(days=10)
    with pytest.raises(AuthorityError, match=r"short expired on .*coordinator init"):
        issue(authority=short, now=NOW + timedelta(days=10))


def test_serials_always_have_forty_digits():
    serials = {serial_hex(issue()) for _ in range(20)}
    assert {len(serial) for serial in serials} == {40}
    assert len(serials) == 20


def test_an_authority_comes_back_from_its_files_and_its_key_is_private(tmp_path):
    folder = tmp_path / "authority"
    save_authority(folder, "fleet-authority", AUTHORITY)
    back = load_authority(folder, "fleet-authority")
    assert back.certificate == AUTHORITY.certificate
    assert key_digest(back.key.public_key()) == key_digest(AUTHORITY.key.public_key())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "fleet-authority.key").stat().st_mode) == 0o600


def _widen(folder):
    (folder / "a.key").chmod(0o640)


def _drop_key(folder):
    (folder / "a.key").unlink()


def _drop_certificate(folder):
    (folder / "a.pem").unlink()


def _garble_certificate(folder):
    (folder / "a.pem").write_bytes(b"no certificate")


def _garble_key(folder):
    (folder / "a.key").write_bytes(b"no key")


def _swap_key(folder):
    save_authority(folder, "b", make_authority("b", now=NOW, days=1))
    (folder / "b.key").replace(folder / "a.key")


def _no_authority(folder):
    key = new_key()
    save_authority(folder, "a", type(AUTHORITY)(issue(key=key), key))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_widen, r"a\.key can be read by others \(mode 0640\): `chmod 600"),
        (_drop_key, r"key .*a\.key cannot be read: No such file.*coordinator init"),
        (_drop_certificate, r"certificate .*a\.pem cannot be read: No such file"),
        (_garble_certificate, r"a\.pem is no PEM certificate"),
        (_garble_key, r"a\.key is no PEM key"),
        (_swap_key, r"a\.key is not the key of .*a\.pem"),
        (_no_authority, r"a\.pem is no authority's certificate"),
    ],
)
def test_files_that_cannot_be_used_are_told_in_words(tmp_path, damage, words):
    save_authority(tmp_path, "a", AUTHORITY)
    damage(tmp_path)
    with pytest.raises(AuthorityError, match=words):
        load_authority(tmp_path, "a")


def test_a_request_is_read_when_its_asker_holds_a_p256_key():
    key = new_key()
    read = read_request(pem(request(key)))
    assert (common_name_of(read), key_digest(public_key_of(read))) == ("kitchen", key_digest(key.public_key()))


def test_a_request_signed_by_another_key_is_refused():
    der = bytearray(request(new_key()).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1  # within the signature
    with pytest.raises(RequestError):
        read_request(pem(x509.load_der_x509_csr(bytes(der))))


@pytest.mark.parametrize(
    "key", [rsa.generate_private_key(65_537, 2048), ec.generate_private_key(ec.SECP384R1())], ids=["rsa", "p384"]
)
def test_other_kinds_of_keys_are_refused(key):
    with pytest.raises(RequestError, match="no ECDSA P-256 key"):
        read_request(pem(request(key)))


def test_a_name_is_taken_only_where_there_is_just_one():
    twice = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in ("kitchen", "boss")])
    assert common_name_of(request(new_key(), twice)) == ""
    assert common_name_of(request(new_key(), x509.Name([]))) == ""


SIGNED = request(new_key())


@given(st.binary(max_size=200), st.integers(0, 600))
def test_anything_else_is_no_request(content, cut):
    """Random bytes, and a real request cut short, altered or too long."""
    real = pem(SIGNED)
    for payload in (content, real[:cut] if cut < len(real) - 30 else b"", real[:cut] + content + real[cut + 1 :], real * 20):
        with contextlib.suppress(RequestError):
            assert common_name_of(read_request(payload)) == "kitchen"
