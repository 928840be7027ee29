"""Writes configuration files; the standard library only reads TOML."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_toml(path: Path, content: Mapping[str, Any]) -> None:
    """Write tables of plain values and lists of tables: all that our settings are made of."""
    plain = {name: value for name, value in content.items() if not isinstance(value, Mapping) and not _is_tables(value)}
    lines = _assignments(plain)
    for name, value in content.items():
        if isinstance(value, Mapping):
            lines += ["", f"[{name}]", *_assignments(value)]
        elif _is_tables(value):
            for entry in value:
                lines += ["", f"[[{name}]]", *_assignments(entry)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, Mapping) for entry in value)


def _assignments(values: Mapping[str, Any]) -> list[str]:
    # JSON's strings, numbers, booleans and lists are TOML's too, but for the character DEL.
    return [f"{name} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f") for name, value in values.items()]
