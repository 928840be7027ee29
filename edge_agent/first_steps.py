"""The device's own first steps: noted once, kept through restarts, dated once the clock is right, told in health messages.

A board without a clock starts in 1970, so a step is kept as seconds into its boot, and gets its date when the clock is
trusted; what came in an earlier boot that never had a clock stays without. What was before the agent's first start
stands in what flash/first-boot.sh left. A device that was in use before this was kept tells nothing of its first boot.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

from edge_agent.checkpoint_store import write_file
from side_tuning.wire.messages import DeviceStep

logger = logging.getLogger(__name__)

FILE = "first-steps.json"
FLASHED = "flashed.json"  # the card's manifest, copied by first-boot.sh
APPLIED = "first-boot"  # by first-boot.sh: the boot's id, and seconds into it
MAX_BYTES = 65_536
MOVED_SECONDS = 60.0  # a date that is off by less is not written anew


def this_boot() -> str:
    """The same for all programs until the next boot; where the system does not tell, every process is a boot of its own."""
    return _text(Path("/proc/sys/kernel/random/boot_id")) or uuid.uuid4().hex


def seconds_since_boot() -> float:
    """No setting of the date changes it; it counts sleep where the system can."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Noted(NamedTuple):
    """When a step was. `at`: seconds since 1970, None until the clock of that boot was right."""

    boot: str
    seconds: float
    at: float | None = None


class FirstSteps:
    """The steps of the device whose state folder this is. Thread-safe; making one writes nothing."""

    def __init__(
        self,
        state_directory: Path,
        *,
        now: Callable[[], float] = time.time,
        boot: str | None = None,
        uptime: Callable[[], float] = seconds_since_boot,
    ) -> None:
        self._path = state_directory / FILE
        self._now = now
        self._uptime = uptime
        self._boot = boot or this_boot()
        self._lock = threading.Lock()
        self._told: tuple[object, ...] = ()
        self._failed = False
        found = _parse(_text(self._path))
        self._kept = found is not None or not (state_directory / "spool.db").exists()
        self._unsaved = found is None
        self._steps = found or {}
        self._flashed_at = _flashed_at(_text(state_directory / FLASHED)) if self._kept else None
        applied = _applied(_text(state_directory / APPLIED)) if self._kept else None
        if applied is not None and "configured" not in self._steps:
            self._steps["configured"], self._unsaved = applied, True
        if "booted" not in self._steps and (applied is not None or self._flashed_at is not None):
            self._steps["booted"], self._unsaved = Noted(self._boot if applied is None else applied.boot, 0.0), True

    def note(self, *steps: DeviceStep) -> bool:
        """These have come, now if they had not before; whether one is new."""
        with self._lock:
            new = [step for step in steps if self._kept and step not in self._steps]
            self._steps |= {step: Noted(self._boot, self._uptime()) for step in new}
            self._unsaved |= bool(new)
            return bool(new)

    def settle(self, *, clock_right: bool) -> None:
        """Date what came in this boot, if the system's clock can be believed now, and write down what is new."""
        with self._lock:
            for step, noted in self._steps.items() if clock_right else ():
                if noted.boot == self._boot and (noted.at is None or abs(self._present(noted) - noted.at) > MOVED_SECONDS):
                    self._steps[step] = noted._replace(at=self._present(noted))
                    self._unsaved = True
            if self._unsaved and self._kept:
                self._save()

    def times(self) -> dict[DeviceStep, float | None] | None:
        """When each step was, by the system's clock as it is now; None: nothing is known of this device's first boot."""
        with self._lock:
            return self._times() if self._kept else None

    def news(self, session: str) -> dict[DeviceStep, float | None] | None:
        """What the report that goes out now should say: everything, on a new connection or after a change, or nothing."""
        with self._lock:
            told = (session, *((step, noted.at) for step, noted in self._steps.items()))
            if not self._kept or told == self._told:
                return None
            self._told = told
            return self._times()

    def _times(self) -> dict[DeviceStep, float | None]:
        steps = {step: self._present(noted) if noted.boot == self._boot else noted.at for step, noted in self._steps.items()}
        return steps if self._flashed_at is None else {"flashed": self._flashed_at, **steps}

    def _present(self, noted: Noted) -> float:
        return max(0.0, self._now() - (self._uptime() - noted.seconds))

    def _save(self) -> None:
        content = {"format": "mobillm-fleet first steps 1", "steps": {step: list(noted) for step, noted in self._steps.items()}}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self._path, json.dumps(content, indent=1).encode() + b"\n")
        except OSError as error:  # no reason to end; the next round tries again
            logger.log(logging.DEBUG if self._failed else logging.WARNING, "%s cannot be written: %s", self._path, error.strerror)
            self._failed = True
            return
        self._unsaved = self._failed = False


def _text(path: Path) -> str | None:
    """What stands in a small file; None if it cannot be read or is no small file."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        return content.decode().strip() if len(content) <= MAX_BYTES else None
    except (OSError, UnicodeDecodeError):
        return None


def _parse(text: str | None) -> dict[DeviceStep, Noted] | None:
    """None where there is no such file, or it is damaged."""
    try:
        steps = json.loads(text or "")["steps"]
        return {step: _noted(*steps[step]) for step in get_args(DeviceStep) if step in steps}
    except (ValueError, TypeError, KeyError):
        return None


def _noted(boot: Any, seconds: Any, at: Any) -> Noted:
    return Noted(str(boot), float(seconds), None if at is None else float(at))


def _flashed_at(text: str | None) -> float | None:
    try:
        at = float(json.loads(text or "")["flashed_at"])
    except (ValueError, TypeError, KeyError):
        return None
    return at if 0 <= at < 1e12 else None


def _applied(text: str | None) -> Noted | None:
    try:
        boot, seconds = (text or "").split()
        return Noted(boot, float(seconds))
    except ValueError:
        return None
