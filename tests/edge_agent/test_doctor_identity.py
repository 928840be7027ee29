"""The doctor knows identities: dates, chain, key, bundle; and does not throw a running agent out of the broker."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from coordinator.authority import certificate_pem, make_authority
from edge_agent.doctor import check_broker, check_clock
from edge_agent.doctor_identity import agent_runs, check_identity, tls_trouble
from edge_agent.findings import Finding
from edge_agent.settings import AgentSettings
from edge_agent.spool_file import SpoolLock
from edge_agent.trusted_clock import RELEASED_AT, TrustedClock
from side_tuning.broker_connection import BrokerConnection
from tests.brokers import free_port, needs_mosquitto
from tests.edge_agent.answering import DEVICE, identity_for, make_bundle
from tests.tls_broker import TlsBroker, tls_broker, utc_now
from tests.waiting import wait_until

pytestmark = [pytest.mark.broker, needs_mosquitto]


@pytest.fixture(scope="module")
def broker(tmp_path_factory):
    with tls_broker(tmp_path_factory.mktemp("broker")) as running:
        yield running


def settings(state: Path, **values) -> AgentSettings:
    return AgentSettings(**{"state_directory": state, "backbone": {"folder": state}, **values})


def found(state: Path, now=time.time, **values) -> dict[str, Finding]:
    return {finding.level: finding for finding in check_identity(settings(state, **values), TrustedClock(state, now))}


def test_a_sound_identity_is_found_sound(tmp_path: Path, broker: TlsBroker):
    identity = identity_for(broker, tmp_path, 30)
    findings = found(tmp_path)
    assert set(findings) == {"ok"}
    assert identity.serial in findings["ok"].detail


def test_dates_are_judged_by_the_trusted_clock(tmp_path: Path, broker: TlsBroker):
    identity = identity_for(broker, tmp_path, 30)
    assert "renewal is overdue" in found(tmp_path, lambda: identity.ends - 86_400)["warning"].detail
    ended = found(tmp_path, lambda: identity.ends + 1)["failed"]
    assert "ended" in ended.detail
    assert f"coordinator enrol {DEVICE}" in ended.cure


def test_a_key_that_others_may_read_is_told(tmp_path: Path, broker: TlsBroker):
    identity_for(broker, tmp_path, 30)
    (tmp_path / "identity" / "client.key").chmod(0o644)
    assert "mode 0644" in found(tmp_path)["failed"].detail


def test_a_certificate_of_another_authority_is_told(tmp_path: Path, broker: TlsBroker):
    identity_for(broker, tmp_path, 30)
    foreign = make_authority("fleet authority of a test", now=utc_now(), days=3)
    (tmp_path / "identity" / "authorities.pem").write_bytes(certificate_pem(foreign.certificate))
    assert "not come from this fleet's authority" in found(tmp_path)["failed"].detail


def test_a_bundle_is_told_whether_spent_or_not(tmp_path: Path, broker: TlsBroker):
    bundle = make_bundle(broker, tmp_path)
    state = tmp_path / "state"
    assert "unspent" in found(state, bundle_file=bundle)["warning"].detail
    assert "ended" in found(state, lambda: time.time() + 86_400, bundle_file=bundle)["failed"].detail
    identity_for(broker, state, 30)
    assert "still there" in found(state, bundle_file=bundle)["warning"].detail


def test_a_certificate_named_in_the_settings_is_looked_at_too(tmp_path: Path, broker: TlsBroker):
    values = {"device": DEVICE, "broker": broker.client(DEVICE).model_dump()}
    assert "good until" in found(tmp_path, **values)["ok"].detail
    assert "does not renew itself" in found(tmp_path, lambda: time.time() + 3e7, **values)["failed"].cure


def test_the_clock_is_held_against_the_trusted_time(tmp_path: Path):
    (finding,) = check_clock(60.0, TrustedClock(tmp_path, lambda: 60.0))
    assert (finding.level, "1970-01-01" in finding.detail) == ("failed", True)
    (finding,) = check_clock(RELEASED_AT + 60.0, TrustedClock(tmp_path, lambda: RELEASED_AT + 60.0))
    assert finding.level == "ok"


def test_beside_a_running_agent_only_tls_is_tried(tmp_path: Path, broker: TlsBroker):
    """The broker takes the certificate's name as client id: a doctor that connected would throw the agent out."""
    identity_for(broker, tmp_path, 30)
    device = settings(tmp_path)
    lock = SpoolLock(device.spool_path)
    agent = BrokerConnection(device.broker, DEVICE)
    agent.start()
    try:
        wait_until(lambda: agent.connected, 60, "the agent is connected")
        assert agent_runs(device)
        (finding,) = check_broker(device, TrustedClock(tmp_path))
        assert (finding.level, "beside the running agent" in finding.detail) == ("ok", True)
        assert (agent.connected, agent.epoch) == (True, 1)
    finally:
        agent.stop()
        lock.release()
    assert not agent_runs(device)


def test_tls_alone_tells_what_is_wrong(tmp_path: Path, broker: TlsBroker):
    clock = TrustedClock(tmp_path)
    assert tls_trouble(broker.client(DEVICE), clock, 30) == ""
    assert "does not know the authority" in tls_trouble(broker.settings(broker.issue("claim-0123456789abcdef", claims=True)), clock, 30)
    assert "asks for a client certificate" in tls_trouble(broker.settings(None), clock, 30)
    assert "cannot be reached" in tls_trouble(broker.client(DEVICE).model_copy(update={"port": free_port()}), clock, 30)
