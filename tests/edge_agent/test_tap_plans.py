"""Tap plans: the device's own first, persisted, a wrong one refused and told while the one before it stays."""

from __future__ import annotations

import time

import pytest

from edge_agent.backbone import read_manifest
from edge_agent.spool import Spool
from edge_agent.tap_plans import TapPlans
from side_tuning.wire import topics
from tests.edge_agent.artifacts import plan

DEVICE = "kitchen"
OWN, FLEET = topics.device_plan(DEVICE), topics.fleet_plan()


@pytest.fixture
def spool(tmp_path):
    with Spool.open(tmp_path / "spool.db", max_bytes=1 << 20, policy="pause", clock=time.time) as opened:
        yield opened


@pytest.fixture
def plans(spool, minilm):
    return TapPlans(spool, read_manifest(minilm), DEVICE)


def settle(plans, topic, payload):
    assert plans.offer(topic, payload)
    return plans.settle()


def test_the_devices_own_plan_goes_before_the_fleets(plans):
    assert plans.current is None
    assert settle(plans, OWN, plan(version=7).to_bytes())
    assert not settle(plans, FLEET, plan(version=8).to_bytes()), "nothing changes for this device"
    assert plans.current.version == 7
    assert settle(plans, OWN, b""), "taken back"
    assert plans.current.version == 8


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b"\xc1", "malformed msgpack"),
        (b"\x80", "'labels' is missing"),
        (plan(version=9, mode="sequence", rank=200).to_bytes(), "rank"),
        (plan(version=9, max_tokens=4000).to_bytes(), "max_tokens"),
    ],
)
def test_a_wrong_plan_is_told_and_the_one_before_it_stays(plans, payload, words):
    settle(plans, FLEET, plan(version=5).to_bytes())
    assert settle(plans, FLEET, payload)
    assert words in plans.error
    assert plans.current.version == 5
    assert settle(plans, FLEET, plan(version=10).to_bytes())
    assert plans.error == ""
    assert plans.current.version == 10


def test_a_coordinator_that_counts_its_plans_anew_is_obeyed(plans):
    """A database that was wiped starts at version 1 again; its devices must not be deaf to it."""
    settle(plans, FLEET, plan(version=5).to_bytes())
    assert settle(plans, FLEET, plan(version=1, codec="int8").to_bytes())
    assert plans.current == plan(version=1, codec="int8")


def test_the_plans_outlive_a_restart(plans, spool, minilm):
    settle(plans, FLEET, plan(version=5).to_bytes())
    settle(plans, OWN, plan(version=6, codec="int8").to_bytes())
    settle(plans, OWN, b"\xc1")
    again = TapPlans(spool, read_manifest(minilm), DEVICE)
    assert again.current == plan(version=6, codec="int8")
    assert again.error == ""


def test_other_topics_are_none_of_its_business(plans):
    assert not plans.offer(topics.device_plan("bath"), plan().to_bytes())
