"""`coordinator devices`: what needs a person stands under its device, in words."""

from dataclasses import replace
from datetime import timedelta

from coordinator.device_table import device_lines
from coordinator.store.engine import open_store
from coordinator.store.health import record_health
from coordinator.store.schema import upgrade
from side_tuning.wire.messages import BackboneInfo
from tests.store.frames import FINGERPRINT, START, report


def test_troubles_of_a_device_stand_under_it(tmp_path):
    url = f"sqlite:///{tmp_path}/store.db"
    upgrade(url)
    store = open_store(url)
    health = report(200, 200, 0, 5)
    assert health.spool is not None
    backbone = BackboneInfo(FINGERPRINT, "bert", 4, 32, "float")
    health = replace(
        health,
        backbone=backbone,
        reason="the spool is full",
        plan_error="tap plan refused: its rank",
        checkpoint_error="not signed by the configured key",
        spool=replace(health.spool, refused={"unknown label": 2}),
    )
    with store.write() as session:
        record_health(session, "kitchen", health, START + timedelta(days=2))
        record_health(session, "attic", replace(report(0, 0, 0, 1), backbone=backbone), START)
    lines = device_lines(store)
    store.close()
    late = "“first sample stored” did not come within 30 minutes after “first heard from”: "
    assert [line.split()[0] for line in lines[:3]] == ["attic", "!", "kitchen"]
    assert lines[1].split("! ")[1].startswith(f"{late}it is lost: ")
    found = [line.split("! ")[1] for line in lines[3:]]
    assert found.pop(1).startswith(f"{late}it is lost: ")
    assert found == [
        "its clock is 2 days, 0:00:00 behind: let it reach a time server",
        "it has receipts for 200 samples: if this database is a new or older one, the rest was in the one before",
        "tap plan refused: its rank",
        "checkpoint refused: not signed by the configured key",
        "it says: the spool is full",
        "refused on the device, its log names the rows: 2 unknown label",
    ]
