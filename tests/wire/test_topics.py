"""Topics: building and parsing are inverse, and nothing else parses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from side_tuning.wire import topics
from side_tuning.wire.bounded import FrameError
from side_tuning.wire.topics import Topic, check_device_name, parse_topic

SHA256 = "4f" * 32

TABLE = [
    (topics.activations("kitchen"), "mobillm/v1/kitchen/up/activations", Topic("kitchen", "up", "activations")),
    (topics.health("a.b-c_1"), "mobillm/v1/a.b-c_1/up/health", Topic("a.b-c_1", "up", "health")),
    (topics.receipt("kitchen"), "mobillm/v1/kitchen/down/receipt", Topic("kitchen", "down", "receipt")),
    (topics.command("kitchen"), "mobillm/v1/kitchen/down/command", Topic("kitchen", "down", "command")),
    (topics.device_plan("kitchen"), "mobillm/v1/kitchen/down/plan", Topic("kitchen", "down", "plan")),
    (topics.backbone_request("kitchen"), "mobillm/v1/kitchen/up/backbone-request", Topic("kitchen", "up", "backbone-request")),
    (topics.device_backbone("kitchen"), "mobillm/v1/kitchen/down/backbone", Topic("kitchen", "down", "backbone")),
    (topics.fleet_backbone(), "mobillm/v1/fleet/down/backbone", Topic("fleet", "down", "backbone")),
    (topics.backbone_listing("ab" * 16), f"mobillm/v1/fleet/down/backbone-listing.{'ab' * 16}", Topic("fleet", "down", "backbone-listing", ("ab" * 16,))),
    (topics.backbone_part("ab" * 16, 7), f"mobillm/v1/fleet/down/backbone-part.{'ab' * 16}.7", Topic("fleet", "down", "backbone-part", ("ab" * 16, "7"))),
    (topics.fleet_plan(), "mobillm/v1/fleet/down/plan", Topic("fleet", "down", "plan")),
    (topics.checkpoint("ab" * 16), f"mobillm/v1/fleet/down/checkpoint.{'ab' * 16}", Topic("fleet", "down", "checkpoint", ("ab" * 16,))),
    (
        topics.checkpoint_part(SHA256, 3),
        f"mobillm/v1/fleet/down/checkpoint-part.{SHA256[:32]}.3",
        Topic("fleet", "down", "checkpoint-part", (SHA256[:32], "3")),
    ),
]


@pytest.mark.parametrize(("built", "text", "parsed"), TABLE)
def test_topics_and_their_inverse(built: str, text: str, parsed: Topic) -> None:
    assert built == text
    assert parse_topic(text) == parsed
    assert str(parsed) == text
    assert text.count("/") == 4


def test_filters_match_what_devices_write() -> None:
    filter_segments = topics.all_devices_up("activations").split("/")
    topic_segments = topics.activations("kitchen").split("/")
    assert [f for f, t in zip(filter_segments, topic_segments, strict=True) if f not in ("+", t)] == []


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "mobillm/v1/kitchen/up",
        "mobillm/v1/kitchen/up/activations/more",
        "mobillm/v2/kitchen/up/activations",
        "other/v1/kitchen/up/activations",
        "/mobillm/v1/kitchen/up/activations",
        "mobillm/v1//up/activations",
        "mobillm/v1/+/up/activations",
        "mobillm/v1/kit chen/up/activations",
        "mobillm/v1/kitchen\n/up/activations",
        "mobillm/v1/kitchen/sideways/activations",
        "mobillm/v1/kitchen/up/",
        "mobillm/v1/kitchen/up/#",
        "mobillm/v1/kitchen/up/Activations",
        "mobillm/v1/kitchen/up/a.",
        "mobillm/v1/kitchen/up/a.b.c.d.e",
        "mobillm/v1/kitchen/up/activations\0",
    ],
)
def test_other_topics_are_refused(topic: str) -> None:
    with pytest.raises(FrameError, match=r"topic|device name"):
        parse_topic(topic)


RESERVED = ["fleet", "Fleet", "coordinator", "enrolment", "gateway", "trainer", "dashboard", "broker", "doctor", "claim-0123456789abcdef", "Claim-x"]


@pytest.mark.parametrize("name", [*RESERVED, "", "-a", ".a", "a/b", "a+", "#", "a b", "ä", "a" * 65, "a\n"])
def test_names_that_cannot_be_a_device(name: str) -> None:
    with pytest.raises(FrameError, match=r"not allowed: (use|.* reserved)"):
        check_device_name(name)
    for build in (topics.activations, topics.health, topics.receipt, topics.command, topics.device_plan):
        with pytest.raises(FrameError):
            build(name)


@given(name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", fullmatch=True).filter(lambda name: name != "fleet"))
def test_any_allowed_name_survives(name: str) -> None:
    assert parse_topic(topics.activations(name)).owner == name


@given(text=st.text(max_size=60))
def test_any_text_parses_to_itself_or_is_refused(text: str) -> None:
    for topic in (text, f"mobillm/v1/{text}", f"mobillm/v1/kitchen/up/{text}"):
        try:
            parsed = parse_topic(topic)
        except FrameError:
            continue
        assert str(parsed) == topic


def test_certificate_topics() -> None:
    claim = "claim-0123456789abcdef"
    assert topics.certificate_request(claim) == f"mobillm/v1/{claim}/up/certificate-request"
    assert topics.certificate_answer("kitchen") == "mobillm/v1/kitchen/down/certificate"
    assert parse_topic(topics.certificate_request(claim)).owner == claim
    for name in ("claim-", "claim-xyz", "claim-0123456789abcdef/", "fleet", "#"):
        with pytest.raises(FrameError):
            topics.certificate_request(name)
