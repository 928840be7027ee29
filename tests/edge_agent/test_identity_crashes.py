"""Power cuts while an identity is obtained or replaced: at every write, the next start finds something whole to go on with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cryptography import x509

from coordinator.authority import certificate_pem, make_authority
from edge_agent.enrol import enrol
from edge_agent.identity import IdentityStore
from edge_agent.identity_file import IdentityFacts
from edge_agent.trusted_clock import TrustedClock
from tests.brokers import needs_mosquitto
from tests.edge_agent.answering import DEVICE, Answering, make_bundle, private_keys_in
from tests.tls_broker import HOST, tls_broker, utc_now

MOST_WRITES = 200


class PowerCut(BaseException):
    """Nothing catches it."""


class Cutter:
    """Ends the program before its n-th change to the disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = MOST_WRITES
        for owner, names in ((os, ("fsync",)), (Path, ("replace", "rename", "unlink", "symlink_to", "mkdir"))):
            for name in names:
                monkeypatch.setattr(owner, name, self._counting(getattr(owner, name)))

    def _counting(self, original):
        def counted(*arguments, **named):
            self.left -= 1
            if self.left == 0:
                raise PowerCut
            return original(*arguments, **named)

        return counted


def test_a_renewal_cut_short_anywhere_leaves_the_old_identity_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    authority = make_authority("fleet authority of a test", now=utc_now(), days=100)
    authorities = certificate_pem(authority.certificate)
    facts = IdentityFacts(device=DEVICE, host=HOST, port=8883, claim="claim-0123456789abcdef", checkpoint_key=True)

    def obtain(store: IdentityStore) -> str:
        key = store.next_key("renewal")
        certificate = authority.issue(key.public_key(), DEVICE, now=utc_now(), days=30, usage="client")
        return store.install(facts, certificate_pem(certificate), authorities, "ab" * 32).serial

    cutter = Cutter(monkeypatch)
    for writes in range(1, MOST_WRITES):
        store = IdentityStore(tmp_path / str(writes))
        with store.held():
            cutter.left = MOST_WRITES
            old = obtain(store)
            cutter.left = writes
            try:
                new = obtain(store)
                break
            except PowerCut:
                cutter.left = MOST_WRITES
            after = IdentityStore(tmp_path / str(writes))
            found = after.load()
            assert found is not None
            assert found.serial == old or not (after.folder / "next").exists(), "a new identity is whole"
            again = obtain(after)
            loaded = after.load()
            assert loaded is not None
            assert loaded.serial == again
    assert new
    assert writes > 10


@needs_mosquitto
@pytest.mark.broker
@pytest.mark.slow
def test_enrolment_cut_short_anywhere_goes_on_with_the_same_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with tls_broker(tmp_path / "broker") as broker, Answering(broker) as answering:
        cutter = Cutter(monkeypatch)
        for writes in range(1, MOST_WRITES):
            cutter.left = MOST_WRITES
            folder = tmp_path / str(writes)
            folder.mkdir()
            bundle = make_bundle(broker, folder)
            text = bundle.read_text()
            state = folder / "state"
            answering.requests.clear()
            cutter.left = writes
            try:
                enrol(bundle, state, clock=TrustedClock(state), timeout_seconds=120)
                break
            except PowerCut:
                cutter.left = MOST_WRITES
            asked = {x509.load_pem_x509_csr(csr).public_key().public_numbers() for _, csr in answering.requests}  # type: ignore[union-attr]
            assert "enrolled as 'kitchen'" in enrol(bundle, state, clock=TrustedClock(state), timeout_seconds=120) or not bundle.exists()
            keys = {x509.load_pem_x509_csr(csr).public_key().public_numbers() for _, csr in answering.requests}  # type: ignore[union-attr]
            assert len(keys) == 1, f"a second key after {len(asked)}, writes {writes}: the claim would be spent on the first"
            assert IdentityStore(state).load() is not None
            assert not bundle.exists()
            assert private_keys_in(folder, text) == []
        assert writes > 15
