"""`coordinator restore`: puts a backup (coordinator/backup.py) in place, all of it or nothing.

Every member is checked against the manifest before anything changes. What stood there before is moved aside, never
deleted. The database is brought to this program's schema, and its checkpoints to where they lie now. The last step moves
the files into place (one by one: folders may be mount points); if the power fails just then, restore again with
--force. Owners of files are not kept, rights are.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sqlite3
import tarfile
import time
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from coordinator.backup import (
    BEFORE_RESTORE,
    DATABASE,
    DUMP,
    FORMAT,
    MANIFEST,
    SETTINGS,
    SPARE_BYTES,
    BackupError,
    Manifest,
    folders,
    single_files,
)
from coordinator.files import held
from coordinator.kept_revocations import keep_revocations
from coordinator.settings import CoordinatorSettings
from coordinator.store.engine import parse_url
from coordinator.store.schema import upgrade

STAGING = ".restoring"
_ALIVE_SECONDS = 30.0
_MANIFEST_BYTES = 64 * 1024 * 1024
_BLOCK_BYTES = 1024 * 1024
_NAMES = ("data", "authority", "broker", "signing", "database", "settings")


def restore_backup(
    settings: CoordinatorSettings,
    source: Path | BinaryIO,
    now: datetime,
    *,
    force: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Put the backup `source` (a file, or a pipe) where `settings` wants its files.

    Raises:
        BackupError: the backup is damaged or of no use here, or something stands in its way; nothing has changed.
        StoreError: the backup's database is newer than this program.

    """
    if isinstance(source, Path) and not source.is_file():
        raise BackupError(f"there is no backup {source}: correct the path")
    data = settings.data_directory
    data.mkdir(parents=True, exist_ok=True)
    _refuse_running(settings)
    in_the_way = _occupied(settings)
    if in_the_way and not force:
        raise BackupError(f"{in_the_way[0][1]} is there already: restore into an empty data_directory, or use --force, which moves it aside")
    taken = BackupError(f"a program runs with the data_directory {data}: stop every program of this coordinator first")
    staging = data / STAGING
    with held(data / "gateway.lock", taken), held(data / "enrolment.lock", taken), held(data / "trainer.lock", taken):
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(mode=0o700)
        try:
            manifest = _unpack(source, staging)
            _prepare_database(settings, staging, manifest)
            if (staging / DATABASE).exists():
                kept = keep_revocations(settings.broker_directory, staging / "broker", f"sqlite:///{staging / DATABASE}", now)
                _to_one_file(staging / DATABASE)
                if kept:
                    say(f"{kept} revocations that the broker's present lists know and the backup does not were kept")
            aside = data / f"{BEFORE_RESTORE}{now:%Y%m%d-%H%M%S}"
            _put_in_place(settings, staging, aside if in_the_way else None)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    if in_the_way:
        say(f"what was there before is in {aside}, keys in folders of that name beside their places; delete them when all is well")
    if DUMP in manifest.files:
        say(f"the database comes last: pg_restore --clean --if-exists --dbname=... {data / 'postgresql.dump'}, then `coordinator database upgrade`")
    elif DATABASE not in manifest.files:
        say("the backup holds no database: restore it with PostgreSQL's own tools, then `coordinator database upgrade`")
    say(
        f"who was shut out after {manifest.made_at} is known only where the broker's own lists still were in their place: compare "
        "with what you remember, and revoke again; frames that were receipted after it are lost, the loss ledger counts them"
    )
    return manifest


def _refuse_running(settings: CoordinatorSettings) -> None:
    for name in ("gateway", "trainer", "enrolment", "dashboard"):
        file = settings.alive_file(name)
        if file.exists() and time.time() - file.stat().st_mtime < _ALIVE_SECONDS:
            raise BackupError(f"the program {name} runs with the data_directory {settings.data_directory}: stop every program first")


def _occupied(settings: CoordinatorSettings) -> list[tuple[str, Path]]:
    """Files that stand where the backup's are to go, with the names that they would have in a backup."""
    found: dict[Path, str] = {}
    url = parse_url(settings.database_url)
    if url.get_backend_name() == "sqlite":
        database = Path(str(url.database)).resolve()
        found |= {path: f"database/{path.name}" for end in ("", "-wal", "-shm") if (path := Path(f"{database}{end}")).exists()}
    found |= {path: name for name, path in single_files(settings).items() if path.exists()}
    for name, root in folders(settings).items():
        for folder, subfolders, leaves in os.walk(root):
            here = Path(folder)
            subfolders[:] = [leaf for leaf in subfolders if not (here == root and leaf in ("alive", STAGING)) and not leaf.startswith(BEFORE_RESTORE)]
            for leaf in leaves:
                if not leaf.endswith(".lock"):
                    found.setdefault(here / leaf, f"{name}/{(here / leaf).relative_to(root)}")
    return [(name, path) for path, name in found.items()]


def _unpack(source: Path | BinaryIO, staging: Path) -> Manifest:
    """Everything of the backup under `staging`, checked."""
    label: Path | str = "the backup"
    if isinstance(source, Path):
        label = source
        free, needed = shutil.disk_usage(staging).free, source.stat().st_size + SPARE_BYTES
        if free < needed:
            raise BackupError(f"the disk of {staging.parent} has {free / 1e6:,.0f} MB free, the backup needs {needed / 1e6:,.0f} MB: free some space")
    found: dict[str, tuple[str, int, int]] = {}
    manifest: Manifest | None = None
    try:
        with tarfile.open(source, mode="r:") if isinstance(source, Path) else tarfile.open(fileobj=source, mode="r|") as tar:
            for member in tar:
                if member.name == MANIFEST:
                    manifest = _read_manifest(tar, member)
                    continue
                _check_member(member, found)
                found[member.name] = _unpack_member(tar, member, staging / member.name)
    except tarfile.TarError as error:
        raise BackupError(f"{label} is damaged, or no backup of a coordinator ({error}): use another copy of it") from error
    if manifest is None:
        raise BackupError(f"{label} is cut short: its manifest is missing; use another copy of it")
    differing = sorted(name for name in found.keys() | manifest.files.keys() if found.get(name, ())[:2] != manifest.files.get(name, ())[:2])
    if differing:
        raise BackupError(f"{label} is damaged: {differing[0]} is not what the manifest says ({len(differing)} such files); use another copy of it")
    return manifest


def _check_member(member: tarfile.TarInfo, found: dict[str, tuple[str, int, int]]) -> None:
    parts = PurePosixPath(member.name).parts
    plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
    inside = len(parts) > 1 and parts[0] in _NAMES and ".." not in parts and "\0" not in member.name and "/".join(parts) == member.name
    if not plain or not inside or member.name in found:
        raise BackupError(f"the backup holds {member.name!r:.200}, which no coordinator puts there; do not trust it")


def _unpack_member(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> tuple[str, int, int]:
    path.parent.mkdir(parents=True, exist_ok=True)
    reader = tar.extractfile(member)
    assert reader is not None, "a plain file has content"
    digest, size, mode = hashlib.sha256(), 0, member.mode & 0o777
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as out:
        while block := reader.read(_BLOCK_BYTES):
            digest.update(block)
            size += len(block)
            out.write(block)
        os.fchmod(out.fileno(), mode)
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest(), size, mode


def _read_manifest(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Manifest:
    reader = tar.extractfile(member) if member.isreg() and member.size <= _MANIFEST_BYTES else None
    if reader is None:
        raise BackupError("the backup's manifest is no plain file of a sensible size; do not trust it")
    try:
        content = json.loads(reader.read())
        if content["format"] != FORMAT:
            raise BackupError(f"the backup has format {content['format']!r:.20}, this program reads {FORMAT}: install the version that made it")
        files = {str(name): (str(sha256), int(size), int(mode)) for name, (sha256, size, mode) in content["files"].items()}
        made_at, made_by, schema, checkpoints = (str(content[name]) for name in ("made_at", "version", "schema", "checkpoints_directory"))
        return Manifest(FORMAT, made_at, made_by, schema, bool(content["with_keys"]), checkpoints, files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BackupError(f"the backup's manifest cannot be read ({error}): use another copy of it") from error


def _prepare_database(settings: CoordinatorSettings, staging: Path, manifest: Manifest) -> None:
    """Bring the database to this program's schema, and its checkpoints' folders to where they will lie."""
    url = parse_url(settings.database_url)
    database = staging / DATABASE
    if url.get_backend_name() != "sqlite":
        if database.exists():
            raise BackupError(f"the backup holds a SQLite database, database_url is {url!r}: restore with a sqlite:/// URL")
        return
    if not database.exists():
        raise BackupError("the backup holds no SQLite database: it was made with PostgreSQL; give that database_url")
    upgrade(f"sqlite:///{database}")
    before, after = manifest.checkpoints_directory, str(settings.checkpoints_directory.resolve())
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(
            "UPDATE checkpoints SET folder = ? || substr(folder, ?) WHERE substr(folder, 1, ?) = ?",
            (after, len(before) + 1, len(before) + 1, f"{before}/"),
        )


def _to_one_file(database: Path) -> None:
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")  # nothing beside it that would have to be moved with it


def _put_in_place(settings: CoordinatorSettings, staging: Path, aside: Path | None) -> None:
    if aside is not None:
        aside.mkdir(mode=0o700)
        for name, path in _occupied(settings):
            # Keys stay where they lie: in containers data_directory is seen by programs that have no business with them.
            _move(path, path.parent / aside.name / path.name if path.suffix == ".key" else aside / name)
        for root in folders(settings).values():
            _remove_empty_folders(root)
    places = single_files(settings) | {
        DATABASE: Path(str(parse_url(settings.database_url).database)),
        DUMP: settings.data_directory / "postgresql.dump",
        SETTINGS: settings.data_directory / "restored-settings.toml",
    }
    roots = folders(settings)
    for path in sorted(path for path in staging.rglob("*") if path.is_file()):
        member = path.relative_to(staging)
        _move(path, places.get(member.as_posix()) or roots[member.parts[0]].joinpath(*member.parts[1:]))
    for folder in (settings.authority_directory, *(settings.data_directory / "identities").glob("*/")):
        if folder.is_dir():
            folder.chmod(0o700)


def _remove_empty_folders(root: Path) -> None:
    """The trainer must not take an empty folder for a checkpoint. Mount points stay."""
    for folder, _, _ in os.walk(root, topdown=False):
        if Path(folder) != root:
            with suppress(OSError):
                Path(folder).rmdir()


def _move(path: Path, place: Path) -> None:
    """Rename, or on another disk copy, sync and remove: `place` appears whole."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.rename(place)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        beside = place.with_name(f".{place.name}.restoring")
        shutil.copy2(path, beside)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.rename(place)
        path.unlink()
