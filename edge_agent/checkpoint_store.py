"""Checkpoints on the device's disk: `checkpoints/{generation}/{manifest,ladder.safetensors,alignment.safetensors}`.

Rules: a folder appears whole or not at all (written aside, fsynced, renamed); the marker `current` moves last and
atomically; the checkpoint before the current one stays. The manifest is kept with its signature.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_agent.spool_file import sync_folder
from side_tuning.wire.bounded import FrameError
from side_tuning.wire.messages import Blob, CheckpointManifest, SignedManifest

MANIFEST = "manifest"
LADDER = "ladder.safetensors"
ALIGNMENT = "alignment.safetensors"
CURRENT = "current"
INCOMING = "incoming"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the text says why and the cure."""


@dataclass(frozen=True)
class StoredCheckpoint:
    """One checkpoint on the disk, its manifest parsed."""

    folder: Path
    manifest: CheckpointManifest

    @property
    def ladder(self) -> Path:
        return self.folder / LADDER

    @property
    def alignment(self) -> Path:
        return self.folder / ALIGNMENT


def current_checkpoint(state_directory: Path) -> StoredCheckpoint:
    """The newest one that the agent fetched.

    Raises:
        CheckpointError: none yet, or its files are damaged.

    """
    checkpoint = CheckpointStore(state_directory).current()
    if checkpoint is None:
        raise CheckpointError(
            f"there is no checkpoint in {state_directory} yet; leave the agent running until the coordinator publishes one"
        )
    return checkpoint


class CheckpointStore:
    """The folder `checkpoints` below the agent's state directory. One writer (the agent), any number of readers."""

    def __init__(self, state_directory: Path) -> None:
        self.folder = state_directory / "checkpoints"

    def generation(self) -> int:
        """Of the current checkpoint; 0 if there is none."""
        try:
            text = (self.folder / CURRENT).read_text(encoding="ascii").strip()
        except (FileNotFoundError, UnicodeDecodeError):
            return 0
        return int(text) if text.isdigit() else 0

    def current(self) -> StoredCheckpoint | None:
        """The checkpoint in use, its files checked against their hashes; None before the first.

        Raises:
            CheckpointError: its files are damaged.

        """
        generation = self.generation()
        return load_checkpoint(self.folder / str(generation)) if generation else None

    # Parts on their way.

    def parts_folder(self, blob: Blob) -> Path:
        return self.folder / INCOMING / blob.sha256

    def missing_parts(self, blob: Blob) -> list[int]:
        folder = self.parts_folder(blob)
        return [n for n in range(blob.parts) if not _has_size(folder / str(n), part_size(blob, n))]

    def keep_part(self, blob: Blob, index: int, payload: bytes) -> None:
        folder = self.parts_folder(blob)
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / str(index), payload)

    def assemble(self, blob: Blob) -> bytes:
        """All parts joined and checked; parts that do not make up the blob are removed, so that they are fetched again."""
        folder = self.parts_folder(blob)
        content = b"".join((folder / str(n)).read_bytes() for n in range(blob.parts))
        try:
            check_blob(content, blob)
        except CheckpointError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return content

    def already_have(self, blob: Blob) -> bytes | None:
        """The blob's bytes out of the current checkpoint, if it is the same file (a ladder may outlive an alignment)."""
        folder = self.folder / str(self.generation())
        for name in (LADDER, ALIGNMENT):
            try:
                content = (folder / name).read_bytes()
                check_blob(content, blob)
            except (OSError, CheckpointError):
                continue
            return content
        return None

    # Installing.

    def stage(self, signed: bytes, manifest: CheckpointManifest, ladder: bytes, alignment: bytes) -> Path:
        """Write a checkpoint aside, complete and durable; `activate` puts it in use."""
        staged = self.folder / f".{manifest.generation}.new"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        for name, content in ((LADDER, ladder), (ALIGNMENT, alignment), (MANIFEST, signed)):
            write_file(staged / name, content)
        sync_folder(staged)
        return staged

    def activate(self, staged: Path, generation: int) -> Path:
        """Swap the staged checkpoint in; the previous one stays for a reader that has it open, and for a look back."""
        previous = self.generation()
        folder = self.folder / str(generation)
        shutil.rmtree(folder, ignore_errors=True)  # left by a crash between rename and marker
        staged.rename(folder)
        write_file(self.folder / CURRENT, f"{generation}\n".encode())
        sync_folder(self.folder)
        for old in self.folder.iterdir():
            if old.name not in (str(generation), str(previous), CURRENT):
                shutil.rmtree(old, ignore_errors=True)
        return folder

    def drop_parts_except(self, blobs: Sequence[Blob]) -> None:
        """Remove what was fetched for a checkpoint that has been superseded."""
        wanted = {blob.sha256 for blob in blobs}
        incoming = self.folder / INCOMING
        for folder in incoming.iterdir() if incoming.is_dir() else ():
            if folder.name not in wanted:
                shutil.rmtree(folder, ignore_errors=True)


def load_checkpoint(folder: Path) -> StoredCheckpoint:
    """Read one checkpoint's folder and check its files against the manifest."""
    try:
        manifest = CheckpointManifest.from_bytes(SignedManifest.from_bytes((folder / MANIFEST).read_bytes()).manifest)
        for blob, name in ((manifest.ladder, LADDER), (manifest.alignment, ALIGNMENT)):
            check_blob((folder / name).read_bytes(), blob)
    except (OSError, FrameError, CheckpointError) as error:
        raise CheckpointError(
            f"checkpoint {folder} is damaged: {error}; remove the folder {folder.parent} and let the agent fetch it again"
        ) from error
    return StoredCheckpoint(folder, manifest)


def part_size(blob: Blob, index: int) -> int:
    return min(blob.part_bytes, blob.size - index * blob.part_bytes)


def check_blob(content: bytes, blob: Blob) -> None:
    if len(content) != blob.size:
        raise CheckpointError(f"{blob.name} has {len(content)} bytes, its manifest says {blob.size}")
    found = hashlib.sha256(content).hexdigest()
    if found != blob.sha256:
        raise CheckpointError(f"{blob.name} has the hash {found[:16]}…, its manifest says {blob.sha256[:16]}…")


def write_file(path: Path, content: bytes) -> None:
    """Write aside, fsync, rename: readers never see half a file."""
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False
