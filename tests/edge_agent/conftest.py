"""Real backbones for the agent's tests, prepared once per session."""

from __future__ import annotations

from pathlib import Path

import pytest

from side_tuning.signatures import load_signing_key, make_key, public_key_hex


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two layers of MiniLM, linear layers in int8."""
    return _prepare(tmp_path_factory, layers=2)


@pytest.fixture(scope="session")
def other_minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another backbone type: three layers."""
    return _prepare(tmp_path_factory, layers=3)


def _prepare(tmp_path_factory: pytest.TempPathFactory, layers: int) -> Path:
    from coordinator.backbones import prepare
    from tests.backbones.models import minilm_folder

    out = tmp_path_factory.mktemp("backbone") / f"minilm-{layers}"
    prepare(minilm_folder(), out, layers=layers, weights="int8", max_tokens=40)
    return out


@pytest.fixture(scope="session")
def signing_key(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("key") / "signing.key"
    make_key(path)
    return load_signing_key(path)


@pytest.fixture(scope="session")
def public_key_file(signing_key, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "public.hex"
    path.write_text(public_key_hex(signing_key))
    return path
