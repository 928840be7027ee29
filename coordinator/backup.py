"""`coordinator backup`: everything that a coordinator needs to go on elsewhere, in one tar, while its programs run.

In it: a copy of the database as of one moment, what lies in data_directory (checkpoints, backbones, the programs'
identities), the key that signs checkpoints, the authorities, the broker's files, the settings file, and last a manifest
with the sha256 of each. Not in it: the tap cache (the trainer makes it anew from the frames), locks, and files outside these folders,
such as a password_file. The hashes tell damage, not forgery: whoever can write the backup can write its manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from coordinator.files import sync_folder
from coordinator.settings import CoordinatorSettings
from coordinator.store.engine import SCHEMA_REVISION, open_store, parse_url

FORMAT = 1
MANIFEST = "manifest.json"
DATABASE, DUMP = "database/coordinator.db", "database/postgresql.dump"
SETTINGS = "settings/coordinator.toml"
SPARE_BYTES = 64 * 1024 * 1024  # left free on the disk whatever happens
BEFORE_RESTORE = "before-restore-"  # folders that a restore moved aside
LEFT_OUT = ("tap-cache", "alive")  # of data_directory
_PRIVATE_FILE = 0o600


class BackupError(RuntimeError):
    """The backup cannot be made or used; the text says why and the cure. Nothing has changed."""


@dataclass(frozen=True)
class Manifest:
    """What a backup says of itself. `files` maps a member's name to its sha256, size and mode."""

    format: int
    made_at: str
    version: str
    schema: str
    with_keys: bool
    checkpoints_directory: str  # where the database's rows think that the checkpoints are
    files: dict[str, tuple[str, int, int]] = field(default_factory=dict)

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()


def folders(settings: CoordinatorSettings) -> dict[str, Path]:
    """The folders that a backup holds, by their names in it. The last two may lie within the first, or elsewhere."""
    places = {"data": settings.data_directory, "authority": settings.authority_directory, "broker": settings.broker_directory}
    return {name: place.resolve() for name, place in places.items()}


def single_files(settings: CoordinatorSettings) -> dict[str, Path]:
    """Files that a backup holds under names of their own, wherever they lie."""
    return {
        "signing/checkpoint-signing.key": settings.signing_key_file.resolve(),
        "signing/checkpoint-signing.pub": settings.public_key_file.resolve(),
    }


def create_backup(
    settings: CoordinatorSettings,
    destination: Path,
    now: datetime,
    *,
    with_keys: bool = True,
    settings_file: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Write the backup to `destination`, readable by this user alone; it appears whole or not at all.

    Raises:
        BackupError: no room, a place that makes no sense, or a file that cannot be read.
        StoreError, StoreUnavailable: the database cannot be used.

    """
    destination = destination.absolute()
    if not destination.parent.is_dir():
        raise BackupError(f"{destination.parent} is no folder; make it, or name another place")
    if destination.is_dir():
        raise BackupError(f"{destination} is a folder; name a file in it")
    for place in folders(settings).values():
        if destination.resolve().is_relative_to(place):
            raise BackupError(f"{destination} lies within {place}, which is backed up itself; name a place outside, best on another disk")
    files = _collect(settings, with_keys=with_keys, settings_file=settings_file, say=say)
    _check_room(destination.parent, 2 * _database_bytes(settings) + sum(path.stat().st_size for _, path in files if path.exists()))
    manifest = _new_manifest(settings, now, with_keys=with_keys)
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.parent) as work:
        whole = Path(work) / "whole.tar"
        database = _copy_database(settings, Path(work), say)
        with open(whole, "xb", opener=lambda name, flags: os.open(name, flags, _PRIVATE_FILE)) as out:
            with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
                _write_members(tar, manifest, [*database, *files])
            out.flush()
            os.fsync(out.fileno())
        whole.replace(destination)
    sync_folder(destination.parent)
    return manifest


def stream_backup(
    settings: CoordinatorSettings,
    out: BinaryIO,
    now: datetime,
    *,
    with_keys: bool = True,
    settings_file: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """The same into a pipe: one that breaks off lacks its manifest, and no restore takes it."""
    files = _collect(settings, with_keys=with_keys, settings_file=settings_file, say=say)
    _check_room(settings.data_directory, _database_bytes(settings))
    manifest = _new_manifest(settings, now, with_keys=with_keys)
    with tempfile.TemporaryDirectory(prefix=".backup.", dir=settings.data_directory) as work:
        database = _copy_database(settings, Path(work), say)
        with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar:
            _write_members(tar, manifest, [*database, *files])
    out.flush()
    return manifest


def _new_manifest(settings: CoordinatorSettings, now: datetime, *, with_keys: bool) -> Manifest:
    checkpoints = str(settings.checkpoints_directory.resolve())
    return Manifest(FORMAT, now.isoformat(timespec="seconds"), _version(), SCHEMA_REVISION, with_keys, checkpoints)


def _collect(
    settings: CoordinatorSettings, *, with_keys: bool, settings_file: Path | None, say: Callable[[str], None]
) -> list[tuple[str, Path]]:
    """Every file but the database, with its name in the backup."""
    open_store(settings.database_url, read_only=True).close()  # says the cure where there is none
    files = [*_files(settings, with_keys=with_keys, say=say)]
    files += [(name, path) for name, path in single_files(settings).items() if path.exists() and (with_keys or path.suffix != ".key")]
    if settings_file is not None:
        files.append((SETTINGS, settings_file))
    if with_keys and not any(name.startswith("authority/") and name.endswith(".key") for name, _ in files):
        say(f"WARNING: no authority's key is in {settings.authority_directory}: without it no device can ever be let in after a restore")
    return files


def _files(settings: CoordinatorSettings, *, with_keys: bool, say: Callable[[str], None]) -> Iterator[tuple[str, Path]]:
    url = parse_url(settings.database_url)
    database = {Path(f"{url.database}{end}").resolve() for end in ("", "-wal", "-shm", "-journal")}
    roots, apart_files = folders(settings), set(single_files(settings).values())
    for name, root in roots.items():
        apart = {*(root / leaf for leaf in LEFT_OUT), *(other for other in roots.values() if other != root)}
        for folder, subfolders, leaves in os.walk(root):
            here = Path(folder)
            linked = [leaf for leaf in subfolders if (here / leaf).is_symlink()]
            subfolders[:] = sorted(
                leaf
                for leaf in subfolders
                if leaf not in linked and not leaf.startswith((".", BEFORE_RESTORE)) and here / leaf not in apart
            )
            for leaf in sorted([*leaves, *linked]):
                path = here / leaf
                if path in database or leaf.startswith(".") or path.suffix == ".lock":
                    continue
                if path in apart_files or (path.suffix == ".key" and not with_keys):
                    continue
                if path.is_symlink() or not path.is_file():
                    say(f"WARNING: left out, since it is no plain file: {path}")
                    continue
                yield f"{name}/{path.relative_to(root).as_posix()}", path


def _database_bytes(settings: CoordinatorSettings) -> int:
    """What a copy of the database takes; a dump of PostgreSQL nobody knows beforehand."""
    url = parse_url(settings.database_url)
    if url.get_backend_name() != "sqlite":
        return 0
    return sum(path.stat().st_size for end in ("", "-wal") if (path := Path(f"{url.database}{end}")).exists())


def _check_room(folder: Path, needed: int) -> None:
    free, needed = shutil.disk_usage(folder).free, needed + SPARE_BYTES
    if free < needed:
        raise BackupError(
            f"the disk of {folder} has {free / 1e6:,.0f} MB free, the backup needs up to {needed / 1e6:,.0f} MB while it is made: "
            "free some space, or name a place on another disk"
        )


def _copy_database(settings: CoordinatorSettings, work: Path, say: Callable[[str], None]) -> list[tuple[str, Path]]:
    url = parse_url(settings.database_url)
    if url.get_backend_name() == "sqlite":
        copy = work / "coordinator.db"
        copy_sqlite(Path(str(url.database)), copy)
        return [(DATABASE, copy)]
    program = shutil.which("pg_dump")
    if program is None:
        say("WARNING: the database is not in this backup, since pg_dump is not installed: back it up with PostgreSQL's own tools")
        return []
    dump = work / "postgresql.dump"
    environment = {
        **os.environ,
        "PGHOST": url.host or "",
        "PGPORT": str(url.port or ""),
        "PGUSER": url.username or "",
        "PGPASSWORD": str(url.password or ""),  # not on the command line, where everybody could read it
        "PGDATABASE": url.database or "",
    }
    done = subprocess.run(
        [program, "--format=custom", f"--file={dump}"],
        env={name: value for name, value in environment.items() if value},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise BackupError(f"pg_dump failed: {done.stderr.strip() or done.returncode}; its version must not be older than the server's")
    return [(DUMP, dump)]


def copy_sqlite(database: Path, copy: Path) -> None:
    """A copy as of one moment, checked. The gateway goes on writing meanwhile: a reader holds up nobody in WAL mode.

    All pages in one step: after each step another process's commit would make SQLite begin anew, for ever under load.
    While it lasts, the write-ahead log cannot shrink.
    """
    descriptor = os.open(copy, os.O_CREAT | os.O_EXCL | os.O_WRONLY, _PRIVATE_FILE)
    os.close(descriptor)
    with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True, timeout=60)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target, pages=-1)
        target.execute("PRAGMA journal_mode = DELETE")  # one file, nothing beside it
        (verdict,) = target.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise BackupError(f"the database {database} is damaged ({verdict}): keep your older backups, and restore the newest good one")


class _Hashing:
    """Reads a file and remembers its sha256."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size)
        self.sha256.update(block)
        return block


def _write_members(tar: tarfile.TarFile, manifest: Manifest, files: list[tuple[str, Path]]) -> None:
    for name, path in files:
        try:
            file = path.open("rb")
        except FileNotFoundError:
            continue  # an old checkpoint that the trainer has thrown away meanwhile
        with file:
            stat = os.fstat(file.fileno())
            info = _info(name, stat.st_size, stat.st_mode & 0o777, int(stat.st_mtime))
            reader = _Hashing(file)
            try:
                tar.addfile(info, reader)
            except tarfile.TarError as error:
                raise BackupError(f"{path} changed while it was read: try again") from error
        manifest.files[name] = (reader.sha256.hexdigest(), info.size, info.mode)
    content = manifest.to_json()
    tar.addfile(_info(MANIFEST, len(content), _PRIVATE_FILE, 0), BytesIO(content))


def _info(name: str, size: int, mode: int, mtime: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, mode, mtime
    return info


def _version() -> str:
    try:
        return version("mobillm-fleet")
    except PackageNotFoundError:
        return "unknown"
