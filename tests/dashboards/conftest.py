"""A store with three devices, and a client for the dashboard over it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from coordinator.settings import CoordinatorSettings
from coordinator.store.engine import Store
from dashboards.app import make_app
from tests.coordinator.fleet import make_store
from tests.dashboards.fleets import dashboard_settings, say, send

PAGE = {"accept": "text/html"}


@pytest.fixture
def settings(tmp_path: Path) -> CoordinatorSettings:
    return dashboard_settings(tmp_path)


@pytest.fixture
def store(settings: CoordinatorSettings) -> Iterator[Store]:
    store = make_store(settings)
    for device in ("attic", "kitchen", "garage"):
        for sequence in (1, 2, 3):
            send(store, device, sequence)
        say(store, device, 6)
    yield store
    store.close()


@pytest.fixture
def client(settings: CoordinatorSettings, store: Store) -> Iterator[TestClient]:
    with TestClient(make_app(settings), base_url="http://127.0.0.1", headers=PAGE, follow_redirects=False) as client:
        yield client
