"""A backbone on its way, on the device's disk: `{place}.incoming/`, where only right parts count, until it becomes `place`.

Rules: what is there is found again by hashing it, so no crash can leave a mark that lies; nothing is written outside the folder,
whatever the network says; the backbone appears in its place whole, by a rename, or not at all.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from edge_agent.spool_file import sync_folder
from side_tuning.backbone_manifest import (
    FINGERPRINTED,
    MANIFEST,
    BackboneError,
    BackboneManifest,
    fingerprint_of,
)
from side_tuning.wire.backbone_messages import BackboneListing, Part, digest_of
from side_tuning.wire.bounded import FrameError

LISTING = "listing"


class IncomingBackbone:
    """The folder that one backbone is fetched into. One writer, the agent."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.folder = place.with_name(f"{place.name}.incoming")
        self._listing: BackboneListing | None = None
        self._parts: list[Part] = []
        self._missing: dict[int, None] = {}  # in order

    @property
    def missing(self) -> list[int]:
        return list(self._missing)

    @property
    def parts(self) -> list[Part]:
        return self._parts

    def begin(self, listing: BackboneListing, payload: bytes) -> None:
        """Make the files, and see which parts are there from before.

        Raises:
            BackboneError: a file that no backbone has, or a format that this program cannot use.
            OSError: the disk.

        """
        if sorted(name for name, _ in listing.files) != sorted(FINGERPRINTED):
            raise BackboneError(f"backbone {listing.fingerprint} consists of other files than {', '.join(FINGERPRINTED)}; update this program")
        if BackboneManifest.from_json(listing.manifest, MANIFEST).fingerprint != listing.fingerprint:
            raise BackboneError(f"the manifest of backbone {listing.fingerprint} is another's; register it again on the coordinator")
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            self.folder.unlink()
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / LISTING).write_bytes(payload)  # for `edge-agent doctor`
        for name, size in listing.files:
            handle = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                os.ftruncate(handle, size)
            finally:
                os.close(handle)
        self._listing, self._parts = listing, listing.parts()
        self._missing = dict.fromkeys(n for n, here in enumerate(self._look()) if not here)

    def keep(self, index: int, payload: bytes) -> bool:
        """Write a part; False if its bytes are not the ones that the listing vouches for."""
        assert self._listing is not None, "a listing comes first"
        part = self._parts[index]
        if len(payload) != part.size or digest_of(payload) != self._listing.digest(index):
            return False
        with (self.folder / part.file).open("r+b") as file:
            file.seek(part.offset)
            file.write(payload)
        self._missing.pop(index, None)
        return True

    def missing_bytes(self) -> int:
        return sum(self._parts[n].size for n in self._missing)

    def install(self) -> None:
        """Put the whole backbone in its place.

        Raises:
            BackboneError: the files are not what their fingerprint says; they are removed.
            OSError: the disk.

        """
        listing = self._listing
        assert listing is not None, "a listing comes first"
        assert not self._missing, "every part comes first"
        for name, _ in listing.files:
            _sync_file(self.folder / name)
        found = fingerprint_of(self.folder)
        if found != listing.fingerprint:
            self.discard()
            raise BackboneError(f"backbone {listing.fingerprint} was fetched, but its files hash to {found}; register it again on the coordinator")
        (self.folder / LISTING).unlink()
        (self.folder / MANIFEST).write_text(listing.manifest, encoding="utf-8")
        _sync_file(self.folder / MANIFEST)
        sync_folder(self.folder)
        shutil.rmtree(self.place, ignore_errors=True)  # damaged, or one that cannot be loaded
        self.folder.rename(self.place)
        sync_folder(self.place.parent)

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._listing, self._parts, self._missing = None, [], {}

    def progress(self) -> tuple[int, int] | None:
        """Parts that are there, and in all; None if nothing was begun. Reads what is there."""
        try:
            self._listing = BackboneListing.from_bytes((self.folder / LISTING).read_bytes())
        except (OSError, FrameError):
            return None
        self._parts = self._listing.parts()
        here = self._look()
        return sum(here), len(here)

    def _look(self) -> list[bool]:
        assert self._listing is not None, "a listing comes first"
        found = []
        for part in self._parts:
            try:
                with (self.folder / part.file).open("rb") as file:
                    file.seek(part.offset)
                    found.append(digest_of(file.read(part.size)) == self._listing.digest(part.index))
            except OSError:
                found.append(False)
        return found


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
