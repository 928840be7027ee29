"""Backbones and tap plans: registered once, versions only grow."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.store.engine import Store
from coordinator.store.errors import StoreError
from coordinator.store.registry import backbones, insert_plan, newest_plan, plans, register_backbone
from side_tuning.backbone_manifest import BackboneManifest
from side_tuning.wire.messages import TapPlan
from tests.store.frames import FINGERPRINT, START, after

MANIFEST = BackboneManifest(
    fingerprint=FINGERPRINT,
    source="mini",
    family="bert",
    kind="encoder",
    layers=2,
    layers_total=6,
    width=384,
    weights="int8",
    max_tokens=128,
    vocabulary=30_522,
    maps={1: "cd" * 16, 2: "ef" * 16},
    map_rank=64,
    created_with={"torch": "2.9.1"},
)
PLAN = TapPlan(version=1, labels=("off", "on"), blocks=2)


def test_a_backbone_comes_back_as_it_was_registered(store: Store):
    with store.write() as session:
        assert register_backbone(session, MANIFEST, START)
        assert not register_backbone(session, MANIFEST, after(5))
    with store.read() as session:
        found = backbones(session)
    assert found[FINGERPRINT].manifest == MANIFEST
    assert found[FINGERPRINT].registered_at == START


def test_the_newest_plan_of_a_device_goes_before_the_fleets(store: Store):
    own = replace(PLAN, version=2, codec="fp16")
    with store.write() as session:
        assert newest_plan(session) is None
        insert_plan(session, PLAN, at=START)
        insert_plan(session, own, device="kitchen", at=START)
        insert_plan(session, replace(PLAN, version=3), at=START)
    with store.read() as session:
        assert newest_plan(session) == replace(PLAN, version=3)
        assert newest_plan(session, "kitchen") == own
        assert newest_plan(session, "attic") == replace(PLAN, version=3)
        assert [(row.version, row.device, row.plan.codec) for row in plans(session)] == [
            (1, None, "int4"),
            (2, "kitchen", "fp16"),
            (3, None, "int4"),
        ]


def test_the_same_plan_again_changes_nothing_another_one_needs_a_new_version(store: Store):
    with store.write() as session:
        insert_plan(session, PLAN)
        insert_plan(session, PLAN)
    for other, device in ((replace(PLAN, codec="int2"), None), (PLAN, "kitchen")):
        with pytest.raises(StoreError, match=r"version 1 is not above 1.*use 2"), store.write() as session:
            insert_plan(session, other, device)
