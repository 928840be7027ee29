"""The fleet's page: every device, worst first, filtered; complete without JavaScript."""

from __future__ import annotations

import re
from datetime import timedelta

from fastapi.testclient import TestClient

from coordinator.store.identities import add_claim
from dashboards.app import make_app
from tests.dashboards.fleets import now, say, send


def devices_on(page: str) -> list[str]:
    return re.findall(r'data-row="([^"]+)"', page)


def test_every_device_is_listed_with_its_state_in_words(client):
    page = client.get("/").text
    assert sorted(devices_on(page)) == ["attic", "garage", "kitchen"]
    assert page.count("on-time</span>") >= 3
    assert "frames arrive at their usual pace" in page


def test_the_worst_device_comes_first(client, store):
    send(store, "zebra", 1, at=now() - timedelta(hours=1))  # long silent: lost
    say(store, "shed", 6, plan_error="no layer 12")  # on time at best, but refuses its plan
    page = client.get("/").text
    assert devices_on(page)[0] == "zebra"
    assert devices_on(page)[1] == "shed"
    assert "refuses its tap plan: no layer 12" in page


def test_filters_and_sorting_work_by_url(client, store):
    send(store, "zebra", 1, at=now() - timedelta(hours=1))
    assert devices_on(client.get("/?state=lost").text) == ["zebra"]
    assert devices_on(client.get("/?name=ITCH").text) == ["kitchen"]
    assert devices_on(client.get("/?sort=name").text) == ["attic", "garage", "kitchen", "zebra"]
    assert devices_on(client.get("/?backbone=cdcd").text) == []
    assert len(devices_on(client.get("/?state=nonsense&page=-1&sort=x").text)) == 4


def test_every_answer_forbids_foreign_scripts(client):
    for path in ("/", "/healthz", "/static/dashboard.js", "/nowhere"):
        headers = client.get(path).headers
        assert "script-src 'self'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_it_answers_to_its_own_names_only(client):
    assert client.get("/", headers={"host": "evil.example"}).status_code == 421
    assert client.get("/", headers={"host": "localhost:8080"}).status_code == 200


def test_before_the_store_is_there_the_page_waits(settings):
    with TestClient(make_app(settings), base_url="http://127.0.0.1", headers={"accept": "text/html"}) as client:
        page = client.get("/")
        assert page.status_code == 503
        assert "Waiting for the store" in page.text
        assert page.headers["refresh"]
        assert client.get("/healthz").status_code == 503


def test_health_is_fine_once_the_store_can_be_read(client):
    assert client.get("/healthz").json() == {"status": "ok"}


def test_a_device_that_was_flashed_and_never_came_stands_out(client, store):
    with store.write() as session:
        for device, hours in (("cellar", 25), ("shed", 1), ("yard", 200)):
            at = now() - timedelta(hours=hours)
            add_claim(session, f"claim-{device}", device, serial=device, expires_at=at + timedelta(days=7), at=at, actor="operator")
    page = client.get("/").text
    overdue, rest = page.split("2 overdue: a claim was made, but no device came")[1].split("1 with a claim, but not heard of yet")
    assert ">cellar<" in overdue
    assert "is the card in the board" in overdue
    assert "<code>coordinator enrol yard</code> makes a new bundle" in overdue
    assert ">shed<" in rest
