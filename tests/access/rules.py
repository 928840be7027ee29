"""Who may read and write what, written down a second time, as sets of topics, to compare the shipped rules with."""

from side_tuning.broker_settings import BrokerSettings
from side_tuning.wire import topics
from tests.tls_broker import TlsBroker

CLAIM, OTHER_CLAIM = "claim-00112233445566778899", "claim-aabbccddeeff00112233"
OWNERS = ("kitchen", "garage", "gateway", "enrolment", "doctor", CLAIM, OTHER_CLAIM, topics.FLEET)
UP = ("activations", "health", "certificate-request", "backbone-request", "probe")
DOWN = (
    "receipt", "command", "plan", "certificate", "checkpoint.0f", "checkpoint-part.0f.1", "backbone", "backbone-listing.0f", "backbone-part.0f.1",
)
STRANGE = (
    "mobillm", "mobillm/v1", "mobillm/v1/kitchen", "mobillm/v1/kitchen/sideways/health", "mobillm/v1/garage/up", "mobillm/v1/garage/down",
    "mobillm/v2/garage/up/activations", "mobillm/v1//up/activations", "/mobillm/v1/garage/up/activations", "kitchen", "certificates",
    "mobillm/v1/garage/up/activations/deeper", "mobillm/v1/garage/up/anything", "mobillm/v1/fleet/down/plan/deeper", "MOBILLM/v1/garage/up/activations",
)


def t(owner: str, direction: str, *channels: str) -> set[str]:
    return {f"{topics.ROOT}/{owner}/{direction}/{channel}" for channel in channels}


EVERY_TOPIC = sorted({*STRANGE}.union(*(t(owner, "up", *UP) | t(owner, "down", *DOWN) for owner in OWNERS)))


def each(direction: str, *channels: str) -> set[str]:
    return set[str]().union(*(t(owner, direction, *channels) for owner in OWNERS))


def own(name: str) -> set[str]:
    return t(name, "up", *UP)


def below(name: str) -> set[str]:
    """What each client of the devices' port reads."""
    return t(name, "down", *DOWN) | t(topics.FLEET, "down", *DOWN) | t(name, "up", "health") | {"mobillm/v1/fleet/down/plan/deeper"}


WRITES = {
    "kitchen": own("kitchen"),
    "garage": own("garage"),
    "gateway": own("gateway") | (each("down", *DOWN) - each("down", "certificate")) | {"mobillm/v1/garage/down", "mobillm/v1/fleet/down/plan/deeper"},
    "enrolment": own("enrolment") | each("down", "certificate"),
    "doctor": own("doctor"),
    CLAIM: t(CLAIM, "up", "certificate-request"),
    OTHER_CLAIM: t(OTHER_CLAIM, "up", "certificate-request"),
}
READS = {
    "kitchen": below("kitchen"),
    "garage": below("garage") | {"mobillm/v1/garage/down"},
    # mosquitto's `deny` holds for reading too.
    # And `+` matches an empty name, under which nobody can write.
    "gateway": (below("gateway") - each("down", "certificate")) | each("up", "activations", "health", "backbone-request") | {"mobillm/v1//up/activations"},
    "enrolment": below("enrolment") | each("up", "certificate-request"),
    "doctor": below("doctor") | t("doctor", "up", "probe"),
    CLAIM: t(CLAIM, "down", "certificate"),
    OTHER_CLAIM: t(OTHER_CLAIM, "down", "certificate"),
}


def settings_of(broker: TlsBroker, name: str) -> BrokerSettings:
    """For the port that this client belongs to."""
    return broker.client(name, claims=name.startswith(topics.CLAIM_PREFIX))


def may_write(name: str) -> str:
    """Where a message proves that all before it have been dealt with."""
    return f"{topics.ROOT}/{name}/up/{'certificate-request' if name.startswith(topics.CLAIM_PREFIX) else 'probe'}"


def may_read(name: str) -> str:
    """Where a message proves that all before it have arrived."""
    return f"{topics.ROOT}/{name}/down/{'certificate' if name.startswith(topics.CLAIM_PREFIX) else 'command'}"


