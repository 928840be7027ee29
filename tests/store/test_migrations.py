"""Every schema that was ever released comes up to date with all its rows. The files in golden/ stay for ever.

`schema-NNNN.sql` is the dump of a database that the programs of that schema filled through their own functions, with
rows in every table.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import (
    ColumnClause,
    Connection,
    Integer,
    MetaData,
    column,
    create_engine,
    insert,
    inspect,
    select,
    text,
)
from sqlalchemy import table as sql_table

from coordinator.store.engine import SCHEMA_REVISION, open_store, parse_url, schema_revision
from coordinator.store.first_steps import beginning_of
from coordinator.store.fleet import device_overview, fleet_totals
from coordinator.store.health import record_health
from coordinator.store.models import Base
from coordinator.store.programs import program_states, record_program
from coordinator.store.registry import backbones, newest_plan
from coordinator.store.rejections import rejections
from coordinator.store.schema import downgrade, migration_config, upgrade
from coordinator.store.training import checkpoints, training_samples_after
from side_tuning.wire.messages import Health
from tests.store.frames import START

GOLDEN = Path(__file__).parent / "golden"
SCHEMAS = {path.stem.removeprefix("schema-"): path for path in sorted(GOLDEN.glob("schema-*.sql"))}

Rows = dict[str, list[tuple[Any, ...]]]
RENAMED = {"accuracy": "score"}  # columns, old name -> today's


@contextmanager
def connected(url: str) -> Iterator[Connection]:
    engine = create_engine(parse_url(url))
    try:
        with engine.begin() as connection:
            yield connection
    finally:
        engine.dispose()


def fill_sqlite(url: str, dump: Path) -> None:
    database = sqlite3.connect(url.removeprefix("sqlite:///"))
    database.executescript(dump.read_text(encoding="utf-8"))
    database.close()


def fill_postgresql(url: str, dump: Path, revision: str, tmp_path: Path) -> None:
    """The same rows in PostgreSQL, under the schema that its programs made there."""
    from alembic import command

    fill_sqlite(f"sqlite:///{tmp_path}/golden.db", dump)
    with connected(url) as connection:
        command.upgrade(migration_config(connection), revision)
    tables = MetaData()
    with connected(f"sqlite:///{tmp_path}/golden.db") as source, connected(url) as target:
        tables.reflect(target)
        for table in tables.sorted_tables:
            if table.name == "alembic_version":
                continue
            typed = Base.metadata.tables[table.name]
            wanted = [typed_column(table.name, c.name) for c in table.columns]
            rows = source.execute(select(*wanted).select_from(table)).mappings().all()
            target.execute(insert(sql_table(table.name, *(typed_column(table.name, c.name) for c in table.columns))), [dict(row) for row in rows])
            if "id" in table.columns and isinstance(typed.c.id.type, Integer):  # as if it had numbered them itself
                target.execute(text(f"SELECT setval(pg_get_serial_sequence('{table.name}', 'id'), (SELECT max(id) FROM {table.name}))"))


def all_rows(url: str, columns: dict[str, list[str]]) -> Rows:
    """What the given columns hold, read with the types that the programs use now."""
    there = columns_of(url)
    with connected(url) as connection:
        found: Rows = {}
        for name, wanted in columns.items():
            typed = [typed_column(name, c if c in there[name] else RENAMED[c]) for c in wanted]
            found[name] = sorted((tuple(map(str, row)) for row in connection.execute(select(*typed).select_from(sql_table(name)))), key=str)
        return found


def typed_column(table: str, name: str) -> ColumnClause[Any]:
    """A column by the name that it has in the database, with the type that the programs use now."""
    return column(name, Base.metadata.tables[table].c[RENAMED.get(name, name)].type)


def columns_of(url: str) -> dict[str, list[str]]:
    with connected(url) as connection:
        looked = inspect(connection)
        return {name: [c["name"] for c in looked.get_columns(name)] for name in looked.get_table_names() if name != "alembic_version"}


@pytest.fixture(
    params=[
        pytest.param((kind, revision), marks=[pytest.mark.slow] if kind == "postgresql" else [], id=f"{kind}-{revision}")
        for revision in SCHEMAS
        for kind in ("sqlite", "postgresql")
    ]
)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database with an old schema, filled."""
    kind, revision = request.param
    url: str = request.getfixturevalue("url" if kind == "sqlite" else "postgres_url")
    if kind == "sqlite":
        fill_sqlite(url, SCHEMAS[revision])
    else:
        fill_postgresql(url, SCHEMAS[revision], revision, tmp_path)
    return url


def test_every_row_survives_and_the_programs_work_with_them(old: str):
    columns = columns_of(old)
    before = all_rows(old, columns)
    assert all(before.values()), "a golden database has rows in every table"
    upgrade(old)
    assert all_rows(old, columns) == before
    store = open_store(old)
    with store.read() as session:
        totals = fleet_totals(session)
        assert (totals.frames_stored, totals.samples_stored) == (7, 11)
        assert {device.device for device in device_overview(session, START)} == {"kitchen", "attic", "cellar"}
        assert [row.step for row in checkpoints(session)] == [20, 10]
        assert len(training_samples_after(session, 0, 100)) == 11
        assert len(rejections(session)) == 3
        assert len(backbones(session)) == 1
        plan = newest_plan(session)
        assert plan is not None
        assert plan.labels == ("off", "on")
    with store.write() as session:
        record_program(session, "gateway", started_at=START, at=START, status={"frames": 7})
        record_health(session, "attic", Health("online", "new", START.timestamp(), first_steps={"network": START.timestamp()}), START)
    with store.read() as session:
        assert program_states(session)["gateway"].status == {"frames": 7}
        assert beginning_of(session, "attic", START).reported == {"network": START}
    store.close()


def test_down_again_nothing_of_the_old_schema_is_lost(old: str):
    columns = columns_of(old)
    before = all_rows(old, columns)
    with connected(old) as connection:
        revision = str(schema_revision(connection))
    upgrade(old)
    downgrade(old, revision)
    assert columns_of(old) == columns
    assert all_rows(old, columns) == before
    upgrade(old)
    assert all_rows(old, columns) == before


@pytest.mark.parametrize("revision", SCHEMAS)
def test_the_migration_still_makes_the_schema_that_was_released(tmp_path: Path, revision: str):
    """An old migration must never be edited: databases out there have what it made then."""

    def schema(url: str) -> list[tuple[str, str]]:
        with connected(url) as connection:
            rows = connection.execute(text("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%' ORDER BY name"))
            return [(name, sql) for name, sql in rows]

    golden, fresh = f"sqlite:///{tmp_path}/golden.db", f"sqlite:///{tmp_path}/fresh.db"
    fill_sqlite(golden, SCHEMAS[revision])
    upgrade(fresh)
    downgrade(fresh, revision)
    assert schema(golden) == schema(fresh)


def test_every_older_revision_has_a_golden_database():
    assert list(SCHEMAS) == [f"{number:04d}" for number in range(1, int(SCHEMA_REVISION))]


def test_times_keep_their_moment(old: str):
    upgrade(old)
    store = open_store(old, read_only=True)
    with store.read() as session:
        moments = [row.created_at for row in checkpoints(session)]
    store.close()
    assert moments == [datetime.fromisoformat("2026-08-01T12:00:41+00:00"), datetime.fromisoformat("2026-08-01T12:00:31+00:00")]
