"""What the machine says of itself: heat, throttling, load, memory, disk. A reading that it does not offer is None."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from side_tuning.wire.messages import Health

SYSTEM = Path("/")
VCGENCMD_TIMEOUT_SECONDS = 2.0

# Raspberry Pi, bits of get_throttled: under-voltage, frequency capped, throttled, soft temperature limit; all "now".
# The upper bits say that it happened since the start, which would keep a device red for ever.
_THROTTLED_NOW = 0b1111


def read_readings(folder: Path, system: Path = SYSTEM) -> Health:
    """A health message with the machine's readings; who we are and what we do is the caller's to fill in.

    Args:
        folder: the disk that counts is the one of this folder.
        system: root of the file system with /sys and /proc.

    """
    return Health(
        presence="online",
        session="",
        at=0.0,
        temperature_celsius=temperature_celsius(system),
        throttled=throttled(system),
        load_1m=load_1m(),
        memory_available_bytes=memory_available_bytes(system),
        peak_rss_bytes=peak_rss_bytes(),
        disk_free_bytes=disk_free_bytes(folder),
    )


def agent_version() -> str:
    try:
        return version("mobillm-fleet")
    except PackageNotFoundError:
        return "unknown"


def temperature_celsius(system: Path = SYSTEM) -> float | None:
    """The hottest thermal zone that gives a believable value."""
    readings = (_number(zone / "temp") for zone in _thermal_zones(system))
    # Some zones give 0 or garbage (-40 °C, 126 °C of an absent sensor) while the chip sleeps.
    believable = [reading / 1000 for reading in readings if reading is not None and 1000 < reading < 125_000]
    return max(believable, default=None)


def _thermal_zones(system: Path) -> Iterable[Path]:
    try:
        return sorted((system / "sys/class/thermal").glob("thermal_zone*"))
    except OSError:
        return []


def throttled(system: Path = SYSTEM) -> bool | None:
    """Whether a Raspberry Pi runs slower right now than it could, for heat or lack of voltage."""
    bits = _firmware_bits(system)
    return None if bits is None else bool(bits & _THROTTLED_NOW)


def _firmware_bits(system: Path) -> int | None:
    platform = system / "sys/devices/platform"
    for path in (platform / "soc/soc:firmware/get_throttled", platform / "axi/soc:firmware/get_throttled"):
        text = _text(path)
        if text is not None:
            return _hexadecimal(text)
    program = shutil.which("vcgencmd") if system == SYSTEM else None
    if program is None:
        return None
    try:
        answer = subprocess.run([program, "get_throttled"], capture_output=True, text=True, timeout=VCGENCMD_TIMEOUT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # not this user's to ask, or no firmware behind it
    return _hexadecimal(answer.stdout.strip().removeprefix("throttled=").removeprefix("0x"))


def load_1m() -> float | None:
    try:
        return os.getloadavg()[0]
    except OSError:
        return None


def memory_available_bytes(system: Path = SYSTEM) -> int | None:
    """What can be had without swapping, as the kernel estimates it."""
    for line in (_text(system / "proc/meminfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable" and value.split()[:1] and value.split()[0].isdigit():
            return int(value.split()[0]) * 1024
    return None


def peak_rss_bytes(system: Path = SYSTEM) -> int:
    """The most memory that this program ever held."""
    # On Linux not from getrusage: that begins with the size of the process which started this one.
    for line in (_text(system / "proc/self/status") or "").splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM" and value.split()[:1] and value.split()[0].isdigit():
            return int(value.split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes, except on a Mac


def disk_free_bytes(folder: Path) -> int | None:
    """Free for this user on the disk that holds `folder`, or that will when it is made."""
    for place in (folder, *folder.parents):
        try:
            return shutil.disk_usage(place).free
        except FileNotFoundError:
            continue
        except OSError:
            return None
    return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None


def _number(path: Path) -> int | None:
    try:
        return int(_text(path) or "")
    except ValueError:
        return None


def _hexadecimal(text: str) -> int | None:
    try:
        return int(text, 16)
    except ValueError:
        return None
