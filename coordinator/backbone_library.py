"""The coordinator's own copies of registered backbones: `{data_directory}/backbones/{fingerprint}`.

The trainer runs anchors through them, so the artifact must be at hand for as long as the backbone is registered.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from side_tuning.backbone_manifest import BackboneError, check_artifact


def keep_artifact(data_directory: Path, folder: Path) -> Path:
    """Copy the artifact in `folder`, unless it is there already; returns the copy.

    Raises:
        BackboneError: it is damaged, or cannot be copied.

    """
    manifest = check_artifact(folder)
    kept = _place(data_directory, manifest.fingerprint)
    if kept.is_dir():
        return kept
    beside = kept.with_name(f".{kept.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        shutil.copytree(folder, beside)
        beside.rename(kept)
    except OSError as error:  # shutil.Error is one, with a list of every file that failed
        shutil.rmtree(beside, ignore_errors=True)
        first = error.args[0][0][2] if isinstance(error, shutil.Error) else error
        raise BackboneError(f"the artifact in {folder} cannot be copied to {kept}: {first}; free some space or correct the rights") from error
    return kept


def find_artifact(data_directory: Path, fingerprint: str) -> Path | None:
    """Where the artifact of a registered backbone is, if it was kept."""
    kept = _place(data_directory, fingerprint)
    return kept if kept.is_dir() else None


def _place(data_directory: Path, fingerprint: str) -> Path:
    return data_directory / "backbones" / fingerprint
