"""A fresh SQLite store with two backbones and a plan."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.store.engine import Store, open_store
from coordinator.store.schema import upgrade


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    url = f"sqlite:///{tmp_path}/store.db"
    upgrade(url)
    opened = open_store(url)
    yield opened
    opened.close()
