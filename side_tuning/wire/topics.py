"""Every MQTT topic and filter, as inverse functions. The only place where topic strings exist.

A topic always has five segments: `mobillm/v1/{device | fleet}/{up | down}/{channel}`. A channel may carry
arguments after dots (`checkpoint-part.4f1c….3`), so retained parts are topics of their own and the access
rules stay five segments wide.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from side_tuning.wire.bounded import FrameError

ROOT = "mobillm/v1"
FLEET = "fleet"
# Names of certificates that are no device's: a device must not pass for one of them. Claims' names begin with CLAIM_PREFIX.
RESERVED_NAMES = frozenset({FLEET, "broker", "coordinator", "dashboard", "doctor", "enrolment", "gateway", "trainer"})
CLAIM_PREFIX = "claim-"

Direction = Literal["up", "down"]

# Names become topic segments and certificate names; MQTT's own characters must never get in.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_CLAIM = re.compile(CLAIM_PREFIX + r"[0-9a-f]{16,40}")
_CHANNEL = re.compile(r"[a-z][a-z-]{0,31}(\.[A-Za-z0-9_-]{1,64}){0,3}")


@dataclass(frozen=True)
class Topic:
    """A parsed topic: whose it is, which way it goes, and the channel with its dotted arguments."""

    owner: str
    direction: Direction
    channel: str
    arguments: tuple[str, ...] = ()

    def __str__(self) -> str:
        channel = ".".join((self.channel, *self.arguments))
        return f"{ROOT}/{self.owner}/{self.direction}/{channel}"


def check_device_name(name: str) -> str:
    """Return `name` if it can name a device, else raise `FrameError`."""
    if not _NAME.fullmatch(name):
        raise FrameError(
            f"device name {name[:200]!r} is not allowed: use 1 to 64 letters, digits, '_', '.', '-', starting with a letter or digit"
        )
    if name.lower() in RESERVED_NAMES or name.lower().startswith(CLAIM_PREFIX):
        raise FrameError(
            f"device name {name!r} is not allowed: {', '.join(sorted(RESERVED_NAMES))} and names that begin with "
            f"'{CLAIM_PREFIX}' are reserved; choose another"
        )
    return name


def check_claim_name(name: str) -> str:
    """Return `name` if it can name a claim (CLAIM_PREFIX and 16 to 40 hexadecimal digits), else raise `FrameError`."""
    if not _CLAIM.fullmatch(name):
        raise FrameError(f"claim {name[:200]!r} is not '{CLAIM_PREFIX}' with 16 to 40 hexadecimal digits")
    return name


def parse_topic(topic: str) -> Topic:
    """Inverse of `str(Topic(...))`; raises `FrameError` for any other topic."""
    segments = topic.split("/")
    if len(segments) != 5 or "/".join(segments[:2]) != ROOT:
        raise FrameError(f"topic {topic[:200]!r} is not of the form {ROOT}/NAME/up|down/CHANNEL")
    owner, direction, channel = segments[2:]
    if owner.startswith(CLAIM_PREFIX):
        check_claim_name(owner)
    elif owner != FLEET:
        check_device_name(owner)
    if direction not in ("up", "down"):
        raise FrameError(f"topic {topic[:200]!r} goes neither up nor down")
    if not _CHANNEL.fullmatch(channel):
        raise FrameError(f"topic {topic[:200]!r} has no valid channel")
    name, *arguments = channel.split(".")
    return Topic(owner, "up" if direction == "up" else "down", name, tuple(arguments))


# From a device to the coordinator.


def activations(device: str) -> str:
    """Frames."""
    return str(Topic(check_device_name(device), "up", "activations"))


def health(device: str) -> str:
    """Retained health message; the last will writes here too."""
    return str(Topic(check_device_name(device), "up", "health"))


def probe(device: str) -> str:
    """Where a device publishes to itself to time the way to the broker; nobody listens, nothing is retained."""
    return str(Topic(check_device_name(device), "up", "probe"))


def doctor_probe() -> str:
    """The same for `coordinator doctor`."""
    return str(Topic("doctor", "up", "probe"))


def certificate_request(name: str) -> str:
    """Where a claim's holder asks for its first certificate, and a device for its next; `name` is the claim's or the device's."""
    return str(Topic(_claim_or_device(name), "up", "certificate-request"))


def backbone_request(device: str) -> str:
    """Where a device without a backbone asks for parts of one; not retained, it repeats what is not answered."""
    return str(Topic(check_device_name(device), "up", "backbone-request"))


# From the coordinator to one device.


def certificate_answer(name: str) -> str:
    """The answer to a certificate request; not retained, the asker repeats its request until it is answered."""
    return str(Topic(_claim_or_device(name), "down", "certificate"))


def receipt(device: str) -> str:
    """Retained cumulative receipt."""
    return str(Topic(check_device_name(device), "down", "receipt"))


def command(device: str) -> str:
    return str(Topic(check_device_name(device), "down", "command"))


def device_plan(device: str) -> str:
    """Retained tap plan for one device; goes before the fleet's."""
    return str(Topic(check_device_name(device), "down", "plan"))


def device_backbone(device: str) -> str:
    """Retained signed offer of the backbone that one device is to run; goes before the fleet's."""
    return str(Topic(check_device_name(device), "down", "backbone"))


# From the coordinator to the fleet.


def fleet_plan() -> str:
    """Retained tap plan for every device that has none of its own."""
    return str(Topic(FLEET, "down", "plan"))


def checkpoint(fingerprint: str) -> str:
    """Retained signed manifest of the newest checkpoint for one backbone."""
    return str(Topic(FLEET, "down", "checkpoint", (fingerprint,)))


def checkpoint_part(blob_sha256: str, index: int) -> str:
    """Retained part `index` of the blob with this hash; devices subscribe to just the parts they miss."""
    return str(Topic(FLEET, "down", "checkpoint-part", (blob_sha256[:32], str(index))))


def fleet_backbone() -> str:
    """Retained signed offer for every device that has none of its own."""
    return str(Topic(FLEET, "down", "backbone"))


def backbone_listing(fingerprint: str) -> str:
    """Retained list of a backbone's files and parts; the offer holds its hash."""
    return str(Topic(FLEET, "down", "backbone-listing", (fingerprint,)))


def backbone_part(fingerprint: str, index: int) -> str:
    """Part `index`, published when somebody asks, never retained: all who wait for it at that moment get it at once."""
    return str(Topic(FLEET, "down", "backbone-part", (fingerprint, str(index))))


def _claim_or_device(name: str) -> str:
    return check_claim_name(name) if name.startswith(CLAIM_PREFIX) else check_device_name(name)


# Filters for the coordinator.


def all_devices_up(channel: str) -> str:
    return f"{ROOT}/+/up/{channel}"
