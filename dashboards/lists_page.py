"""Two lists: what was set aside and why, with its bytes to download; and who did what to whose access."""

from __future__ import annotations

import re

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

from coordinator.store.audit import audit_entries
from coordinator.store.rejections import rejections
from coordinator.store.views import rejected_payload
from dashboards.guard import is_loopback
from dashboards.login import doorkeeper_of, session_of
from dashboards.view import view_of

router = APIRouter()

SHOWN = 200


@router.get("/rejections")
def rejections_page(request: Request, device: str = "") -> Response:
    view = view_of(request)
    with view.access.reader().read() as session:
        rows = rejections(session, device[:64] or None, SHOWN)
    may = may_download(request)
    return view.respond(request, "rejections.html", title="Rejections", rows=rows, device=device[:64], most=SHOWN, may_download=may)


@router.get("/rejections/{rejection_id}/payload")
def payload(request: Request, rejection_id: int) -> Response:
    """The message as it came. It may hold activations, which tell something of the texts behind them."""
    if not may_download(request):
        raise HTTPException(401, "sign in to download what a device sent")
    if rejection_id >= 2**63:
        raise HTTPException(404, "there is no such rejection")
    with view_of(request).access.reader().read() as session:
        found = rejected_payload(session, rejection_id)
    if found is None:
        raise HTTPException(404, f"there is no rejection {rejection_id}; it may have been tried again and stored")
    if found.payload is None:
        raise HTTPException(410, f"retention has dropped the payload of rejection {rejection_id}")
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", f"rejected-{rejection_id}-{found.device}.bin")
    return Response(
        found.payload, media_type="application/octet-stream", headers={"Content-Disposition": f'attachment; filename="{name}"'}
    )


def may_download(request: Request) -> bool:
    """The operator; and where nobody can sign in, whoever sits at this machine."""
    if doorkeeper_of(request).open:
        return session_of(request) is not None
    return is_loopback(view_of(request).settings.dashboard.host)


@router.get("/audit")
def audit_page(request: Request, device: str = "") -> Response:
    view = view_of(request)
    with view.access.reader().read() as session:
        rows = audit_entries(session, device[:64] or None, SHOWN)
    return view.respond(request, "audit.html", title="Audit", rows=rows, device=device[:64], most=SHOWN)
