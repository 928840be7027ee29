"""The pages in a real Chromium, over a real store; the fleet that is killed has a real broker and gateway."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from coordinator.settings import CoordinatorSettings
from coordinator.store.audit import audit
from coordinator.store.engine import Store
from coordinator.store.identities import add_certificate, add_claim, spend_claim
from coordinator.store.models import Identity
from coordinator.store.programs import record_program
from coordinator.store.registry import insert_plan
from coordinator.store.rejections import insert_rejection
from coordinator.store.training import insert_checkpoint, insert_evaluation, insert_run, mark_published
from tests.brokers import mosquitto, needs_mosquitto
from tests.coordinator.fleet import PLAN, make_store, settings_file
from tests.dashboards.browser import (
    PATIENCE_MILLISECONDS,
    PHONE,
    chromium,
    page_in,
    picture,
    require_chromium,
)
from tests.dashboards.fleets import dashboard_settings, now, say, send, serving

PASSWORD = "correct horse battery"
PAGES = ("/", "/devices/kitchen", "/training", "/rejections", "/audit", "/login")
HOSTILE = '<img src=x onerror="window.pwned=1">'

expect.set_options(timeout=PATIENCE_MILLISECONDS)
pytestmark = pytest.mark.slow  # together two minutes on a busy machine


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    require_chromium()
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> CoordinatorSettings:
    folder = tmp_path_factory.mktemp("dashboard")
    (folder / "password").write_text(PASSWORD)
    return dashboard_settings(folder, password_file=folder / "password")


@pytest.fixture(scope="module")
def store(settings: CoordinatorSettings) -> Iterator[Store]:
    store = make_store(settings)
    fill(store, settings)
    yield store
    store.close()


@pytest.fixture(scope="module")
def place(settings: CoordinatorSettings, store: Store) -> Iterator[str]:
    with serving(settings) as (url, _):
        yield url


def fill(store: Store, settings: CoordinatorSettings) -> None:
    """A fleet that has been at work for an hour: most are well, some are not."""
    start = now() - timedelta(minutes=49, seconds=10)
    devices = ("kitchen", "attic", "garage", "porch", "cellar", "studio")
    with store.write() as session:
        for n, device in enumerate(devices):
            add_claim(session, f"claim-{n:016x}", device, serial=f"{n}", expires_at=start + timedelta(days=7), at=start - timedelta(minutes=n + 1), actor="operator", group=("house", "garden")[n % 2])
            spend_claim(session, f"claim-{n:016x}", key_digest=f"{n}", at=start + timedelta(seconds=81))
            add_certificate(
                session, serial=f"{n}", device=device, key_digest=f"{n}", pem=b"", issued_at=start + timedelta(seconds=81),
                expires_at=start + timedelta(days=90), claim=f"claim-{n:016x}",
            )
        insert_run(session, "run-1", {}, start)
        for step in range(1, 26):
            at, accuracy = start + timedelta(minutes=2 * step), 0.9 - 0.5 / step
            for scope, name, value in (("fleet", "fleet", accuracy), ("backbone", "ab" * 16, accuracy + 0.01), ("device", "kitchen", accuracy - 0.05), ("worst-device", "garage", accuracy - 0.1)):
                insert_evaluation(session, "run-1", step * 100, scope, name, value, 1.6 - accuracy, 120, at)
            if step % 8 == 0:
                mark_published(session, insert_checkpoint(session, "run-1", step * 100, str(settings.checkpoints_directory / f"{step}"), {"accuracy": accuracy}, at), at)
        record_program(session, "trainer", started_at=start, at=now(), status={"loss": 0.41, "samples_per_second": 312.0, "replay_ratio": 3.2, "shares": {"kitchen": 0.3, "attic": 0.4, "garage": 0.3}})
        insert_rejection(session, device="garage", topic="up", payload=b"\x00broken", reason="frame: body is shorter than its header says", received_at=now())
        audit(session, at=now(), actor="claim-00", action="certificate refused", device="porch", outcome="denied", detail="the claim was spent before")
    sent = dict.fromkeys(devices, 0)
    chance = random.Random(7)
    for minute in range(48):
        for n, device in enumerate(devices[: 6 if minute < 20 else 4]):
            for part in range(chance.choice((0, 1, 1, 2, 2, 3))):  # now more, now less, now nothing
                sent[device] += 1
                send(store, device, sent[device], start + timedelta(minutes=minute + 2, seconds=n + 15 * part))
    steps = {"flashed": -35, "booted": 22, "configured": 51, "network": 66, "clock": 73, "enrolled": 82, "backbone": 104}
    for device in devices[:4]:
        first_steps = {step: start.timestamp() + seconds for step, seconds in steps.items()}
        say(store, device, 2 * sent[device], checkpoint=2, throttled=device == "porch", first_steps=first_steps)


@pytest.mark.parametrize("path", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark", "phone"])
def test_every_page_is_free_of_errors_and_fits(browser, place, path, scheme):
    look = {"viewport": PHONE, "color_scheme": "light", "is_mobile": True, "has_touch": True} if scheme == "phone" else {"color_scheme": scheme}
    with page_in(browser, **look) as page:
        page.goto(place + path)
        expect(page.locator("h1")).to_be_visible()
        if page.locator("[data-live]").count():
            expect(page.locator("#link")).to_have_text("live")
            expect(page.locator(".canvas canvas").first).to_be_visible()
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{path} is {wide} px too wide"
        name = path.strip("/").replace("/", "-") or "fleet"
        picture(page, f"{name}-{scheme}")


def test_devices_appear_and_numbers_move_without_reloading(browser, place, store):
    with page_in(browser) as page:
        page.goto(place + "/?sort=name")
        page.evaluate("window.sameDocument = true")
        expect(page.locator("#link")).to_have_text("live")
        expect(page.locator('tr[data-row="newcomer"]')).to_have_count(0)
        send(store, "newcomer", 1)
        row = page.locator('tr[data-row="newcomer"]')
        expect(row).to_be_visible()
        expect(row.locator('[data-label="stored"]')).to_have_text("2")
        send(store, "newcomer", 2)
        expect(row.locator('[data-label="stored"]')).to_have_text("4")
        names = page.locator("tr[data-row]").evaluate_all("rows => rows.map(row => row.dataset.row)")
        assert names == sorted(names)
        assert page.evaluate("window.sameDocument") is True


def test_a_new_device_is_seen_coming_step_by_step(browser, place, store):
    """On a phone beside the board; what is late says so by word and sign, and the rest moves without reloading."""
    begun, claim = now() - timedelta(minutes=40), "claim-" + "ef" * 8
    with store.write() as session:
        add_claim(session, claim, "annexe", serial="ef", expires_at=begun + timedelta(days=7), at=begun, actor="operator")
    with page_in(browser, viewport=PHONE, is_mobile=True, has_touch=True) as page:
        page.goto(place + "/devices/annexe")
        expect(page.locator("#link")).to_have_text("live")
        done, waited_for = page.locator(".timeline .done .step"), page.locator(".timeline .open .step")
        expect(done).to_have_text(["claim made"])
        expect(waited_for).to_have_text(["enrolled", "first heard from", "first sample stored"])
        with store.write() as session:
            spend_claim(session, claim, key_digest="ef", at=begun + timedelta(minutes=3))
            add_certificate(
                session, serial="ef", device="annexe", key_digest="ef", pem=b"", issued_at=begun + timedelta(minutes=3),
                expires_at=begun + timedelta(days=90), claim=claim,
            )
        expect(page.locator(".timeline .overdue .hint")).to_contain_text("does the agent run")
        expect(page.locator(".timeline .overdue .step")).to_have_text("first heard from overdue")
        say(store, "annexe", 0, first_steps={"booted": None, "network": begun.timestamp() + 150, "clock": now().timestamp() - 2, "backbone": now().timestamp() - 1})
        expect(done).to_have_text(["claim made", "booted", "broker reached", "enrolled", "clock right", "backbone loaded", "first heard from"])
        send(store, "annexe", 1)
        expect(done.last).to_have_text("first sample stored")
        expect(page.locator(".timeline .overdue, .timeline .open")).to_have_count(0)
        picture(page, "timeline-phone")


def test_a_plot_is_drawn_from_the_table_that_stays_beside_it(browser, place):
    with page_in(browser) as page:
        page.goto(place + "/devices/kitchen")
        expect(page.locator(".canvas canvas").first).to_be_visible()
        painted = page.locator(".canvas canvas").first.evaluate(
            "canvas => new Set(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data).size"
        )
        assert painted > 10  # lines, grid and text, not an empty square
        table = page.locator("[data-fragment=arrivals] table")
        expect(table).to_be_hidden()
        page.locator("[data-fragment=arrivals] summary").focus()
        page.keyboard.press("Enter")
        expect(table).to_be_visible()
        assert table.locator("tbody tr").count() > 30


def test_the_keyboard_stays_where_it_is_while_news_comes(browser, place, store):
    with page_in(browser) as page:
        page.goto(place + "/devices/kitchen")
        summary = page.locator("[data-fragment=plan] summary")
        summary.focus()
        with store.write() as session:
            insert_plan(session, replace(PLAN, version=2, labels=("a", "b", "c", "d")))
        expect(summary).to_have_text("4 labels")
        expect(summary).to_be_focused()


@pytest.mark.parametrize("path", PAGES)
def test_without_javascript_every_page_fits_a_phone(browser, place, store, path):
    with store.write() as session:
        if session.get(Identity, "barn") is None:
            session.add(Identity(device="barn", group="g" * 64, created_at=now(), revoked_reason=""))
            for name in ("cd" * 16, "ef" * 16, "12" * 16):
                insert_evaluation(session, "run-1", 100, "backbone", name, 0.5, 0.5, 1, now())
    with page_in(browser, java_script_enabled=False, viewport=PHONE, is_mobile=True, has_touch=True) as page:
        page.goto(place + path)
        expect(page.locator("h1")).to_be_visible()
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{path} is {wide} px too wide"


def test_without_javascript_every_page_is_complete(browser, place):
    with page_in(browser, java_script_enabled=False) as page:
        page.goto(place + "/")
        expect(page.locator('tr[data-row="kitchen"]')).to_be_visible()
        expect(page.locator("[data-fragment=scores] table tbody tr").first).to_be_visible()
        page.get_by_role("searchbox").fill("KITCH")
        page.get_by_role("button", name="Show").click()
        assert "name=KITCH" in page.url
        expect(page.locator("tr[data-row]")).to_have_count(1)
        page.get_by_role("link", name="kitchen").click()
        expect(page.locator("[data-fragment=arrivals] table")).to_be_visible()
        expect(page.get_by_text("ago").first).to_be_visible()
        for path in ("/training", "/rejections", "/audit"):
            page.goto(place + path)
            expect(page.locator("table").first).to_be_visible()
        sign_in(page, place)
        expect(page.get_by_role("button", name="Sign out")).to_be_visible()


def sign_in(page: Page, place: str, back: str = "/") -> None:
    page.goto(f"{place}/login?back={back}")
    page.get_by_label("Operator's password").fill(PASSWORD)
    page.locator("main").get_by_role("button", name="Sign in").click()


def test_an_operator_signs_in_acts_and_signs_out(browser, place, store):
    with page_in(browser, allow="401") as page:
        page.goto(f"{place}/login?back=/devices/attic")
        page.get_by_label("Operator's password").fill("wrong password")
        page.locator("main").get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("alert")).to_contain_text("not the password")
        sign_in(page, place, "/devices/attic")
        page.get_by_role("button", name="Pause").click()
        expect(page.get_by_role("status").filter(has_text="pause ordered")).to_be_visible()
        expect(page.locator("[data-fragment=orders]")).to_contain_text("waits for the device")
        page.goto(place + "/audit")
        expect(page.get_by_text("pause ordered")).to_be_visible()
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_role("link", name="Sign in").first).to_be_visible()


def test_a_form_without_its_token_is_refused(browser, place):
    with page_in(browser, allow="403") as page:
        sign_in(page, place, "/devices/attic")
        page.evaluate("document.querySelectorAll('input[name=csrf]').forEach(one => { one.value = 'guessed'; })")
        page.get_by_role("button", name="Resume").click()
        expect(page.locator(".reason")).to_contain_text("nothing was done")


def test_it_can_be_used_with_the_keyboard_alone(browser, place):
    with page_in(browser) as page:
        page.goto(place + "/")
        page.keyboard.press("Tab")
        expect(page.locator(".skip")).to_be_focused()
        page.keyboard.press("Enter")
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.closest('tr[data-row]') !== null"):
                break
        page.keyboard.press("Enter")
        page.wait_for_url("**/devices/*")


def test_the_worst_rows_first_and_a_state_is_never_colour_alone(browser, place):
    with page_in(browser) as page:
        page.goto(place + "/")
        states = page.locator("tr[data-row] .state")
        assert states.first.inner_text().strip() == "✕ lost"
        assert all(any(character.isalpha() for character in text) for text in states.all_inner_texts())
        assert page.locator("tr[data-row] time").first.get_attribute("title").endswith("UTC")


def test_hostile_words_stay_words(browser, tmp_path):
    settings = dashboard_settings(tmp_path)
    store = make_store(settings)
    send(store, "kitchen", 1)
    say(store, "kitchen", 2, reason=HOSTILE, plan_error=HOSTILE, checkpoint_error=HOSTILE, agent_version=HOSTILE)
    with store.write() as session:
        insert_plan(session, replace(PLAN, version=2, labels=(HOSTILE, "b", "c")))
        insert_rejection(session, device="kitchen", topic=HOSTILE, payload=b"x", reason=HOSTILE, received_at=now())
        audit(session, at=now(), actor=HOSTILE, action=HOSTILE, device=HOSTILE, detail=HOSTILE)
        session.add(Identity(device=HOSTILE, group=HOSTILE, created_at=now(), revoked_reason=""))
        record_program(session, "trainer", started_at=now(), at=now(), status={"error": HOSTILE, "shares": {HOSTILE: 0.5}})
        insert_run(session, "run", {}, now())
        insert_evaluation(session, "run", 1, "backbone", HOSTILE, 0.5, 0.5, 1, now())
        insert_evaluation(session, "run", 1, "fleet", "fleet", 0.5, 0.5, 1, now())
    with serving(settings) as (place, _):
        for path in PAGES:
            with page_in(browser) as page:
                page.goto(place + path)
                if page.locator("[data-live]").count():
                    expect(page.locator("body")).to_have_attribute("data-updates", re.compile("[1-9]"))  # what comes live, too
                assert page.evaluate("window.pwned") is None
                assert page.locator("main img").count() == 0
        with page_in(browser) as page:
            page.goto(place + "/devices/kitchen")
            expect(page.get_by_text(HOSTILE).first).to_be_visible()  # as it was written
    store.close()


def test_the_page_says_that_the_connection_is_lost_and_finds_it_again(browser, tmp_path):
    settings = dashboard_settings(tmp_path)
    with page_in(browser, allow="503|ERR_CONNECTION|request failed") as page:
        with serving(settings) as (place, _):
            page.goto(place + "/")
            expect(page.get_by_role("heading", name="Waiting for the store")).to_be_visible()
            store = make_store(settings)
            send(store, "kitchen", 1)
            expect(page.locator('tr[data-row="kitchen"]')).to_be_visible()  # by itself
            expect(page.locator("#link")).to_have_text("live")
        expect(page.locator("#link")).to_contain_text("connection lost")
        with serving(settings):
            send(store, "kitchen", 2)
            expect(page.locator('tr[data-row="kitchen"] [data-label="stored"]')).to_have_text("4")
            expect(page.locator("#link")).to_have_text("live")
        store.close()


@contextmanager
def program(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-m", *command], stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)


@needs_mosquitto
@pytest.mark.broker
def test_a_device_that_dies_turns_late_then_lost_and_comes_back(browser, tmp_path):
    settings = dashboard_settings(tmp_path)
    make_store(settings).close()
    with mosquitto(tmp_path / "broker") as broker, serving(settings) as (place, _):
        device = ["tests.dashboards.device_program", "kitchen", str(broker.port), "15"]
        gateway = ["coordinator.cli", "gateway", "--config", str(settings_file(tmp_path, broker.port))]
        with program(gateway, tmp_path / "gateway.log"), page_in(browser) as page:
            page.goto(place + "/")
            state = page.locator('tr[data-row="kitchen"] td').first
            with program(device, tmp_path / "device.log") as process:
                expect(page.locator('tr[data-row="kitchen"] [data-label="stored"]')).to_have_text(re.compile("[2-9][0-9]"))  # its pace is known
                expect(state).to_contain_text("on-time")
                process.send_signal(signal.SIGSTOP)  # hangs: nothing is said, the broker finds out by its silence
                expect(state).to_contain_text("late")
                expect(state).to_contain_text("lost")
                expect(state).to_contain_text("connection lost without goodbye")
                process.send_signal(signal.SIGCONT)
                expect(state).to_contain_text("on-time")
                page.get_by_role("link", name="kitchen").click()
                title = page.locator("[data-fragment=state]")
                expect(title).to_contain_text("on-time")
                process.kill()
                expect(title).to_contain_text("lost")
                expect(title).to_contain_text("connection lost without goodbye")
            with program(device, tmp_path / "again.log"):
                expect(title).to_contain_text("on-time")
