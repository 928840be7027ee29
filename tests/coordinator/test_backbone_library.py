"""Registered backbones are kept whole, or not at all."""

from __future__ import annotations

import pytest

from coordinator.backbone_library import find_artifact, keep_artifact
from coordinator.backbones import prepare
from side_tuning.backbone_manifest import BackboneError, read_manifest
from tests.backbones.models import save_random_model


@pytest.fixture
def artifact(tmp_path):
    prepare(save_random_model("bert", tmp_path / "model"), tmp_path / "artifact", layers=1, weights="int8", max_tokens=16)
    return tmp_path / "artifact"


def test_an_artifact_is_kept_once_and_found_by_its_fingerprint(tmp_path, artifact):
    fingerprint = read_manifest(artifact).fingerprint
    assert find_artifact(tmp_path / "data", fingerprint) is None
    kept = keep_artifact(tmp_path / "data", artifact)
    assert find_artifact(tmp_path / "data", fingerprint) == kept
    assert read_manifest(kept) == read_manifest(artifact)
    before = kept.stat().st_mtime_ns
    assert keep_artifact(tmp_path / "data", artifact) == kept
    assert kept.stat().st_mtime_ns == before


def test_what_cannot_be_copied_leaves_nothing_half_done(tmp_path, artifact):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "backbones").write_text("in the way")
    with pytest.raises(BackboneError, match="cannot be copied"):
        keep_artifact(tmp_path / "data", artifact)
    (artifact / "model.safetensors").unlink()
    with pytest.raises(BackboneError):
        keep_artifact(tmp_path / "other", artifact)
    assert not (tmp_path / "other").exists()
