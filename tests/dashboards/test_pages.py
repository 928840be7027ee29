"""Device, training, rejections and audit: what each shows, and that nothing a device says is taken for HTML."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy import text

from coordinator.store.audit import audit
from coordinator.store.errors import StoreError
from coordinator.store.identities import add_certificate, add_claim, hold_request, spend_claim
from coordinator.store.ingest import insert_frames
from coordinator.store.models import Identity
from coordinator.store.programs import record_program
from coordinator.store.registry import insert_plan
from coordinator.store.rejections import insert_rejection
from coordinator.store.training import insert_checkpoint, insert_evaluation, insert_run, mark_published
from dashboards.shown import commands
from tests.coordinator.fleet import PLAN
from tests.dashboards.fleets import now, say
from tests.store.frames import unreadable

HOSTILE = '<img src=x onerror="alert(1)">\'"&</script>'


def make_training(store, folder=None):
    """A run with two measurements, the second one's checkpoint published."""
    folder = folder or "/nowhere"
    with store.write() as session:
        insert_run(session, "run-1", {}, now())
        for step, accuracy in ((100, 0.61), (200, 0.83)):
            at = now() - timedelta(seconds=300 - step)
            insert_evaluation(session, "run-1", step, "fleet", "fleet", accuracy, 0.5, 40, at)
            insert_evaluation(session, "run-1", step, "backbone", "ab" * 16, accuracy - 0.01, 0.5, 40, at)
            insert_evaluation(session, "run-1", step, "device", "kitchen", accuracy - 0.1, 0.5, 10, at)
            insert_evaluation(session, "run-1", step, "worst-device", "kitchen", accuracy - 0.1, 0.5, 10, at)
        generation = insert_checkpoint(session, "run-1", 200, str(folder), {"accuracy": 0.83}, now())
        mark_published(session, generation, now())
    return generation


def timeline_on(page):
    """(how it stands, step) of every line of the timeline."""
    lines = re.findall(r'<li class="(done|open|overdue)"><span class="mark".*?</span>\s*<span class="step">([^<]+?)\s*<', page, re.DOTALL)
    return [(state, words) for state, words in lines]


def test_a_devices_page_shows_what_it_reports_and_what_arrived(client, store):
    make_training(store)
    page = client.get("/devices/kitchen").text
    for words in ("on-time", "41.0 ms", "51.5 °C", "not throttled", "700 MB", "9.0 GB", "1.3 kB per sample", "all accounted for", "expected", "73.0 %"):
        assert words in page, words
    assert timeline_on(page) == [("done", "first heard from"), ("done", "first sample stored")]
    assert 'data-y="6"' in page  # the plot's figures: six samples in this minute


def test_commands_in_hints_are_code_and_nothing_else_is():
    assert commands("run `a <b>` & `c`") == "run <code>a &lt;b&gt;</code> &amp; <code>c</code>"
    assert "<img" not in commands(f"it says: `{HOSTILE}")


def test_a_ledger_that_does_not_balance_is_red(client, store):
    say(store, "attic", 60)  # it says 60 were receipted; 6 are here
    page = client.get("/devices/attic").text
    assert '<span class="bad"><span aria-hidden="true">✕</span> unbalanced' in page
    assert "does not balance" in client.get("/?state=trouble").text


def test_the_timeline_begins_with_the_claim(client, store):
    begun = now() - timedelta(minutes=20)
    claim = "claim-" + "ab" * 8
    steps = {step: begun.timestamp() + seconds for step, seconds in (("flashed", 60), ("network", 400), ("clock", 420), ("backbone", 450))}
    with store.write() as session:
        add_claim(session, claim, "porch", serial="01", expires_at=begun + timedelta(days=7), at=begun, actor="operator", group="upstairs")
        spend_claim(session, claim, key_digest="ab", at=begun + timedelta(seconds=430))
        add_certificate(
            session, serial="c1", device="porch", key_digest="ab", pem=b"", issued_at=begun + timedelta(seconds=430), expires_at=begun + timedelta(days=90), claim=claim
        )
    say(store, "porch", 0, first_steps={**steps, "booted": None})
    page = client.get("/devices/porch").text
    assert timeline_on(page) == [
        ("done", "claim made"), ("done", "card flashed"), ("done", "booted"), ("done", "broker reached"), ("done", "clock right"), ("done", "enrolled"),
        ("done", "backbone loaded"), ("done", "first heard from"), ("open", "first sample stored"),
    ]
    assert "time not known" in page
    assert "+60 s" in page  # from the claim to the card
    assert "overdue" not in page
    assert "upstairs" in client.get("/").text


def test_a_step_that_is_overdue_is_named_with_its_hint_and_needs_attention(client, store):
    say(store, "porch", 0, at=now() - timedelta(minutes=31), plan_version=0)
    page = client.get("/devices/porch").text
    assert ("overdue", "first sample stored") in timeline_on(page)
    words = "“first sample stored” did not come within 30 minutes after “first heard from”: it is lost: neither a report"
    assert page.count(words) == 2  # among its troubles, and where it belongs
    assert words in client.get("/?state=trouble").text


def test_a_device_with_a_claim_has_a_page_before_it_is_heard_of(client, store):
    at = now()
    with store.write() as session:
        add_claim(session, "claim-" + "cd" * 8, "cellar", serial="02", expires_at=at + timedelta(days=7), at=at, actor="operator")
    assert "Not heard of yet" in client.get("/devices/cellar").text
    assert "cellar" in client.get("/").text


def test_an_unknown_device_is_not_found(client):
    answer = client.get("/devices/nobody")
    assert answer.status_code == 404
    assert "no device" in answer.text


def test_training_shows_accuracy_shares_and_who_runs_which_checkpoint(client, store, tmp_path):
    folder = tmp_path / "00000200"
    folder.mkdir()
    (folder / "checkpoint.json").write_text(json.dumps({"sha256": {"ladder.safetensors": "feed" * 16}}))
    generation = make_training(store, folder)
    say(store, "kitchen", 6, checkpoint=generation)
    with store.write() as session:
        record_program(session, "trainer", started_at=now(), at=now(), status={"samples_per_second": 321.5, "loss": 0.417, "shares": {"kitchen": 0.25, "attic": 0.75}})
    page = client.get("/training").text
    for words in ("83.0 %", "73.0 %", "322", "0.417", "25.0 %", "33.3 %", "feed" * 16, f"checkpoint {generation}: 1 devices"):
        assert words in page, words
    assert f'data-mark="{generation}"' in page


def test_pages_of_a_language_model_speak_of_bits_per_byte_and_the_highest_is_worst(client, store):
    with store.write() as session:
        insert_run(session, "run-2", {"learns": {"task": "causal-lm"}}, now())
        for scope, name, score in (("fleet", "fleet", 2.41), ("device", "kitchen", 3.5), ("device", "attic", 1.25), ("worst-device", "kitchen", 3.5)):
            insert_evaluation(session, "run-2", 10, scope, name, score, 1.7, 40, now())
        mark_published(session, insert_checkpoint(session, "run-2", 10, "/nowhere", {"bits_per_byte": 2.41}, now()), now())
    page = client.get("/?sort=score").text
    assert "Bits per byte over time" in page
    assert page.index('href="/devices/kitchen"') < page.index('href="/devices/attic"'), "the highest is the worst"
    page = client.get("/training").text
    assert "2.41 bits per byte" in page, "of the checkpoint"
    assert "3.50" in page
    assert "accuracy" not in page.lower()
    assert "1.25" in client.get("/devices/attic").text


def test_pages_are_complete_before_anything_happened(client):
    for path in ("/training", "/rejections", "/audit", "/login"):
        assert client.get(path).status_code == 200


def test_rejections_are_listed_with_reasons_and_can_be_downloaded(client, store):
    with store.write() as session:
        insert_frames(session, [unreadable("kitchen", 4, at=now(), payload=b"\x00junk\xff")])
    page = client.get("/rejections").text
    assert "frame: damaged" in page
    place = page.split('href="/rejections/')[1].split('"')[0]
    answer = client.get(f"/rejections/{place}")
    assert answer.content == b"\x00junk\xff"
    assert answer.headers["content-disposition"].startswith("attachment")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert client.get("/rejections?device=attic").text.count("frame: damaged") == 0
    assert client.get("/rejections/99999/payload").status_code == 404
    assert client.get(f"/rejections/{2**70}/payload").status_code == 404


def test_the_audit_trail_is_shown(client, store):
    with store.write() as session:
        audit(session, at=now(), actor="claim-x", action="certificate refused", device="kitchen", outcome="denied", detail="the claim was spent before")
    page = client.get("/audit").text
    assert "certificate refused" in page
    assert "denied" in page
    assert "certificate refused" in client.get("/devices/kitchen").text


def test_what_waits_for_approval_is_said_first(client, store):
    at = now()
    claim = "claim-" + "ef" * 8
    with store.write() as session:
        add_claim(session, claim, "porch", serial="03", expires_at=at + timedelta(days=7), at=at, actor="operator")
        hold_request(session, claim, request=b"CSR", at=at)
    assert "1 waits for approval" in " ".join(client.get("/").text.split())
    assert "Waits for approval" in client.get("/devices/porch").text


def test_a_certificate_that_is_about_to_expire_is_said(client, store):
    at = now()
    claim = "claim-" + "aa" * 8
    with store.write() as session:
        add_claim(session, claim, "kitchen", serial="04", expires_at=at + timedelta(days=7), at=at, actor="operator")
        spend_claim(session, claim, key_digest="00" * 32, at=at)
        add_certificate(session, device="kitchen", serial="05", key_digest="00" * 32, pem=b"PEM", issued_at=at, expires_at=at + timedelta(days=3), claim=claim, actor="enrolment")
    assert "its certificate expires in 3 d" in client.get("/devices/kitchen").text


@pytest.fixture
def hostile(store):
    """Every text that comes from a device or a stranger holds HTML."""
    make_training(store)
    say(store, "kitchen", 6, reason=HOSTILE, plan_error=HOSTILE, checkpoint_error=HOSTILE, agent_version=HOSTILE)
    with store.write() as session:
        insert_plan(session, replace(PLAN, version=2, labels=(HOSTILE, "b", "c")))
        insert_rejection(session, device="kitchen", topic=HOSTILE, payload=b"x", reason=HOSTILE, received_at=now())
        audit(session, at=now(), actor=HOSTILE, action=HOSTILE, device=HOSTILE, detail=HOSTILE)
        session.add(Identity(device="<script>alert(2)<\\script>", group=HOSTILE, created_at=now(), revoked_reason=""))
        record_program(session, "trainer", started_at=now(), at=now(), status={"error": HOSTILE, "shares": {HOSTILE: 0.5}})


def test_nothing_that_a_device_says_becomes_html(client, hostile):
    for path in ("/", "/devices/kitchen", "/training", "/rejections", "/audit", f"/?name={HOSTILE}", f"/devices/{HOSTILE[:20]}", f"/login?back={HOSTILE}"):
        page = client.get(path).text
        assert "<img" not in page, path
        assert "<script>" not in page, path
        assert 'onerror="' not in page, path


def test_pages_cannot_write(client):
    with pytest.raises(StoreError, match="readonly"), client.app.state.access.reader().read() as session:
        session.execute(text("DELETE FROM devices"))
