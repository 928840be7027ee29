"""Live updates: shared by all viewers, nothing read while nobody looks, and no transaction held between rounds."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import httpx
import pytest

from coordinator.settings import CoordinatorSettings
from coordinator.store.timestamps import utc_now
from dashboards import live as live_module
from dashboards.live import Live, StoreAccess
from tests.coordinator.fleet import make_store, settings_file
from tests.dashboards.fleets import dashboard_settings, send, serving
from tests.waiting import wait_until

PATIENCE = httpx.Timeout(120)


@contextmanager
def viewer(url: str) -> Iterator[Iterator[dict[str, str]]]:
    """The fragments of one event after the other."""
    with httpx.Client(timeout=PATIENCE) as client, client.stream("GET", url) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield (json.loads(line.removeprefix("data: "))["fragments"] for line in answer.iter_lines() if line.startswith("data: "))


def test_a_viewer_gets_everything_first_and_then_what_changes(settings, store):
    with serving(settings) as (place, _), viewer(f"{place}/live/fleet") as events:
        first = next(events)
        assert {"totals", "scores", "pager", "absent", "order:devices", "row:kitchen", "row:attic", "row:garage"} == set(first)
        send(store, "newcomer", 1)
        changed: dict[str, str] = {}
        while "row:newcomer" not in changed:
            changed |= next(events)
        assert "row:newcomer" in changed["order:devices"].split("\n")
        assert "scores" not in changed  # nothing was measured


def test_a_page_gets_only_what_its_query_asks_for(settings, store):
    with serving(settings) as (place, _), viewer(f"{place}/live/fleet?name=kitchen") as events:
        assert [name for name in next(events) if name.startswith("row:")] == ["row:kitchen"]


def test_a_devices_page_moves_too(settings, store):
    with serving(settings) as (place, _), viewer(f"{place}/live/device/kitchen") as events:
        assert {"state", "rates", "arrivals", "ledger", "health", "timeline"} <= set(next(events))
        send(store, "kitchen", 4)
        changed: dict[str, str] = {}
        while "ledger" not in changed:
            changed |= next(events)
        assert ">8<" in changed["ledger"]


def watch(events: Iterator[object]) -> None:
    """Read until the stream is closed."""
    with suppress(httpx.TransportError, httpx.StreamError):
        for _ in events:
            pass


def test_many_viewers_cost_one_reading_each_round_and_none_when_they_are_gone(settings, store):
    with serving(settings) as (place, server):
        live = server._live
        readings = count()
        read = live._read

        def counted():
            next(readings)
            return read()

        live._read = counted  # type: ignore[method-assign]
        streams = [viewer(f"{place}/live/fleet") for _ in range(10)]
        opened = [stream.__enter__() for stream in streams]
        for events in opened:
            next(events)
        assert live.viewers == 10
        before_rounds, before = live.rounds, next(readings)
        wait_until(lambda: live.rounds >= before_rounds + 5, 60, "five rounds")
        assert next(readings) - before <= live.rounds - before_rounds + 2
        for stream in streams:
            stream.__exit__(None, None, None)
        wait_until(lambda: live.viewers == 0, 60, "they are gone")
        wait_until(lambda: live.rounds == (rested := live.rounds) and not live._wake.wait(0.5) and live.rounds == rested, 60, "the sampler rests")


def test_too_many_viewers_are_turned_away(settings, store, monkeypatch):
    monkeypatch.setattr(live_module, "MAX_VIEWERS", 1)
    with serving(settings) as (place, _), viewer(f"{place}/live/fleet") as events:
        next(events)
        answer = httpx.get(f"{place}/live/fleet", timeout=PATIENCE)
        assert answer.status_code == 503
        assert "close some" in answer.json()["detail"]


@pytest.mark.slow
def test_an_hour_of_watching_never_keeps_the_log_from_shrinking(tmp_path):
    """600 rounds, an hour's at one every six seconds, while frames are written: the log can be emptied all the while."""
    settings = dashboard_settings(tmp_path, every_seconds=0.002)
    store = make_store(settings)
    send(store, "kitchen", 1)
    rounds = 600
    with serving(settings) as (place, server), viewer(f"{place}/live/fleet") as events, viewer(f"{place}/live/device/kitchen") as more:
        live = server._live
        live._pause = lambda _snapshot: 0.002  # type: ignore[method-assign]
        for stream in (events, more):
            threading.Thread(target=watch, args=(stream,), daemon=True).start()
        emptied, written = 0, 1
        deadline_rounds = live.rounds + rounds
        while live.rounds < deadline_rounds:
            written += 1
            send(store, "kitchen", written)
            if written % 10 == 0:
                # A reader that is just looking makes one attempt fail; one that held on would make them all fail.
                wait_until(lambda: store.checkpoint_log() == 0, 60, "the log is empty")
                emptied += 1
        assert emptied > 3
        wait_until(lambda: store.checkpoint_log() == 0, 60, "the log is empty")
        assert Path(f"{store.url.database}-wal").stat().st_size == 0
    store.close()


def test_a_store_that_comes_late_is_found(settings: CoordinatorSettings):
    with serving(settings) as (place, _), viewer(f"{place}/live/fleet") as events:
        store = make_store(settings)
        send(store, "kitchen", 1)
        assert any("row:kitchen" in fragments for fragments in events)  # after those that say why nothing comes
        store.close()


def test_a_store_that_was_restored_under_an_open_page_is_read_anew(settings, store):
    with serving(settings) as (place, _), viewer(f"{place}/live/fleet") as events:
        assert "row:kitchen" in next(events)
        store.close()
        path = Path(str(store.url.database))
        for beside in ("", "-wal", "-shm"):
            Path(f"{path}{beside}").rename(f"{path}{beside}.old")
        with httpx.Client(timeout=PATIENCE) as client:
            wait_until(lambda: client.get(place).status_code == 503, 60, "it is not there")
        restored = make_store(settings)
        send(restored, "newcomer", 1)
        changed: dict[str, str] = {}
        while "row:newcomer" not in changed:
            changed |= next(events)
        assert changed["order:devices"] == "row:newcomer"
        restored.close()


def test_a_page_that_stands_still_says_why_and_goes_on_later(settings, store):
    with serving(settings) as (place, _), httpx.Client(timeout=PATIENCE) as client, client.stream("GET", f"{place}/live/fleet") as answer:
        said = (json.loads(line.removeprefix("data: "))["trouble"] for line in answer.iter_lines() if line.startswith("data: "))
        assert next(said) == ""
        path = Path(str(store.url.database))
        store.close()
        path.rename(f"{path}.away")
        assert "does not exist" in next(words for words in said if words)
        Path(f"{path}.away").rename(path)
        assert next(words for words in said if not words) == ""


def test_a_page_that_cannot_be_rendered_holds_up_no_other(settings, store):
    with serving(settings) as (place, server), viewer(f"{place}/live/device/kitchen") as broken:
        next(broken)

        def fail(_snapshot):
            raise ValueError("a template's mistake")

        next(iter(server._live._channels.values())).render = fail
        with viewer(f"{place}/live/fleet?name=attic") as events:
            next(events)
            send(store, "attic", 4)
            assert "row:attic" in next(events)


def test_a_snapshot_is_shared_for_a_round(settings, store):
    live = Live(StoreAccess(settings.database_url), every_seconds=60, heartbeat_seconds=30, now=utc_now)
    assert live.snapshot() is live.snapshot()
    before = live.snapshot()
    assert live.fresh() is not before
    assert live.snapshot() is not before


def test_the_program_ends_on_sigterm_with_a_page_open(tmp_path):
    settings = dashboard_settings(tmp_path)
    path = settings_file(tmp_path, 1883)
    make_store(settings).close()
    port = settings.dashboard.port
    process = subprocess.Popen(
        [sys.executable, "-m", "dashboards", "serve", "--config", str(path), "--port", str(port)], stderr=subprocess.PIPE, text=True
    )
    try:
        wait_until(lambda: answers(port), 60, "it answers")
        with viewer(f"http://127.0.0.1:{port}/live/fleet") as events:
            next(events)
            process.send_signal(signal.SIGTERM)
            assert list(events) is not None  # the stream ends
            assert process.wait(30) in (0, -signal.SIGTERM)
    finally:
        process.kill()
    assert "Traceback" not in (process.stderr.read() if process.stderr else "")


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=PATIENCE).status_code == 200
    except httpx.TransportError:
        return False


def test_a_port_that_is_taken_is_a_matter_of_configuration(tmp_path):
    settings = dashboard_settings(tmp_path)
    with serving(settings):
        result = subprocess.run(
            [sys.executable, "-m", "dashboards", "serve", "--config", str(settings_file(tmp_path, 1883)), "--port", str(settings.dashboard.port)],
            capture_output=True, text=True, timeout=120,
        )
    assert result.returncode == 78
    assert "choose another" in result.stderr
    assert "Traceback" not in result.stderr
