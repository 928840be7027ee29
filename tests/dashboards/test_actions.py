"""Login and actions: what they do, and every way in which they are refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from coordinator.store.audit import audit_entries
from coordinator.store.identities import add_claim, claims_of, find_identity, hold_request
from coordinator.store.models import CommandRow
from coordinator.store.registry import newest_plan
from coordinator.store.training import checkpoints
from dashboards.app import make_app
from dashboards.doorkeeper import COOKIE, Doorkeeper
from dashboards.login import own_path
from tests.dashboards.conftest import PAGE
from tests.dashboards.fleets import dashboard_settings, now
from tests.dashboards.test_pages import make_training

PASSWORD = "correct horse battery"
ACTIONS = (
    ("/devices/kitchen/order", {"name": "pause"}),
    ("/devices/kitchen/plan", {"codec": "int8"}),
    ("/devices/kitchen/access", {"do": "revoke"}),
    ("/checkpoints/1/republish", {}),
    ("/logout", {}),
)


@pytest.fixture
def password_file(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text(PASSWORD + "\n")
    return path


@pytest.fixture
def settings(tmp_path: Path, password_file: Path):
    return dashboard_settings(tmp_path, password_file=password_file)


def sign_in(client: TestClient, password: str = PASSWORD):
    return client.post("/login", data={"password": password, "back": "/training"})


@pytest.fixture
def operator(client: TestClient) -> TestClient:
    assert sign_in(client).status_code == 303
    return client


def csrf(client: TestClient, path: str = "/") -> str:
    return re.search(r'name="csrf" value="([^"]+)"', client.get(path).text).group(1)


def act(client: TestClient, path: str, **fields: str):
    return client.post(path, data={"csrf": csrf(client), **fields})


def audit_of(store) -> list[tuple[str, str, str | None, str]]:
    with store.read() as session:
        return [(row.actor, row.action, row.device, row.outcome) for row in audit_entries(session)]


def claim_for(store, device: str, *, waiting: bool = False) -> str:
    claim, at = f"claim-{device.encode().hex():0>16}", now()
    with store.write() as session:
        add_claim(session, claim, device, serial=device, expires_at=at + timedelta(days=7), at=at, actor="operator")
        if waiting:
            hold_request(session, claim, request=b"CSR", at=at)
    return claim


# Getting in.


def test_the_right_password_opens_a_session_in_a_strict_cookie(client, store):
    answer = sign_in(client)
    assert answer.status_code == 303
    assert answer.headers["location"] == "/training"
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert "Secure" not in cookie  # plain http
    assert "Sign out" in client.get("/").text
    assert ("dashboard", "sign-in", None, "done") in audit_of(store)


def test_over_https_the_cookie_is_secure(settings, store):
    with TestClient(make_app(settings), base_url="https://127.0.0.1", headers=PAGE, follow_redirects=False) as client:
        assert "Secure" in sign_in(client).headers["set-cookie"]


def test_a_wrong_password_is_refused_and_noted(client, store):
    answer = sign_in(client, "wrong")
    assert answer.status_code == 401
    assert COOKIE not in client.cookies
    assert ("dashboard", "sign-in", None, "denied") in audit_of(store)


def test_guessing_is_slowed_down(client):
    answers = [sign_in(client, f"guess {n}").status_code for n in range(7)]
    assert answers == [401] * 5 + [429] * 2
    refused = sign_in(client)  # the right one too: else the limit would tell them apart
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) > 0


def test_guesses_are_forgotten_after_a_minute(tmp_path):
    time = [0.0]
    door = Doorkeeper(tmp_path / "none", 1, clock=lambda: time[0])
    assert [door.guesses.take("here") for _ in range(6)] == [0.0] * 5 + [60.0]
    assert door.guesses.take("elsewhere") == 0
    time[0] = 60.0
    assert door.guesses.take("here") == 0


def test_many_guesses_at_once_gain_nothing(tmp_path):
    door = Doorkeeper(tmp_path / "none", 1)
    with ThreadPoolExecutor(32) as pool:
        waits = list(pool.map(lambda _: door.guesses.take("here"), range(200)))
    assert waits.count(0.0) == 5


def test_a_new_password_ends_the_sessions_of_the_old_one(operator, password_file):
    token = csrf(operator)
    password_file.write_text("another good password\n")
    assert "Sign out" not in operator.get("/").text
    assert operator.post("/devices/kitchen/order", data={"csrf": token, "name": "pause"}).status_code == 401
    password_file.write_text(PASSWORD)
    assert "Sign out" in operator.get("/").text
    password_file.unlink()
    assert "Sign out" not in operator.get("/").text


def test_a_session_ends_by_itself(tmp_path):
    time = [0.0]
    (tmp_path / "password").write_text(PASSWORD)
    door = Doorkeeper(tmp_path / "password", 1, clock=lambda: time[0])
    token = door.begin(PASSWORD)
    assert door.find(token) is not None
    assert door.find(token + "x") is None
    time[0] = 3601.0
    assert door.find(token) is None


def test_a_password_file_of_no_use_is_said(client, password_file):
    for content in ("", "short\n"):
        password_file.write_text(content)
        assert sign_in(client, content.strip()).status_code == 503
    password_file.unlink()
    answer = sign_in(client)
    assert answer.status_code == 503
    assert "cannot be read" in answer.text


@pytest.mark.parametrize("place", ["//evil.example", "https://evil.example", "/\\evil.example", "javascript:alert(1)", "", "/a\nb"])
def test_signing_in_leads_nowhere_else(place):
    assert own_path(place) == "/"


def test_signing_out_ends_the_session(operator):
    token = operator.cookies[COOKIE]
    assert act(operator, "/logout").status_code == 303
    operator.cookies.set(COOKIE, token)  # whoever kept it has nothing
    assert "Sign out" not in operator.get("/").text


# Refusals.


@pytest.mark.parametrize(("path", "fields"), ACTIONS)
def test_without_a_session_nothing_is_done(client, store, path, fields):
    assert client.post(path, data={"csrf": "x", **fields}).status_code == 401
    client.cookies.set(COOKIE, "made up")
    assert client.post(path, data=fields).status_code == 401
    assert audit_of(store) == []


@pytest.mark.parametrize(("path", "fields"), ACTIONS)
def test_without_the_forms_token_nothing_is_done(operator, store, path, fields):
    before = audit_of(store)
    assert operator.post(path, data=fields).status_code == 403
    assert operator.post(path, data={"csrf": "guessed", **fields}).status_code == 403
    assert audit_of(store) == before


@pytest.mark.parametrize("header", [{"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}, {"origin": "http://evil.example"}, {"origin": "null"}])
def test_another_sites_form_is_refused(operator, header):
    token = csrf(operator)
    answer = operator.post("/devices/kitchen/order", data={"csrf": token, "name": "pause"}, headers=header)
    assert answer.status_code == 403
    assert "another site" in answer.text
    assert operator.post("/login", data={"password": PASSWORD}, headers=header).status_code == 403


def test_a_get_request_changes_nothing(operator):
    for path, _ in ACTIONS:
        assert operator.get(path).status_code in (404, 405)


@pytest.fixture
def looking_only(tmp_path, store) -> Iterator[TestClient]:
    with TestClient(make_app(dashboard_settings(tmp_path)), base_url="http://127.0.0.1", headers=PAGE, follow_redirects=False) as client:
        yield client


def test_without_a_password_file_actions_are_off_and_the_page_says_how_to_turn_them_on(looking_only):
    assert "dashboard.password_file" in looking_only.get("/login").text
    assert "how to turn actions on" in looking_only.get("/devices/kitchen").text
    assert looking_only.post("/login", data={"password": ""}).status_code == 403
    for path, fields in ACTIONS:
        assert looking_only.post(path, data=fields).status_code == 403


def test_what_a_device_sent_is_for_the_operator(client, store):
    assert client.get("/rejections/1/payload").status_code == 401
    sign_in(client)
    assert client.get("/rejections/1/payload").status_code == 404


# What they do.


def test_pausing_writes_an_order_and_an_audit_row(operator, store):
    answer = act(operator, "/devices/kitchen/order", name="pause")
    assert answer.status_code == 303
    with store.read() as session:
        rows = session.execute(select(CommandRow.device, CommandRow.name, CommandRow.created_by)).all()
    assert rows == [("kitchen", "pause", "dashboard")]
    assert ("dashboard", "pause ordered", "kitchen", "done") in audit_of(store)
    assert "waits for the device" in operator.get("/devices/kitchen").text
    assert act(operator, "/devices/kitchen/order", name="renew-certificate").status_code == 400
    assert act(operator, "/devices/nobody/order", name="pause").status_code == 404


def test_a_tap_plan_is_changed_within_limits(operator, store):
    assert act(operator, "/devices/kitchen/plan", codec="int8", frame_samples="32", max_tokens="64").status_code == 303
    with store.read() as session:
        mine, fleet = newest_plan(session, "kitchen"), newest_plan(session)
    assert (mine.codec, mine.frame_samples) == ("int8", 32)
    assert fleet.codec == "int4"
    assert mine.version > fleet.version
    assert ("dashboard", "tap plan changed", "kitchen", "done") in audit_of(store)
    assert "its own" in operator.get("/devices/kitchen").text


@pytest.mark.parametrize(
    "fields",
    [{}, {"codec": "int1"}, {"blocks": "0"}, {"blocks": "many"}, {"max_tokens": "9999"}, {"frame_samples": "5000"}, {"linger_seconds": "nan"}, {"linger_seconds": "-1"}, {"codec": "int4"}, {"blocks": "9" * 300}],
)
def test_a_tap_plan_beyond_the_limits_is_refused(operator, store, fields):
    assert act(operator, "/devices/kitchen/plan", **fields).status_code in (400, 422)
    with store.read() as session:
        assert newest_plan(session, "kitchen").version == 1


def test_a_plan_that_the_devices_backbone_cannot_follow_is_refused(operator, store):
    answer = act(operator, "/devices/kitchen/plan", max_tokens="100")  # its backbone was prepared for 64
    assert answer.status_code == 400
    assert "backbone cannot follow" in answer.text


def test_a_waiting_device_is_approved(operator, store):
    claim = claim_for(store, "porch", waiting=True)
    assert "Approve its request" in operator.get("/devices/porch").text
    assert act(operator, "/devices/porch/access", do="approve").status_code == 303
    with store.read() as session:
        assert next(row for row in claims_of(session, "porch") if row.id == claim).approved_at is not None
    assert any(row[0] == "dashboard" and row[2] == "porch" for row in audit_of(store))
    assert act(operator, "/devices/porch/access", do="approve").status_code == 409


def test_a_device_is_revoked_with_a_reason_and_let_in_again(operator, store):
    claim_for(store, "kitchen")
    assert act(operator, "/devices/kitchen/access", do="revoke", reason="stolen").status_code == 303
    with store.read() as session:
        assert find_identity(session, "kitchen").revoked_reason == "stolen"
    assert ("dashboard", "device revoked", "kitchen", "done") in audit_of(store)
    assert "revoked: stolen" in operator.get("/").text
    assert act(operator, "/devices/kitchen/access", do="readmit").status_code == 303
    assert act(operator, "/devices/attic/access", do="revoke").status_code == 409  # no claim was ever made for it
    assert act(operator, "/devices/kitchen/access", do="burn").status_code == 400


def test_a_checkpoint_goes_out_again_as_a_new_generation(operator, store):
    first = make_training(store)
    assert act(operator, f"/checkpoints/{first}/republish").status_code == 303
    with store.read() as session:
        newest = checkpoints(session)[0]
    assert (newest.generation, newest.step, newest.published_at) == (first + 1, 200, None)
    assert ("dashboard", "checkpoint republished", None, "done") in audit_of(store)
    assert act(operator, "/checkpoints/77/republish").status_code == 404


def test_a_checkpoint_that_is_not_on_disk_any_more_is_refused(operator, store, settings):
    first = make_training(store)
    settings.checkpoints_directory.mkdir()
    assert act(operator, f"/checkpoints/{first}/republish").status_code == 409
    assert "not on disk any more" in operator.get("/training").text
