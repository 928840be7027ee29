"""What the enrolment program and the gateway look for again and again, on every database."""

from datetime import timedelta

from coordinator.store.commands import add_command, commands_to_send, mark_commands_sent
from coordinator.store.engine import Store
from coordinator.store.enrolment import (
    approved_requests,
    replaced_certificates,
    revoked_devices,
    unknown_serials,
)
from coordinator.store.identities import (
    add_certificate,
    add_claim,
    approve_device,
    hold_request,
    mark_certificate_seen,
    revoke_certificate,
    revoke_device,
    spend_claim,
)
from tests.store.frames import START, after


def give_claim(session, device, name):
    add_claim(session, name, device, serial="1f", at=START, expires_at=after(3600), actor="operator")


def give_certificate(session, serial, at, device="kitchen"):
    add_certificate(
        session, serial=serial, device=device, key_digest=serial, pem=b"pem", issued_at=at, expires_at=at + timedelta(days=90), claim=None
    )


def test_only_approved_requests_are_to_be_signed(store: Store):
    with store.write() as session:
        for name in ("approved", "held", "spent"):
            give_claim(session, name, f"claim-{name}")
        for name in ("approved", "held", "spent"):
            hold_request(session, f"claim-{name}", request=name.encode(), at=after(1))
        for name in ("approved", "spent"):
            approve_device(session, name, at=after(2), actor="operator")
        spend_claim(session, "claim-spent", key_digest="aa", at=after(3))
    with store.read() as session:
        assert approved_requests(session, after(4)) == [("claim-approved", b"approved")]
        assert approved_requests(session, after(3601)) == []


def test_a_certificate_is_replaced_once_a_younger_one_was_seen(store: Store):
    with store.write() as session:
        give_claim(session, "kitchen", "claim-1")
        give_claim(session, "attic", "claim-2")
        give_certificate(session, "a1", after(1))
        give_certificate(session, "a2", after(2))
        give_certificate(session, "a3", after(3))
        give_certificate(session, "b1", after(1), "attic")
        mark_certificate_seen(session, "kitchen", "a1", at=after(4))
    with store.read() as session:
        assert replaced_certificates(session, after(5)) == []
    with store.write() as session:
        mark_certificate_seen(session, "kitchen", "a2", at=after(6))
    with store.read() as session:
        assert replaced_certificates(session, after(7)) == [("a1", "kitchen")], "a3 may be on its way"
        assert replaced_certificates(session, after(7) + timedelta(days=91)) == [], "expired by itself"
    with store.write() as session:
        revoke_certificate(session, "a1", at=after(8), actor="enrolment")
    with store.read() as session:
        assert replaced_certificates(session, after(9)) == []


def test_a_certificate_from_a_clock_ahead_replaces_none(store: Store):
    """Else a device that enrols anew once the clock is right would lose its new certificate at once."""
    with store.write() as session:
        give_claim(session, "kitchen", "claim-1")
        give_certificate(session, "a1", after(1))
        give_certificate(session, "a2", after(1) + timedelta(days=4000))
        mark_certificate_seen(session, "kitchen", "a2", at=after(2))
    with store.read() as session:
        assert replaced_certificates(session, after(3)) == []


def test_revoked_devices(store: Store):
    with store.write() as session:
        for name in ("kitchen", "attic"):
            give_claim(session, name, f"claim-{name}")
        revoke_device(session, "kitchen", at=after(10), actor="operator")
    with store.read() as session:
        assert revoked_devices(session) == {"kitchen": after(10)}


def test_serials_that_the_store_does_not_know(store: Store):
    with store.write() as session:
        give_claim(session, "kitchen", "claim-1")
        give_certificate(session, "a1", after(1))
    with store.read() as session:
        assert unknown_serials(session, {"a1", "b2"}) == {"b2"}
        assert unknown_serials(session, set()) == set()


def test_orders(store: Store):
    with store.write() as session:
        add_command(session, "kitchen", "pause", by="operator", now=START)
        later = add_command(session, "kitchen", "resume", by="operator", now=START).id
    with store.write() as session:
        waiting = commands_to_send(session, after(1))
        assert [row.name for row in waiting] == ["pause", "resume"]
        mark_commands_sent(session, [waiting[0].id], after(2))
    with store.read() as session:
        assert [row.id for row in commands_to_send(session, after(3))] == [later]
