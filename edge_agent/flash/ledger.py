"""What became of each card of a batch: a file of JSON lines that only grows, held by one program at a time.

A card counts as made when its "made" line is on the disk.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from edge_agent.flash.errors import FlashError

_LOCKED_BYTE = 1 << 20  # beyond the words in the file, which others read: Windows lets nobody read what is locked
_MAX_WORDS = 1000


class Ledger:
    """What became of each card, on the disk as soon as it is so."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries = list(self._read())

    def _read(self) -> Iterator[dict[str, object]]:
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the power went while it was written; that card is not made
            if isinstance(entry, dict) and "step" in entry and "device" in entry:
                yield entry

    def note(self, step: str, device: str, **more: object) -> None:
        entry = {"step": step, "device": device, "at": datetime.now(timezone.utc).isoformat(timespec="seconds"), **more}
        self._entries.append(entry)
        with self.path.open("ab") as file:
            if file.tell() and not self.path.read_bytes().endswith(b"\n"):
                file.write(b"\n")  # after a line that the power cut short
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def made(self, device: str, claim: str) -> bool:
        return any(entry["step"] == "made" and entry["device"] == device and entry.get("claim") == claim for entry in self._entries)

    def claim_of(self, device: str) -> str | None:
        """On the device's newest finished card."""
        return next((str(entry.get("claim")) for entry in reversed(self._entries) if entry["step"] == "made" and entry["device"] == device), None)

    def device_of(self, claim: str) -> str | None:
        """On whose finished card a claim is."""
        return next((str(entry["device"]) for entry in self._entries if entry["step"] == "made" and entry.get("claim") == claim), None)

    def left_unfinished(self, device: str, target: Path) -> bool:
        """Whether what `target` holds is a card that this batch began for the device and did not finish."""
        steps = [entry["step"] for entry in self._entries if entry["device"] == device and entry.get("target") == str(target)]
        return bool(steps) and steps[-1] != "made"


@contextmanager
def hold(ledger: Path) -> Iterator[Ledger]:
    """The ledger for this program alone.

    Raises:
        FlashError: another program holds it, or it cannot be written.

    """
    lock = ledger.with_name(f"{ledger.name}.lock")
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
    except OSError as error:
        raise FlashError(f"{lock} cannot be written ({error.strerror}): the ledger must be beside the fleet file; copy that to a folder of yours") from error
    with os.fdopen(descriptor, "r+b") as file:
        try:
            _lock(file.fileno())
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                raise FlashError(f"{lock} cannot be locked ({error.strerror}); put the fleet file on a disk of this machine") from error
            who = file.read(_MAX_WORDS).decode("utf-8", "replace") or "just started"
            raise FlashError(f"another `edge-agent flash` ({who}) makes cards with {ledger}; wait for its end, or end it") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()} since {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC".encode())
        file.flush()
        yield Ledger(ledger)


def _lock(descriptor: int) -> None:
    """Until the file is closed or the process ends, whichever way it ends."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
