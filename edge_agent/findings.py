"""One thing that `edge-agent doctor` found: fine, or with its cure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """`cure` is empty where all is well."""

    check: str
    level: Level
    detail: str
    cure: str = ""
