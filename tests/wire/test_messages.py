"""Messages: every type comes back, tolerates a newer sender, and names the field that is wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from side_tuning.wire.bounded import FrameError
from side_tuning.wire.messages import (
    BackboneInfo,
    Blob,
    CheckpointManifest,
    Command,
    Health,
    Mode,
    Receipt,
    SignedManifest,
    SpoolCount,
    TapPlan,
)

PLAN = TapPlan(version=3, labels=("light on", "light off"), blocks=3)
SPOOL = SpoolCount(
    spool="00112233445566ff",
    produced=100,
    receipted=60,
    spooled=38,
    dropped=2,
    spooled_frames=3,
    spooled_bytes=99_000,
    oldest_age_seconds=12.5,
    floor=4,
    next_sequence=9,
    refused={"no text": 2},
)
HEALTH = Health(
    presence="online",
    session="s1",
    at=1.7e9,
    agent_version="0.1.0",
    started_at=1.6e9,
    backbone=BackboneInfo("ab" * 16, "bert", 6, 384, "int8"),
    plan_version=3,
    checkpoint=2,
    spool=SPOOL,
    forward_seconds=0.05,
    bytes_sent=10**9,
    temperature_celsius=61.5,
    throttled=False,
    load_1m=0.7,
    memory_available_bytes=2**31,
    peak_rss_bytes=2**28,
    disk_free_bytes=2**34,
    first_steps={"booted": None, "network": 1.65e9, "stored": 1.66e9},
)
MANIFEST = CheckpointManifest(
    generation=5,
    run="run-1",
    step=1200,
    created_at=1.7e9,
    fingerprint="ab" * 16,
    plan=PLAN,
    side_width=96,
    ladder=Blob("ladder.safetensors", "0f" * 32, 100_000, 65_536),
    alignment=Blob("alignment.safetensors", "f0" * 32, 65_536, 65_536),
    metrics={"accuracy": 0.94},
)

MESSAGES: list[Any] = [
    PLAN,
    TapPlan(1, ("a",), 64, mode="sequence", pooling="last", codec="fp16", group=0, rank=16, linger_seconds=0.0),
    TapPlan(2, ("a",), 2, mode="sequence", rank=16, summary=True),
    Receipt("00112233445566ff", 0),
    Receipt("00112233445566ff", 2**53, (2**53,), ((7, "too large"), (9, "damaged"))),
    HEALTH,
    HEALTH.as_last_will(),
    Health("offline", "s2", 0.0),
    Command("c1", "pause", 1.7e9),
    MANIFEST,
    SignedManifest(MANIFEST.to_bytes(), bytes(range(64))),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_messages_come_back(message: Any) -> None:
    assert type(message).from_bytes(message.to_bytes()) == message


def test_a_plan_with_summaries_is_none_to_who_does_not_know_them() -> None:
    """An older agent must keep the plan before it: frames without summaries would be rejected, and forgotten."""
    with_summary = TapPlan(2, ("a",), 2, mode="sequence", rank=16, summary=True)
    modes = [msgpack.unpackb(plan.to_bytes())["mode"] for plan in (with_summary, replace(with_summary, summary=False))]
    assert modes == ["sequence+summary", "sequence"]
    assert modes[0] not in get_args(Mode)
    for wrong in ({"mode": "pooled", "summary": True}, {"task": "causal-lm", "labels": [], "last_rank": 16}):
        fields = {**msgpack.unpackb(with_summary.to_bytes()), **wrong}
        with pytest.raises(FrameError, match="only classification and regression in mode sequence have one"):
            TapPlan.from_bytes(msgpack.packb(fields))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_fields_of_a_newer_sender_are_ignored(message: Any) -> None:
    newer = {**msgpack.unpackb(message.to_bytes()), "colour": "red", "nested": {"a": [1]}}
    assert type(message).from_bytes(msgpack.packb(newer)) == message


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_truncation_at_every_length_is_refused(message: Any) -> None:
    payload = message.to_bytes()
    for length in range(len(payload)):
        with pytest.raises(FrameError):
            type(message).from_bytes(payload[:length])


simple = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
anything = st.recursive(simple, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5)


@settings(max_examples=300, deadline=None)
@given(message=st.sampled_from(MESSAGES), data=st.data(), value=anything)
def test_any_field_may_hold_anything(message: Any, data: st.DataObject, value: object) -> None:
    """It is refused with a `FrameError`, or read into a message that survives a round trip."""
    fields = msgpack.unpackb(message.to_bytes())
    fields[data.draw(st.sampled_from(sorted(fields)))] = value
    try:
        read = type(message).from_bytes(msgpack.packb(fields))
    except FrameError:
        return
    assert type(message).from_bytes(read.to_bytes()) == read


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=100), message=st.sampled_from(MESSAGES))
def test_noise_is_refused(data: bytes, message: Any) -> None:
    with pytest.raises(FrameError):
        type(message).from_bytes(data)


@pytest.mark.parametrize(
    ("message", "changes", "complaint"),
    [
        (PLAN, {"version": 0}, "tap plan: version is 0"),
        (PLAN, {"labels": ["a", "a"]}, "labels repeat"),
        (PLAN, {"labels": [""]}, "every label"),
        (PLAN, {"labels": ["a"] * 4097}, "max_array_len"),
        (PLAN, {"blocks": 65}, "blocks is 65"),
        (PLAN, {"codec": "int3"}, "codec is 'int3', not one of fp16, int8, int4, int2, rot4"),
        (PLAN, {"group": 129}, "group is 129"),
        (PLAN, {"linger_seconds": float("nan")}, "linger_seconds is nan"),
        (Receipt("s", 1), {"stored_through": -1}, "stored_through is -1"),
        (Receipt("s", 1), {"stored_ahead": ["1"]}, "stored_ahead"),
        (Receipt("s", 1), {"stored_ahead": [1] * 1025}, "at most 1024"),
        (Receipt("s", 1), {"rejected": [[1]]}, "rejected"),
        (HEALTH, {"presence": "fine"}, "presence is 'fine'"),
        (HEALTH, {"at": -1}, "at is -1"),
        (HEALTH, {"backbone": {"fingerprint": "zz"}}, "fingerprint 'zz'"),
        (HEALTH, {"spool": {"spool": "s"}}, r"health\.spool: field 'produced' is missing"),
        (Command("c", "pause", 1.0), {"name": "reboot"}, "name is 'reboot'"),
        (MANIFEST, {"generation": 0}, "generation is 0"),
        (MANIFEST, {"metrics": {"accuracy": "high"}}, "metrics"),
        (MANIFEST, {"ladder": {"name": "l", "sha256": "0F" * 32, "size": 1, "part_bytes": 1024}}, "sha256"),
        (SignedManifest(b"m", bytes(64)), {"signature": bytes(63)}, "63 bytes, not 64"),
    ],
)
def test_what_is_wrong_is_named(message: Any, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(FrameError, match=complaint):
        type(message).from_bytes(msgpack.packb({**msgpack.unpackb(message.to_bytes()), **changes}))


@pytest.mark.parametrize(
    ("depth", "layers", "taps"),
    [
        (6, (2, 4, 6), (2, 4, 6)),
        (4, (2, 3, 4), (2, 3, 4)),
        (3, (1, 2, 3), (1, 2, 3)),
        (2, (1, 2, 2), (1, 2)),
        (1, (1, 1, 1), (1,)),
        (12, (4, 8, 12), (4, 8, 12)),
    ],
)
def test_which_layers_stand_for_the_blocks(depth: int, layers: tuple[int, ...], taps: tuple[int, ...]) -> None:
    assert PLAN.layers(depth) == layers
    assert PLAN.taps(depth) == taps


def test_the_last_will_says_lost_in_the_same_session() -> None:
    will = HEALTH.as_last_will()
    assert (will.presence, will.session) == ("lost", HEALTH.session)
    assert will.spool is None


def test_parts_of_a_blob_cover_it() -> None:
    assert Blob("b", "0f" * 32, 65_536, 65_536).parts == 1
    assert Blob("b", "0f" * 32, 65_537, 65_536).parts == 2


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ({"network": -1.0}, "first_steps: network is -1.0"),
        ({"network": 1e13}, "first_steps: network is"),
        ({"network": float("nan")}, "first_steps: network is nan"),
        ({"network": "soon"}, "first_steps: network is 'soon'"),
        ({f"step {n}": 1.0 for n in range(33)}, "33 steps, more than 32"),
        ([1, 2], "expected a map"),
        (7, "expected a map"),
    ],
)
def test_first_steps_that_cannot_be_are_refused(steps: object, words: str) -> None:
    payload = msgpack.packb({**msgpack.unpackb(HEALTH.to_bytes()), "first_steps": steps})
    with pytest.raises(FrameError, match=words):
        Health.from_bytes(payload)


def test_first_steps_of_a_newer_agent_are_left_out_and_an_older_one_has_none() -> None:
    body = msgpack.unpackb(HEALTH.to_bytes())
    newer = Health.from_bytes(msgpack.packb({**body, "first_steps": {"network": 5.0, "danced": 6.0}}))
    assert newer.first_steps == {"network": 5.0}
    del body["first_steps"]
    assert Health.from_bytes(msgpack.packb(body)).first_steps is None
