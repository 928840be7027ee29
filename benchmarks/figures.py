"""What every benchmark prints and writes: rich tables on screen; with --json, figures, bars, machine, versions and seeds.

A bar is a promise about a ratio or a figure; `Bar.holds` says whether this run kept it.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

PACKAGES = ("torch", "transformers", "optimum-quanto", "peft", "flwr", "paho-mqtt", "msgpack", "lz4", "numpy", "sqlalchemy")


@dataclass(frozen=True)
class Bar:
    """One figure and the bar that it must reach: at least it, or at most it where `at_most`."""

    name: str
    value: float
    bar: float
    at_most: bool = False

    @property
    def holds(self) -> bool:
        if not math.isfinite(self.value):
            return False
        return self.value <= self.bar if self.at_most else self.value >= self.bar


def machine() -> dict[str, Any]:
    """The processor, cores, memory, load and threads of this run: what a figure is worth without them is nothing."""
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "system": platform.platform(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def versions() -> dict[str, str]:
    """Python, this project's commit, and each package that a figure may depend on, where it is there."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    commit = _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
    if commit:
        found["commit"] = commit
    return found


def write_json(path: Path, figures: dict[str, Any], bars: list[Bar], seeds: list[int], options: dict[str, Any]) -> None:
    """Everything of one run in one file; read by people and by whoever makes the tables of the documentation."""
    content = {
        "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "seeds": seeds,
        "options": options,
        "bars": [{"name": one.name, "value": one.value, "bar": one.bar, "holds": one.holds} for one in bars],
        "figures": figures,
    }
    path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def print_bars(bars: list[Bar], console: Console | None = None) -> None:
    """A table of the bars, a missed one in red."""
    table = Table("bar", "value", "must be", "holds", title="Bars", title_justify="left")
    for one in bars:
        wanted = f"{'at most' if one.at_most else 'at least'} {one.bar:g}"
        table.add_row(one.name, f"{one.value:.4g}", wanted, "yes" if one.holds else "[red]no[/red]")
    (console or Console()).print(table)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
