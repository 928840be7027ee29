"""Who gets a certificate: every case of the rules, and what must hold whatever is asked."""

from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.enrolment_limits import ASKERS, ROWS_PER_MINUTE, Gate, Refusals, Waiting
from coordinator.enrolment_rules import MOST_PER_DAY, RequestFacts, decide_claim, decide_renewal
from coordinator.store.identities import CertificateRow, ClaimRow, IdentityRow
from side_tuning.broker_connection import Message

NOW = datetime(2026, 5, 1, 12, tzinfo=timezone.utc)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
KEY, OTHER_KEY = "aa" * 32, "bb" * 32
CLAIM = "claim-" + "0" * 16


def claim(**changes):
    row = {
        "id": CLAIM, "device": "kitchen", "serial": "1f", "created_at": NOW - HOUR, "expires_at": NOW + DAY, "withdrawn_at": None,
        "requested_at": None, "request": None, "approved_at": None, "spent_at": None, "key_digest": None,
    }
    return ClaimRow(**{**row, **changes})


def identity(**changes):
    row = {"device": "kitchen", "group": "", "created_at": NOW - HOUR, "enrolled_at": None, "revoked_at": None, "revoked_reason": ""}
    return IdentityRow(**{**row, **changes})


def certificate(**changes):
    row = {
        "serial": "2a", "device": "kitchen", "key_digest": KEY, "pem": b"pem", "issued_at": NOW - HOUR, "expires_at": NOW + 90 * DAY,
        "claim": None, "seen_at": None, "revoked_at": None, "revoked_reason": "",
    }
    return CertificateRow(**{**row, **changes})


GOOD = RequestFacts("kitchen", KEY)
SPENT = {"spent_at": NOW - HOUR, "key_digest": KEY}
HELD = {"requested_at": NOW - HOUR, "request": b"csr"}

CLAIM_CASES = {
    "a good claim": ({}, "issue"),
    "no such claim": ({"claim": None}, "unknown-claim"),
    "expired": ({"claim": claim(expires_at=NOW)}, "claim-expired"),
    "withdrawn": ({"claim": claim(withdrawn_at=NOW - HOUR)}, "claim-withdrawn"),
    "withdrawn and expired": ({"claim": claim(withdrawn_at=NOW - HOUR, expires_at=NOW)}, "claim-withdrawn"),
    "spent, the same key asks again": ({"claim": claim(**SPENT), "certificate": certificate()}, "repeat"),
    "spent, the same key asks after the claim expired": (
        {"claim": claim(**SPENT, expires_at=NOW - HOUR), "certificate": certificate()}, "repeat",
    ),
    "spent on another key": ({"claim": claim(spent_at=NOW, key_digest=OTHER_KEY)}, "claim-spent"),
    "spent, its certificate is over": ({"claim": claim(**SPENT), "certificate": certificate(expires_at=NOW)}, "claim-spent"),
    "spent, its certificate was revoked": ({"claim": claim(**SPENT), "certificate": certificate(revoked_at=NOW)}, "revoked"),
    "spent, its certificate is from a clock ahead": ({"claim": claim(**SPENT), "certificate": certificate(issued_at=NOW + DAY)}, "claim-spent"),
    "spent, no certificate is known": ({"claim": claim(**SPENT)}, "claim-spent"),
    "a foreign name": ({"facts": RequestFacts("attic", KEY)}, "wrong-name"),
    "no name": ({"facts": RequestFacts("", KEY)}, "wrong-name"),
    "a program's name": ({"facts": RequestFacts("gateway", KEY)}, "wrong-name"),
    "a claim that somebody wrote into the store for a program": (
        {"facts": RequestFacts("enrolment", KEY), "claim": claim(device="enrolment", **HELD, approved_at=NOW), "held_key": KEY}, "wrong-name",
    ),
    "a foreign name under a spent claim": ({"facts": RequestFacts("attic", KEY), "claim": claim(**SPENT)}, "wrong-name"),
    "no request at all": ({"facts": RequestFacts(error="its key is too short")}, "bad-request"),
    "device revoked": ({"identity": identity(revoked_at=NOW - HOUR)}, "revoked"),
    "device revoked, claim spent": ({"identity": identity(revoked_at=NOW), "claim": claim(**SPENT), "certificate": certificate()}, "revoked"),
    "identity lost": ({"identity": None}, "revoked"),
    "by hand, first request": ({"by_hand": True}, "hold"),
    "by hand, asks again": ({"by_hand": True, "claim": claim(**HELD), "held_key": KEY}, "wait"),
    "by hand, another key asks": ({"by_hand": True, "claim": claim(**HELD), "held_key": OTHER_KEY}, "claim-spent"),
    "approved": ({"by_hand": True, "claim": claim(**HELD, approved_at=NOW), "held_key": KEY}, "issue"),
    "approved, another key asks": ({"by_hand": True, "claim": claim(**HELD, approved_at=NOW), "held_key": OTHER_KEY}, "claim-spent"),
    "approved too late": ({"by_hand": True, "claim": claim(**HELD, approved_at=NOW, expires_at=NOW), "held_key": KEY}, "claim-expired"),
    "no longer by hand": ({"claim": claim(**HELD), "held_key": KEY}, "issue"),
    "a key whose certificate was revoked": ({"certificate": certificate(revoked_at=NOW)}, "revoked"),
    "enrolled anew with the key it had": ({"certificate": certificate()}, "issue"),
}


@pytest.mark.parametrize(("changes", "expected"), CLAIM_CASES.values(), ids=CLAIM_CASES.keys())
def test_what_becomes_of_a_claims_request(changes, expected):
    case = {"facts": GOOD, "claim": claim(), "identity": identity(), "certificate": None, "held_key": None, "by_hand": False, **changes}
    decision = decide_claim(
        case["facts"], case["claim"], case["identity"], case["certificate"], case["held_key"], by_hand=case["by_hand"], now=NOW
    )
    assert expected == (decision.reason if decision.outcome == "refuse" else decision.outcome)
    assert bool(decision.text) == (decision.outcome in ("refuse", "hold", "wait"))
    assert (decision.certificate is not None) == (decision.outcome == "repeat")


OLD = {"issued_at": NOW - 60 * DAY, "expires_at": NOW + 30 * DAY, "key_digest": OTHER_KEY, "serial": "1"}
RENEWAL_CASES = {
    "a new key": ({"certificates": [certificate(**OLD)]}, "issue"),
    "after its certificate expired": ({"certificates": [certificate(key_digest=OTHER_KEY, expires_at=NOW - DAY)]}, "issue"),
    "the answer was lost": ({"certificates": [certificate(), certificate(**OLD)]}, "repeat"),
    "its certificate is from a clock ahead": ({"certificates": [certificate(issued_at=NOW + 4000 * DAY, expires_at=NOW + 4090 * DAY)]}, "issue"),
    "just before the clock was set back a little": ({"certificates": [certificate(issued_at=NOW + HOUR / 2)]}, "repeat"),
    "the same key, long in use": ({"certificates": [certificate(issued_at=NOW - 60 * DAY, expires_at=NOW + 30 * DAY)]}, "issue"),
    "the key was revoked": ({"certificates": [certificate(revoked_at=NOW)]}, "revoked"),
    "a foreign name": ({"facts": RequestFacts("attic", KEY)}, "wrong-name"),
    "another spelling": ({"facts": RequestFacts("Kitchen", KEY)}, "wrong-name"),
    "no request": ({"facts": RequestFacts(error="no")}, "bad-request"),
    "revoked device": ({"identity": identity(revoked_at=NOW - HOUR)}, "revoked"),
    "unknown device": ({"identity": None}, "unknown-claim"),
    "new keys without end": (
        {"certificates": [certificate(serial=str(n), key_digest=f"{n:064x}") for n in range(MOST_PER_DAY)]}, "wait",
    ),
    "many, long ago": (
        {"certificates": [certificate(serial=str(n), key_digest=f"{n:064x}", issued_at=NOW - 2 * DAY) for n in range(MOST_PER_DAY)]},
        "issue",
    ),
}


@pytest.mark.parametrize(("changes", "expected"), RENEWAL_CASES.values(), ids=RENEWAL_CASES.keys())
def test_what_becomes_of_a_renewal(changes, expected):
    case = {"facts": GOOD, "identity": identity(), "certificates": [], **changes}
    decision = decide_renewal(case["facts"], "kitchen", case["identity"], case["certificates"], now=NOW)
    assert expected == (decision.reason if decision.outcome == "refuse" else decision.outcome)


moments = st.none() | st.integers(-200, 200).map(lambda hours: NOW + timedelta(hours=hours))
keys = st.sampled_from([KEY, OTHER_KEY])
names = st.sampled_from(["kitchen", "attic", "gateway", "", "kitchen\n"])


@given(
    facts=st.builds(RequestFacts, names, keys, st.sampled_from(["", "", "no request"])),
    row=st.none() | st.builds(
        lambda **changes: claim(**{name: value for name, value in changes.items() if value is not None}),
        expires_at=moments, withdrawn_at=moments, approved_at=moments, spent_at=moments, key_digest=st.none() | keys,
    ),
    revoked_at=moments,
    known=st.none() | st.builds(lambda key, ends, over: certificate(key_digest=key, expires_at=ends or NOW + DAY, revoked_at=over), keys, moments, moments),
    approval=st.tuples(st.none() | keys, st.booleans()),
)
def test_whatever_is_asked_only_a_good_claim_of_the_right_device_gets_a_certificate(facts, row, revoked_at, known, approval):
    held_key, by_hand = approval
    known = known if known is not None and known.key_digest == facts.key_digest else None
    decision = decide_claim(facts, row, identity(revoked_at=revoked_at), known, held_key, by_hand=by_hand, now=NOW)
    if decision.outcome in ("issue", "repeat"):
        assert row is not None
        assert row.withdrawn_at is None
        assert revoked_at is None
        assert facts.common_name == "kitchen"
        assert not facts.error
    if decision.outcome == "issue":
        assert row.spent_at is None
        assert row.expires_at > NOW
        assert not by_hand or row.approved_at is not None
        assert held_key in (None, facts.key_digest)
    if decision.outcome == "repeat":
        assert row.spent_at is not None
        assert row.key_digest == facts.key_digest
        assert known.revoked_at is None
        assert known.expires_at > NOW
    if decision.outcome == "refuse":
        assert decision.reason
        assert decision.text


# Limits.


def test_an_asker_is_heard_once_a_second_and_memory_stays_bounded():
    gate = Gate(1.0)
    assert gate.admit("a", 0.0)
    assert not gate.admit("a", 0.9)
    assert gate.admit("b", 0.9)
    assert gate.admit("a", 1.0)
    assert gate.turned_away == 1
    for number in range(2 * ASKERS):
        gate.admit(f"asker {number}", 2.0)
    assert len(gate._heard) <= ASKERS


def test_an_asker_waits_in_one_place_with_its_newest_request_and_the_queue_is_bounded():
    waiting = Waiting(2)
    for topic, payload in (("a", b"1"), ("b", b"2"), ("a", b"3"), ("c", b"4")):
        waiting.put(Message(topic, payload, False, 1, 1, 1))
    assert waiting.dropped == 1
    assert [(one.topic, one.payload) for one in (waiting.take(0), waiting.take(0))] == [("a", b"3"), ("b", b"2")]
    assert waiting.take(0.01) is None


def test_refusals_are_told_ever_more_rarely_with_their_number():
    refusals = Refusals()
    assert refusals.count("a", "claim-spent", 0.0) == 1
    told = [(second, times) for second in range(1, 86_400) if (times := refusals.count("a", "claim-spent", float(second))) is not None]
    assert len(told) < 40, "a day of one a second"
    assert told[0] == (60, 60)
    assert sum(times for _, times in told) <= 86_400
    assert refusals.count("a", "wrong-name", 86_400.0) == 1, "another reason is news"


def test_many_askers_together_make_few_rows():
    refusals = Refusals()
    rows = sum(refusals.count(f"claim {number}", "unknown-claim", number / 100) is not None for number in range(30_000))
    assert rows <= ROWS_PER_MINUTE * 6
    assert len(refusals._told) <= ASKERS
    assert refusals.untold > 0
