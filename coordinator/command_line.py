"""What the modules of the command line share: where the settings come from, and how a command opens the store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from coordinator.settings import CoordinatorSettings
    from coordinator.store.engine import Store

Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", envvar="COORDINATOR_CONFIG", help="TOML file; COORDINATOR_... variables go before it."),
]


def open_settings(config: Path | None, program: str) -> CoordinatorSettings:
    """The effective settings; the log is set up by them."""
    from coordinator.settings import configure_logging, load_settings

    settings = load_settings(config)
    configure_logging(settings, program)
    return settings


@contextmanager
def opened_store(config: Path | None, *, read_only: bool = False) -> Iterator[tuple[CoordinatorSettings, Store]]:
    """The settings and the store for one command."""
    from coordinator.store.engine import open_store

    settings = open_settings(config, "coordinator")
    store = open_store(settings.database_url, read_only=read_only)
    try:
        yield settings, store
    finally:
        store.close()
