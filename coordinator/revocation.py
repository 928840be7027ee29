"""Keeps the broker's two revocation lists as the store says: devices' certificates, and claims."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509

from coordinator.authority import Authority
from coordinator.files import write_atomically
from coordinator.identities import PUBLIC_FILE, REVOCATION_LIST_DAYS

logger = logging.getLogger(__name__)

# A broker lets nobody in with a list past its date, so it is good for long and renewed early: the fleet goes on for
# most of a year without this program. What counts is that the list is rewritten within a second of a revocation.
RENEW_BEFORE = timedelta(days=REVOCATION_LIST_DAYS - 30)


@dataclass
class RevocationList:
    """One list: its file, the authority that signs it, and what the file was seen to hold."""

    path: Path
    authority: Authority
    _looked: tuple[int, int, int] | None = field(default=None, init=False)  # of the file when it was last read
    _held: dict[str, datetime] = field(default_factory=dict, init=False)
    _valid: tuple[datetime, datetime] | None = field(default=None, init=False)  # None: there is no list, or no good one

    def held(self) -> Mapping[str, datetime]:
        """What the file lists: serial (hexadecimal) and since when; nothing where it is no list of our authority."""
        self._look()
        return self._held

    def follow(self, revoked: Sequence[tuple[str, datetime]], now: datetime) -> bool:
        """Write the file anew if it does not list just `revoked` (serial, when), ends too soon or has not begun. True if written."""
        self._look()
        same = self._held.keys() == {serial for serial, _ in revoked}
        # One that a clock ahead of its time has made lets nobody in either.
        if same and self._valid is not None and self._valid[0] <= now < self._valid[1] - RENEW_BEFORE:
            return False
        write_atomically(self.path, self.authority.revocation_list(revoked, now=now, days=REVOCATION_LIST_DAYS), PUBLIC_FILE)
        logger.info("%s lists %d certificates", self.path, len(revoked))
        return True

    def _look(self) -> None:
        """Read the file if it is another one than last time: `coordinator init` or a restored backup may have written it."""
        try:
            stat = self.path.stat()
            looked = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if looked == self._looked:
                return
            self._looked, self._held, self._valid = looked, {}, None
            found = x509.load_pem_x509_crl(self.path.read_bytes())
            if not found.is_signature_valid(self.authority.key.public_key()):
                return
        except FileNotFoundError:
            self._looked, self._held, self._valid = None, {}, None
        except (ValueError, TypeError) as error:
            logger.warning("%s is no revocation list, it is written anew: %s", self.path, error)
        else:
            self._held = {f"{row.serial_number:x}": row.revocation_date_utc for row in found}
            if found.next_update_utc is not None:
                self._valid = found.last_update_utc, found.next_update_utc
