"""The list in Raspberry Pi Imager's repository format that makes the stock Imager offer our image, with its settings dialogue."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

DEVICES = ("pi3-64bit", "pi4-64bit")  # Debian's kernel lacks the Raspberry Pi 5's network


def os_list(image: Path, packed: Path, url: str, released: datetime) -> dict[str, Any]:
    """One entry, with the true sizes and hashes of both files."""
    entry = {
        "name": "mobillm-fleet edge agent (64-bit)",
        "description": "Debian with the edge agent: enrols itself at the first boot, read-only root",
        "url": url,
        "icon": "",
        "extract_size": image.stat().st_size,
        "extract_sha256": sha256_of(image),
        "image_download_size": packed.stat().st_size,
        "image_download_sha256": sha256_of(packed),
        "release_date": released.astimezone(timezone.utc).strftime("%Y-%m-%d"),
        "init_format": "cloudinit",
        "devices": list(DEVICES),
    }
    return {"os_list": [entry]}


def write_os_list(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1024 * 1024):
            digest.update(block)
    return digest.hexdigest()
