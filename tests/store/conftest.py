"""A fresh store per test; what any database must do is tested on SQLite and on PostgreSQL."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.store.engine import Store, open_store
from coordinator.store.schema import upgrade
from tests.store.postgres import PostgresMissingError, running_postgres

_numbers = itertools.count()


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a real server, without a database name; skips where there is none."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'mobillm-fleet[postgresql]'")
    try:
        with running_postgres() as url:
            yield url
    except PostgresMissingError as error:
        pytest.skip(str(error))


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Of a SQLite store that is not made yet."""
    return f"sqlite:///{tmp_path}/store.db"


@pytest.fixture
def postgres_url(postgres: str) -> str:
    """Of an empty database of its own."""
    import psycopg

    name = f"store_{next(_numbers)}"
    with psycopg.connect(f"{postgres}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"{postgres}/{name}"


@pytest.fixture
def sqlite_store(url: str) -> Iterator[Store]:
    upgrade(url)
    opened = open_store(url)
    yield opened
    opened.close()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    own: str = request.getfixturevalue("url" if request.param == "sqlite" else "postgres_url")
    upgrade(own)
    opened = open_store(own)
    yield opened
    opened.close()
