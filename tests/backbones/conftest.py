"""Backbones prepared once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from coordinator.backbones import prepare
from tests.backbones.models import minilm_folder, save_random_model, stories_folder

torch.set_num_threads(1)

Prepared = Callable[..., Path]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a model by name: a random architecture, `minilm` or `stories`."""
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name == "minilm":
            return minilm_folder()
        if name == "stories":
            return stories_folder()
        if name not in folders:
            folders[name] = save_random_model(name, tmp_path_factory.mktemp(name))
        return folders[name]

    return get


@pytest.fixture(scope="session")
def prepared(source: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Artifact of a model by name and options; not to be changed."""
    artifacts: dict[tuple[Any, ...], Path] = {}

    def get(name: str, weights: Any = "int8", layers: int | None = None, max_tokens: int = 40) -> Path:
        key = (name, weights, layers, max_tokens)
        if key not in artifacts:
            out = tmp_path_factory.mktemp("artifact") / "backbone"
            prepare(source(name), out, layers=layers, weights=weights, max_tokens=max_tokens)
            artifacts[key] = out
        return artifacts[key]

    return get
