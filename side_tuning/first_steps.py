"""A device's first steps, from its claim to its first stored sample: order, words, and which of them is overdue. Pure.

Both programs use it: the device about itself while it cannot speak yet, the coordinator about all that it heard. The one
table of limits stands here; how long a step may take is counted from the step that has to come before it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from side_tuning.wire.messages import DeviceStep

Step = DeviceStep | Literal["claimed", "asked", "approved", "seen"]  # the latter are the coordinator's to know

WORDS: dict[Step, str] = {  # in the order in which they should come
    "claimed": "claim made",
    "flashed": "card flashed",
    "booted": "booted",
    "configured": "configuration applied",
    "network": "broker reached",
    "clock": "clock right",
    "asked": "asked for approval",
    "approved": "approved",
    "enrolled": "enrolled",
    "backbone": "backbone loaded",
    "seen": "first heard from",
    "stored": "first sample stored",
}
ORDER: tuple[Step, ...] = tuple(WORDS)

MINUTE, HOUR = 60.0, 3600.0


@dataclass(frozen=True)
class Limit:
    """`step` should come within `seconds` of `after`; `hint` is where to look if not."""

    step: Step
    after: Step
    seconds: float
    hint: str


BACKBONE_HINT = (
    "is its backbone there and whole (`edge-agent doctor` checks it), or one assigned to it (`coordinator backbone list`)? "
    "While one is fetched, the device says how far it is"
)
STORED_HINT = "has it samples ([[sources]]), and is there a tap plan (`coordinator plan show`)?"

# Of several limits for one step the first counts whose `after` has come.
LIMITS = (
    # A first boot resizes the card, restarts once and joins Wi-Fi: one to three minutes on a Raspberry Pi.
    Limit("network", "booted", 5 * MINUTE, "is the cable in, are Wi-Fi name, passphrase and country right, and can the broker's host be reached from there?"),
    # A time server answers within seconds, and systemd-timesyncd asks again every half minute.
    Limit("clock", "network", 10 * MINUTE, "its clock is not set: let it reach a time server (UDP port 123), or set its date"),
    # A person; more than an hour is likely an oversight.
    Limit("approved", "asked", HOUR, "it waits for a person: `coordinator devices approve {device}`"),
    # The device asks again every half minute.
    Limit("enrolled", "approved", 10 * MINUTE, "it was approved but has not asked again: is it still on, and in reach of the claims port?"),
    # The certificate comes within seconds; the agent asks again for five minutes, then in growing pauses.
    Limit("enrolled", "network", 10 * MINUTE, "is the claims port (8884) reachable, and does `coordinator enrolment` run? `edge-agent enrol` says what is in the way"),
    # A card may travel to its board; after a day it is more likely forgotten, or the board has no power or no network.
    Limit("enrolled", "claimed", 24 * HOUR, "nothing came with its claim: is the card in the board, has the board power and network, and is the claims port (8884) reachable?"),
    # Seconds from a card; 20 MB over a link of 10 kB/s take half an hour.
    Limit("backbone", "enrolled", HOUR, BACKBONE_HINT),
    Limit("backbone", "seen", HOUR, BACKBONE_HINT),
    # The agent reports as soon as it is connected, with a backbone or while it fetches one.
    Limit("seen", "enrolled", 15 * MINUTE, "it has its certificate, but no message came: does the agent run (`systemctl status mobillm-edge-agent`), is its backbone there, is the devices' port (8883) reachable?"),
    # One frame: a sample has to come first, and its frame is closed after seconds.
    Limit("stored", "backbone", 30 * MINUTE, STORED_HINT),
    Limit("stored", "seen", 30 * MINUTE, STORED_HINT),
)


@dataclass(frozen=True)
class Overdue:
    """A step that did not come in time."""

    step: Step
    after: Step
    limit_seconds: float
    waited_seconds: float
    hint: str

    @property
    def what(self) -> str:
        within = f" within {in_words(self.limit_seconds)}" if self.limit_seconds else ""
        return f"“{WORDS[self.step]}” did not come{within} after “{WORDS[self.after]}”"

    @property
    def words(self) -> str:
        return f"{self.what}: {self.hint}"


def overdue(times: Mapping[Step, float | None], expected: Collection[Step], now: float, device: str) -> list[Overdue]:
    """Which of the `expected` steps are late.

    Args:
        times: when each step came, in seconds; None: it came, nobody knows when.
        expected: what should come, or has.
        now: on the same clock as `times`.
        device: for the hints.

    """
    found = []
    for step in ORDER:
        if step not in expected or step in times:
            continue
        limit = next((limit for limit in LIMITS if limit.step == step and limit.after in times), None)
        begun = None if limit is None else times[limit.after]
        if limit is not None and begun is not None and now - begun > limit.seconds:
            found.append(Overdue(step, limit.after, limit.seconds, now - begun, limit.hint.format(device=device)))
    return found


def in_words(seconds: float) -> str:
    """A limit for people: `10 minutes`, `1 hour`."""
    number, unit = (seconds / HOUR, "hour") if seconds >= HOUR else (seconds / MINUTE, "minute")
    return f"{number:g} {unit}{'' if number == 1 else 's'}"
