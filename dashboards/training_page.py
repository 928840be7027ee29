"""Training: loss and scores, whose samples it learns from, and which checkpoint runs where."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response

from coordinator.store.training import StoredCheckpoint
from coordinator.store.views import Measured, arrivals_by_device, score_series
from dashboards.actions import folder_is_gone
from dashboards.snapshot import FleetSnapshot
from dashboards.view import View, view_of

router = APIRouter()

POINTS = 300
SHARES = 100
ARRIVALS_WINDOW = timedelta(hours=1)
MAX_DESCRIPTION_BYTES = 1_000_000
TRAINER = "trainer"
SILENT_AFTER = timedelta(seconds=30)  # it speaks every five


@dataclass(frozen=True)
class Share:
    """How much of recent batches came from a device, and how much of what arrived."""

    device: str
    of_batches: float | None
    of_arrivals: float | None


@dataclass(frozen=True)
class CheckpointView:
    """A checkpoint with its files' hashes and the devices that say they run it."""

    stored: StoredCheckpoint
    sha256: Mapping[str, str]
    gone: bool  # its folder was pruned
    devices: tuple[str, ...]


@router.get("/training")
def training(request: Request, done: str = "") -> Response:
    view = view_of(request)
    values = training_values(view, view.live.snapshot())
    return view.respond(request, "training.html", title="Training", live="/live/training", message=done[:200], **values)


@router.get("/live/training")
async def training_updates(request: Request) -> Response:
    view = view_of(request)
    return await view.stream("training", lambda snapshot: view.fragments("training_parts.html", training_values(view, snapshot)))


def training_values(view: View, snapshot: FleetSnapshot) -> dict[str, Any]:
    """What the training page's templates show."""
    status = next((one for one in snapshot.programs if one.name == TRAINER), None)
    backbone: list[Measured] = []
    worst: list[Measured] = []
    with view.access.reader().read() as session:
        if snapshot.run is not None:
            backbone = score_series(session, snapshot.run, "backbone", limit=POINTS * 4)
            worst = score_series(session, snapshot.run, "worst-device", limit=POINTS)
        arrived = arrivals_by_device(session, snapshot.at - ARRIVALS_WINDOW)
    figures = {} if status is None else dict(status.status)
    return {
        "snapshot": snapshot,
        "metric": snapshot.metric,
        "trainer": status,
        "alive": status is not None and snapshot.at - status.at < SILENT_AFTER,
        "figures": {name: value if isinstance(value, int | float) else None for name, value in figures.items()},
        "error": str(figures.get("error") or ""),
        "newest": snapshot.scores[-1] if snapshot.scores else None,
        "worst": {one.step: one for one in worst},
        "newest_worst": worst[-1] if worst else None,
        "names": sorted({one.name for one in backbone}),
        "by_backbone": _by_step(backbone),
        "marks": {one.step: one.generation for one in snapshot.checkpoints if one.run == snapshot.run},
        "shares": shares_of(figures, arrived),
        "checkpoints": checkpoint_views(view, snapshot),
    }


def _by_step(measured: list[Measured]) -> dict[int, dict[str, Measured]]:
    found: dict[int, dict[str, Measured]] = defaultdict(dict)
    for one in measured:
        found[one.step][one.name] = one
    return found


def shares_of(figures: Mapping[str, Any], arrived: Mapping[str, int]) -> list[Share]:
    """Shares by device, those with most arrivals first. The trainer says whose samples its recent batches held."""
    batches = figures.get("shares")
    drawn = {name: float(value) for name, value in batches.items() if isinstance(value, int | float)} if isinstance(batches, dict) else {}
    total = sum(arrived.values())
    shares = [
        Share(
            name,
            drawn.get(name, 0.0) if drawn else None,
            arrived.get(name, 0) / total if total else None,
        )
        for name in sorted({*arrived, *drawn}, key=lambda name: (-arrived.get(name, 0), name))
    ]
    return shares[:SHARES]


def checkpoint_views(view: View, snapshot: FleetSnapshot) -> list[CheckpointView]:
    """The newest checkpoints with who runs which."""
    running: dict[int, list[str]] = defaultdict(list)
    for one in snapshot.devices:
        if one.health is not None and one.health.checkpoint:
            running[one.health.checkpoint].append(one.device)
    return [
        CheckpointView(
            one, read_hashes(one.folder), folder_is_gone(view.settings, one.folder), tuple(running.get(one.generation, ()))
        )
        for one in snapshot.checkpoints[:20]
    ]


def read_hashes(folder: str) -> dict[str, str]:
    """sha256 by file name, from the checkpoint's own description; empty where the folder is not on this machine."""
    path = Path(folder) / "checkpoint.json"
    try:
        if path.stat().st_size > MAX_DESCRIPTION_BYTES:
            return {}
        described = json.loads(path.read_bytes()).get("sha256", {})
    except (OSError, ValueError, AttributeError):
        return {}
    if not isinstance(described, dict):
        return {}
    return {str(name): str(value) for name, value in sorted(described.items()) if name != "trainer.safetensors"}
