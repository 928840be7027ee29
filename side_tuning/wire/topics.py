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

Direction = Literal["up", "down"]

# Names become topic segments and certificate names; MQTT's own characters must never get in.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
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
    if name == FLEET or not _NAME.fullmatch(name):
        raise FrameError(
            f"device name {name!r} is not allowed: use 1 to 64 letters, digits, '_', '.', '-', "
            f"starting with a letter or digit, and not '{FLEET}'"
        )
    return name


def parse_topic(topic: str) -> Topic:
    """Inverse of `str(Topic(...))`; raises `FrameError` for any other topic."""
    segments = topic.split("/")
    if len(segments) != 5 or "/".join(segments[:2]) != ROOT:
        raise FrameError(f"topic {topic[:200]!r} is not of the form {ROOT}/NAME/up|down/CHANNEL")
    owner, direction, channel = segments[2:]
    if owner != FLEET:
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


# From the coordinator to one device.


def receipt(device: str) -> str:
    """Retained cumulative receipt."""
    return str(Topic(check_device_name(device), "down", "receipt"))


def command(device: str) -> str:
    return str(Topic(check_device_name(device), "down", "command"))


def device_plan(device: str) -> str:
    """Retained tap plan for one device; goes before the fleet's."""
    return str(Topic(check_device_name(device), "down", "plan"))


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


# Filters for the coordinator.


def all_devices_up(channel: str) -> str:
    return f"{ROOT}/+/up/{channel}"
