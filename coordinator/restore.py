"""`coordinator restore`: puts a backup (coordinator/backup.py) in place, all of it or nothing.

Every member is checked against the manifest before anything changes. What stood there before is moved aside, never
deleted. The database is brought to this program's schema, and its checkpoints to where they lie now. The last step is
a few renames; if the power fails just then, restore again with --force. Owners of files are not kept, rights are.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import tarfile
import time
from collections.abc import Callable
from contextlib import closing
from datetime import datetime
from pathlib import Path, PurePosixPath

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
)
from coordinator.files import held
from coordinator.settings import CoordinatorSettings
from coordinator.store.engine import parse_url
from coordinator.store.schema import upgrade

STAGING = ".restoring"
_ALIVE_SECONDS = 30.0
_MANIFEST_BYTES = 64 * 1024 * 1024
_BLOCK_BYTES = 1024 * 1024
_NAMES = ("data", "authority", "broker", "database", "settings")


def restore_backup(
    settings: CoordinatorSettings, source: Path, now: datetime, *, force: bool = False, say: Callable[[str], None] = lambda _: None
) -> Manifest:
    """Put the backup `source` where `settings` wants its files.

    Raises:
        BackupError: the backup is damaged or of no use here, or something stands in its way; nothing has changed.
        StoreError: the backup's database is newer than this program.

    """
    data = settings.data_directory
    data.mkdir(parents=True, exist_ok=True)
    _refuse_running(settings)
    in_the_way = _occupied(settings)
    if in_the_way and not force:
        raise BackupError(f"{in_the_way[0][1]} is there already: restore into an empty data_directory, or use --force, which moves it aside")
    taken = BackupError(f"a program runs with the data_directory {data}: stop every program of this coordinator first")
    staging = data / STAGING
    with held(data / "gateway.lock", taken), held(data / "enrolment.lock", taken):
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(mode=0o700)
        try:
            manifest = _unpack(source, staging)
            _prepare_database(settings, staging, manifest)
            aside = data / f"{BEFORE_RESTORE}{now:%Y%m%d-%H%M%S}"
            _put_in_place(settings, staging, aside if in_the_way else None)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    if in_the_way:
        say(f"what was there before is in {aside}; delete it when all is well")
    if DUMP in manifest.files:
        say(f"the database comes last: pg_restore --clean --if-exists --dbname=... {data / 'postgresql.dump'}, then `coordinator database upgrade`")
    elif DATABASE not in manifest.files:
        say("the backup holds no database: restore it with PostgreSQL's own tools, then `coordinator database upgrade`")
    say(
        f"revocations after {manifest.made_at} are not in this backup: compare `coordinator audit` with what you remember, "
        "and revoke again; frames that were receipted after it are lost, the loss ledger counts them"
    )
    return manifest


def _refuse_running(settings: CoordinatorSettings) -> None:
    for name in ("gateway", "trainer", "enrolment", "dashboard"):
        file = settings.alive_file(name)
        if file.exists() and time.time() - file.stat().st_mtime < _ALIVE_SECONDS:
            raise BackupError(f"the program {name} runs with the data_directory {settings.data_directory}: stop every program first")


def _occupied(settings: CoordinatorSettings) -> list[tuple[str, Path]]:
    """What stands where the backup's files are to go, with the name of its folder."""
    found = [
        (name, path)
        for name, root in folders(settings).items()
        if root.is_dir()
        for path in sorted(root.iterdir())
        if path.suffix != ".lock" and path.name not in ("alive", STAGING) and not path.name.startswith(BEFORE_RESTORE) and _holds_files(path)
    ]
    url = parse_url(settings.database_url)
    if url.get_backend_name() == "sqlite":
        found += [("database", path) for end in ("", "-wal", "-shm") if (path := Path(f"{url.database}{end}")).exists()]
    return found


def _holds_files(path: Path) -> bool:
    """Empty folders are in nobody's way; in a container they may be places where other volumes are mounted."""
    return not path.is_dir() or any(not inner.is_dir() for inner in path.rglob("*"))


def _move_into(path: Path, place: Path) -> None:
    """Move `path` to `place`; into folders that are there already, and stay, go the parts one by one."""
    if not (path.is_dir() and place.is_dir()):
        shutil.move(path, place)
        return
    for part in path.iterdir():
        _move_into(part, place / part.name)


def _unpack(source: Path, staging: Path) -> Manifest:
    """Everything of the backup under `staging`, checked."""
    free, needed = shutil.disk_usage(staging).free, source.stat().st_size + SPARE_BYTES
    if free < needed:
        raise BackupError(f"the disk of {staging.parent} has {free / 1e6:,.0f} MB free, the backup needs {needed / 1e6:,.0f} MB: free some space")
    found: dict[str, tuple[str, int, int]] = {}
    manifest: Manifest | None = None
    try:
        with tarfile.open(source, mode="r:") as tar:
            for member in tar:
                if member.name == MANIFEST:
                    manifest = _read_manifest(tar, member)
                    continue
                _check_member(member, found)
                found[member.name] = _unpack_member(tar, member, staging / member.name)
    except tarfile.TarError as error:
        raise BackupError(f"{source} is damaged, or no backup of a coordinator ({error}): use another copy of it") from error
    if manifest is None:
        raise BackupError(f"{source} is cut short: its manifest is missing; use another copy of it")
    differing = sorted(name for name in found.keys() | manifest.files.keys() if found.get(name, ())[:2] != manifest.files.get(name, ())[:2])
    if differing:
        raise BackupError(f"{source} is damaged: {differing[0]} is not what the manifest says ({len(differing)} such files); use another copy of it")
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
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")  # one file to move, nothing beside it


def _put_in_place(settings: CoordinatorSettings, staging: Path, aside: Path | None) -> None:
    if aside is not None:
        aside.mkdir(mode=0o700)
        for name, path in _occupied(settings):
            if path.exists():  # one that lies within another has gone with it
                (aside / name).mkdir(exist_ok=True)
                shutil.move(path, aside / name / path.name)
    places = folders(settings)
    moves = [(path, place / path.name) for name, place in places.items() if (staging / name).is_dir() for path in (staging / name).iterdir()]
    moves += [
        (staging / member, place)
        for member, place in (
            (DATABASE, Path(str(parse_url(settings.database_url).database))),
            (DUMP, settings.data_directory / "postgresql.dump"),
            (SETTINGS, settings.data_directory / "restored-settings.toml"),
        )
        if (staging / member).exists()
    ]
    for path, place in moves:
        place.parent.mkdir(parents=True, exist_ok=True)
        _move_into(path, place)
    for folder in (settings.authority_directory, settings.data_directory / "identities"):
        if folder.is_dir():
            folder.chmod(0o700)
