"""Identities, claims and certificates: what may be done once, what withdraws what, and that each change is audited."""

from __future__ import annotations

import contextlib
import itertools
import threading
from datetime import datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import Session

from coordinator.store.audit import audit, audit_entries
from coordinator.store.engine import Store, open_store
from coordinator.store.identities import (
    IdentityError,
    add_certificate,
    add_claim,
    approve_device,
    certificate_for_key,
    certificates_of,
    claims_of,
    find_claim,
    find_identity,
    hold_request,
    identities,
    mark_certificate_seen,
    readmit_device,
    revoke_certificate,
    revoke_device,
    revoked_certificates,
    revoked_claims,
    spend_claim,
    withdraw_claim,
)
from tests.store.frames import START, after

DAY = timedelta(days=1)
CLAIM, OTHER = "claim-" + "a" * 32, "claim-" + "b" * 32
KEY = "ef" * 32


def claim(session: Session, name: str = CLAIM, device: str = "kitchen", at: datetime = START, **more: str):
    return add_claim(session, name, device, serial=name[6:8] * 20, at=at, expires_at=at + DAY, actor="operator", **more)


def certificate(session: Session, serial: str = "c1" * 20, device: str = "kitchen", *, claim: str | None = CLAIM, days: int = 90) -> None:
    add_certificate(
        session, serial=serial, device=device, key_digest=KEY, pem=b"PEM", issued_at=START, expires_at=START + days * DAY, claim=claim
    )


def actions(session: Session, device: str | None = "kitchen") -> list[str]:
    return [row.action for row in reversed(audit_entries(session, device))]


def test_a_claim_is_spent_once_on_one_key(store: Store):
    with store.write() as session:
        assert claim(session, group="attic") == []
        assert spend_claim(session, CLAIM, key_digest=KEY, at=after(1))
        certificate(session)
    with store.write() as session:
        assert not spend_claim(session, CLAIM, key_digest="00" * 32, at=after(2))
    with store.read() as session:
        found = find_claim(session, CLAIM)
        assert found is not None
        assert (found.key_digest, found.spent_at, found.state(after(3))) == (KEY, after(1), "spent")
        identity = find_identity(session, "kitchen")
        assert identity is not None
        assert (identity.group, identity.created_at, identity.enrolled_at) == ("attic", START, START)
        assert [row.serial for row in certificates_of(session, "kitchen")] == ["c1" * 20]
        kept = certificate_for_key(session, "kitchen", KEY)
        assert kept is not None
        assert (kept.pem, kept.claim) == (b"PEM", CLAIM)
        assert certificate_for_key(session, "cellar", KEY) is None
        assert actions(session) == ["claim issued", "certificate issued"]


def test_expired_withdrawn_and_unknown_claims_cannot_be_spent_or_held(store: Store):
    with store.write() as session:
        claim(session)
        claim(session, OTHER, "cellar")
        assert withdraw_claim(session, OTHER, at=after(1), actor="operator", reason="lost")
        assert not withdraw_claim(session, OTHER, at=after(2), actor="operator")
        late = START + DAY
        for name, at in ((CLAIM, late), (OTHER, after(3)), ("claim-" + "0" * 32, START)):
            assert not spend_claim(session, name, key_digest=KEY, at=at)
            with pytest.raises(IdentityError, match=r"expired|withdrawn|unknown"):
                hold_request(session, name, request=b"CSR", at=at)
        with pytest.raises(IdentityError, match="claims list"):
            withdraw_claim(session, "claim-" + "0" * 32, at=START, actor="operator")
    with store.read() as session:
        assert actions(session, "cellar") == ["claim issued", "claim withdrawn"]
        assert audit_entries(session, "cellar", limit=1)[0].detail == f"{OTHER}: lost"


def test_a_new_claim_withdraws_the_open_one_before_it_and_keeps_the_group(store: Store):
    with store.write() as session:
        claim(session, group="attic")
        assert [row.id for row in claim(session, OTHER, at=after(1))] == [CLAIM]
        assert [(row.id, row.state(after(2))) for row in claims_of(session, "kitchen")] == [(OTHER, "open"), (CLAIM, "withdrawn")]
        assert [row.group for row in identities(session)] == ["attic"]
        assert spend_claim(session, OTHER, key_digest=KEY, at=after(2))
        with pytest.raises(IdentityError, match="is spent"):
            withdraw_claim(session, OTHER, at=after(3), actor="operator")


def test_an_approval_holds_for_the_request_that_was_looked_at(store: Store):
    with store.write() as session:
        claim(session)
        with pytest.raises(IdentityError, match="nothing of 'kitchen' waits"):
            approve_device(session, "kitchen", at=START, actor="operator")
        assert hold_request(session, CLAIM, request=b"one", at=after(1))
        assert not hold_request(session, CLAIM, request=b"one", at=after(2))
        assert approve_device(session, "kitchen", at=after(3), actor="operator").state(after(4)) == "approved"
        assert hold_request(session, CLAIM, request=b"two", at=after(5))
        assert [row.state(after(6)) for row in claims_of(session)] == ["waiting"]
        assert actions(session) == ["claim issued", "approval asked for", "device approved", "approval asked for"]
        with pytest.raises(IdentityError, match="coordinator enrol cellar"):
            approve_device(session, "cellar", at=START, actor="operator")


def test_revoking_a_device_takes_its_certificates_and_claims_with_it(store: Store):
    with store.write() as session:
        claim(session)
        spend_claim(session, CLAIM, key_digest=KEY, at=START)
        certificate(session)
        claim(session, OTHER)
        assert revoke_device(session, "kitchen", at=after(10), actor="operator", reason="stolen")
        assert not revoke_device(session, "kitchen", at=after(20), actor="operator")
        assert revoked_certificates(session, after(30)) == [("c1" * 20, after(10))]
        assert revoked_certificates(session, START + 91 * DAY) == []
        assert revoked_claims(session, after(30)) == [("bb" * 20, after(10))]
        with pytest.raises(IdentityError, match=r"revoked on .*stolen.*--readmit"):
            claim(session, "claim-" + "c" * 32, at=after(40))
        assert readmit_device(session, "kitchen", at=after(50), actor="operator")
        assert not readmit_device(session, "kitchen", at=after(51), actor="operator")
        assert claim(session, "claim-" + "c" * 32, at=after(60)) == []
        assert revoked_certificates(session, after(70)) == [("c1" * 20, after(10))]
        with pytest.raises(IdentityError, match="no device 'cellar'"):
            revoke_device(session, "cellar", at=START, actor="operator")
        assert actions(session)[-4:] == ["device revoked", "claim withdrawn", "device readmitted", "claim issued"]


def test_a_spent_claim_goes_on_the_list_once_its_certificate_is_in_use(store: Store):
    """Until then the device may have lost the answer and must be able to ask again."""
    with store.write() as session:
        claim(session)
        spend_claim(session, CLAIM, key_digest=KEY, at=after(1))
        certificate(session)
        assert revoked_claims(session, after(2)) == []
        assert not mark_certificate_seen(session, "cellar", "c1" * 20, at=after(3))
        assert not mark_certificate_seen(session, "kitchen", "d1" * 20, at=after(3))
        assert mark_certificate_seen(session, "kitchen", "C1" * 20, at=after(4))
        assert not mark_certificate_seen(session, "kitchen", "c1" * 20, at=after(5))
        assert revoked_claims(session, after(6)) == [("aa" * 20, after(1))]
        assert revoked_claims(session, START + DAY) == []


def test_one_certificate_can_be_revoked_by_its_serial(store: Store):
    with store.write() as session:
        claim(session)
        certificate(session)
        certificate(session, "d1" * 20, claim=None)
        assert revoke_certificate(session, "C1" * 20, at=after(1), actor="enrolment", reason="replaced")
        assert not revoke_certificate(session, "c1" * 20, at=after(2), actor="enrolment")
        assert revoked_certificates(session, after(3)) == [("c1" * 20, after(1))]
        assert [row.revoked_reason for row in certificates_of(session, "kitchen")] == ["replaced", ""]
        with pytest.raises(IdentityError, match="no certificate"):
            revoke_certificate(session, "e1" * 20, at=START, actor="operator")
        assert actions(session)[1:] == ["certificate issued", "certificate renewed", "certificate revoked"]


def test_what_strangers_wrote_is_cut_and_cannot_repaint_a_terminal(store: Store):
    with store.write() as session:
        audit(session, at=START, actor="x" * 500, action="refused", device=None, outcome="denied", detail="\x1b[2J\x00" + "y" * 5000)
    with store.read() as session:
        (row,) = audit_entries(session)
    assert (len(row.actor), len(row.detail), row.outcome) == (64, 1000, "denied")
    assert row.detail.startswith("?[2J?yyy")


def test_a_transaction_that_fails_leaves_no_audit_row_either(store: Store):
    def fail(session: Session) -> None:
        claim(session)
        raise RuntimeError

    with pytest.raises(RuntimeError), store.write() as session:
        fail(session)
    with store.read() as session:
        assert (find_identity(session, "kitchen"), audit_entries(session)) == (None, [])


def test_of_two_who_spend_a_claim_at_once_one_succeeds(store: Store):
    """Two programs on one database: the second waits for the first, then finds the claim spent."""
    names = [f"claim-{number:032x}" for number in range(8)]
    with store.write() as session:
        for name in names:
            claim(session, name, f"device-{name[-2:]}")
    start, won = threading.Barrier(2), {"a" * 64: set(), "b" * 64: set()}

    def spend(key: str, own: Store) -> None:
        for name in names:
            start.wait(60)
            with own.write() as session:
                if spend_claim(session, name, key_digest=key, at=after(1)):
                    won[key].add(name)

    other = open_store(store.url.render_as_string(hide_password=False))
    threads = [threading.Thread(target=spend, args=pair) for pair in zip(won, (store, other), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    other.close()
    first, second = won.values()
    assert first | second == set(names)
    assert not first & second
    with store.read() as session:
        for key, claims in won.items():
            assert {row.id for row in claims_of(session) if row.key_digest == key} == claims


_numbers = itertools.count()
_ACTS = st.lists(st.sampled_from(["claim", "hold", "approve", "spend", "withdraw", "revoke", "readmit", "seen", "wait"]), max_size=25)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_ACTS)
def test_whatever_people_and_devices_do_these_things_hold(sqlite_store: Store, acts: list[str]):
    """At most one open claim; one certificate per claim; revoked: nothing is open and nothing is valid; all is audited."""
    device, newest, clock = f"device-{next(_numbers)}", "", 0.0
    serials = itertools.count()

    def act(session: Session, name: str) -> bool | object:
        nonlocal newest
        at = after(clock)
        if name == "claim":
            newest = f"claim-{next(_numbers):032x}"
            return add_claim(session, newest, device, serial=f"{next(_numbers):x}", at=at, expires_at=at + DAY, actor="a") is not None
        if name == "hold":
            return hold_request(session, newest, request=b"%f" % clock, at=at)
        if name == "approve":
            return approve_device(session, device, at=at, actor="a")
        if name == "withdraw":
            return withdraw_claim(session, newest, at=at, actor="a")
        if name == "revoke":
            return revoke_device(session, device, at=at, actor="a")
        if name == "readmit":
            return readmit_device(session, device, at=at, actor="a")
        serial = f"{device}-{next(serials)}"[-40:]
        if name == "spend" and spend_claim(session, newest, key_digest=KEY, at=at):
            add_certificate(
                session, serial=serial, device=device, key_digest=KEY, pem=b"", issued_at=at, expires_at=at + 90 * DAY, claim=newest
            )
            return True
        held = certificates_of(session, device)
        if name == "seen" and held:
            mark_certificate_seen(session, device, held[0].serial, at=at)
        return False

    for name in acts:
        clock += 90_000.0 if name == "wait" else 1.0
        with sqlite_store.write() as session:
            before = len(audit_entries(session, device, 1000))
            with contextlib.suppress(IdentityError):
                if act(session, name):
                    assert len(audit_entries(session, device, 1000)) > before, name
        with sqlite_store.read() as session:
            now = after(clock)
            claims, held = claims_of(session, device), certificates_of(session, device)
            identity = find_identity(session, device)
            open_ones = [row for row in claims if row.state(now) in ("open", "waiting", "approved")]
            assert len(open_ones) <= 1
            assert len({row.claim for row in held}) == len(held) == len([row for row in claims if row.spent_at])
            listed = {serial for serial, _ in revoked_claims(session, now)}
            assert not listed & {row.serial for row in open_ones}
            if identity is not None and identity.revoked_at is not None:
                assert not open_ones
                assert {row.serial for row in held if row.expires_at > now} <= {serial for serial, _ in revoked_certificates(session, now)}
