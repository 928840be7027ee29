"""Brings a database to the schema of this program with the migrations that ship inside the package."""

from __future__ import annotations

import logging
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, create_engine, event
from sqlalchemy.engine import URL

from coordinator.store.engine import (
    SCHEMA_REVISION,
    begin_immediate,
    explain_revision,
    parse_url,
    schema_revision,
    set_writer_pragmas,
    take_writer_lock,
    translate_errors,
)
from coordinator.store.errors import StoreError

logger = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).parent / "migrations"


def upgrade(url: str) -> None:
    """Make the schema, or bring an older one up to date; nothing happens where it fits already.

    Raises:
        StoreError: the schema is newer than this program, or the URL is of no use.
        StoreUnavailable: the database cannot be reached now.
    """
    parsed = parse_url(url)
    if parsed.get_backend_name() == "sqlite":
        Path(str(parsed.database)).parent.mkdir(parents=True, exist_ok=True)
    _migrate(parsed, SCHEMA_REVISION)


def downgrade(url: str, revision: str) -> None:
    """Take the schema back to an older revision ("base" for none). Tables that it did not have go with their rows."""
    _migrate(parse_url(url), revision)


def _migrate(url: URL, revision: str) -> None:
    engine = create_engine(url)
    sqlite = url.get_backend_name() == "sqlite"
    if sqlite:
        event.listen(engine, "connect", _set_auto_vacuum)
        event.listen(engine, "connect", set_writer_pragmas)
        event.listen(engine, "begin", begin_immediate)
    else:
        event.listen(engine, "begin", take_writer_lock)
    translate_errors(engine)
    try:
        with engine.begin() as connection:  # two programs that start together: the second one waits, then finds it done
            found = schema_revision(connection)
            if found == revision:
                return
            trouble = explain_revision(found)
            if trouble and found is not None and int(found) > int(SCHEMA_REVISION):
                raise StoreError(f"database {url!r}: {trouble}")
            logger.info("database %r: schema %s -> %s", url, found or "none", revision)
            config = migration_config(connection)
            older = revision == "base" or (found is not None and int(revision) < int(found))
            (command.downgrade if older else command.upgrade)(config, revision)
    finally:
        engine.dispose()


def migration_config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _set_auto_vacuum(connection: object, _record: object) -> None:
    # So that retention can give disk space back. Takes effect only while the file is still empty.
    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # type: ignore[attr-defined]
