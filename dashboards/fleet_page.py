"""The fleet: totals, scores over time, and every device, worst first."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from coordinator.timeline import late_first_steps
from dashboards.rows import FleetPage, Query, page_of, rows_of
from dashboards.shown import short
from dashboards.snapshot import STATES, FleetSnapshot
from dashboards.view import View, view_of

router = APIRouter()


@router.get("/")
def fleet(request: Request) -> Response:
    view, query = view_of(request), Query.read(request.query_params)
    values = fleet_values(view.live.snapshot(), query)
    return view.respond(request, "fleet.html", title="Fleet", live="/live/fleet", **values)


@router.get("/live/fleet")
async def fleet_updates(request: Request) -> Response:
    view, query = view_of(request), Query.read(request.query_params)
    return await view.stream(f"fleet {query}", lambda snapshot: fleet_fragments(view, snapshot, query))


def fleet_values(snapshot: FleetSnapshot, query: Query) -> dict[str, Any]:
    """What the fleet's templates show."""
    rows = rows_of(snapshot)
    heard = {one.device for one in snapshot.devices}
    absent = [(access, late_first_steps(access, None, snapshot.at)) for access in snapshot.access.values() if access.device not in heard]
    return {
        "snapshot": snapshot,
        "metric": snapshot.metric,
        "states": snapshot.states(),
        "in_trouble": sum(1 for row in rows if row.troubles),
        "unbalanced": sum(1 for row in rows if not row.overview.ledger.balanced),
        "page": page_of(rows, query, snapshot.metric),
        "query": query,
        "groups": sorted({access.group for access in snapshot.access.values() if access.group}),
        "backbones": sorted({one.backbone for one in snapshot.devices if one.backbone}),
        "known_states": STATES,
        "absent": [access for access, late in absent if not late],
        "never_came": [(access, late[0]) for access, late in absent if late],
        "waiting": [access for access in snapshot.access.values() if access.waits_since is not None],
        "marks": {checkpoint.step: checkpoint.generation for checkpoint in snapshot.checkpoints if checkpoint.run == snapshot.run},
        "short": short,
    }


def fleet_fragments(view: View, snapshot: FleetSnapshot, query: Query) -> dict[str, str]:
    """The fragments of the fleet's page: its parts, each row of the table, and the order of the rows."""
    values = fleet_values(snapshot, query)
    page: FleetPage = values["page"]
    render = view.templates.get_template("rows.html").make_module({"now": None, "metric": snapshot.metric}).device_row  # type: ignore[attr-defined]
    rows = {f"row:{row.overview.device}": str(render(row)) for row in page.rows}
    return {**view.fragments("fleet_parts.html", values), "order:devices": "\n".join(rows), **rows}


