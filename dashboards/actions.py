"""What an operator can do: orders to a device, its tap plan, its access, checkpoints. Each with an audit row.

Rules: only behind `require_operator`; the row that does it and the row that tells of it are one transaction; the
gateway and the enrolment program act on the rows, this program speaks to no device.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse
from sqlalchemy import select
from sqlalchemy.orm import Session as StoreSession
from starlette.exceptions import HTTPException

from coordinator.planning import change_plan, describe
from coordinator.settings import ConfigError, CoordinatorSettings
from coordinator.store.audit import Outcome, audit
from coordinator.store.commands import add_command
from coordinator.store.engine import Store, open_store
from coordinator.store.errors import StoreError, StoreUnavailable
from coordinator.store.identities import IdentityError, approve_device, readmit_device, revoke_device
from coordinator.store.models import Device, Identity
from coordinator.store.registry import backbones, newest_plan
from coordinator.store.training import checkpoints, republish_checkpoint
from dashboards.login import Field, require_operator
from dashboards.view import view_of
from side_tuning.wire.bounded import FrameError
from side_tuning.wire.messages import CodecName

logger = logging.getLogger(__name__)
router = APIRouter()

ACTOR = "dashboard"
Order = Literal["pause", "resume"]


class Actions:
    """Writes to the store, one short transaction for each action."""

    def __init__(self, settings: CoordinatorSettings) -> None:
        self.settings = settings

    @contextmanager
    def store(self) -> Iterator[Store]:
        """The store, open for writing while the block lasts."""
        store = open_store(self.settings.database_url)
        try:
            yield store
        finally:
            store.close()

    @contextmanager
    def write(self) -> Iterator[StoreSession]:
        with self.store() as store, store.write() as session:
            yield session

    def note(self, request: Request, action: str, *, outcome: Outcome = "done", detail: str = "") -> None:
        """An audit row of its own; a store that cannot be written does not stop a login."""
        try:
            with self.write() as session:
                audit(session, at=request.app.state.now(), actor=ACTOR, action=action, device=None, outcome=outcome, detail=detail)
        except StoreError as error:
            logger.warning("%s (%s) has no audit row: %s", action, outcome, error)


def _actions(request: Request) -> Actions:
    actions: Actions = request.app.state.actions
    return actions


def _known(session: StoreSession, device: str) -> None:
    heard = session.scalar(select(Device.id).where(Device.name == device))
    if heard is None and session.get(Identity, device) is None:
        raise HTTPException(404, f"there is no device {device!r}")


def _back(request: Request, path: str, done: str) -> Response:
    """To the page that shows the effect; its snapshot is taken anew."""
    try:
        view_of(request).live.fresh()
    except StoreError as error:
        logger.debug("no fresh snapshot: %s", error)
    return RedirectResponse(f"{path}?done={quote(done)}", status_code=303)


def _device_path(device: str) -> str:
    return f"/devices/{quote(device, safe='')}"


@router.post("/devices/{device}/order")
def order(request: Request, device: str, name: Field, csrf: Field = "") -> Response:
    """Pause or resume a device."""
    require_operator(request, csrf)
    if name not in get_args(Order):
        raise HTTPException(400, f"{name!r} is no order; use pause or resume")
    at = request.app.state.now()
    with _actions(request).write() as session:
        _known(session, device)
        add_command(session, device, name, by=ACTOR, now=at)  # type: ignore[arg-type]
        audit(session, at=at, actor=ACTOR, action=f"{name} ordered", device=device)
    return _back(request, _device_path(device), f"{name} ordered; the device's next report shows it")


@router.post("/devices/{device}/plan")
def plan(
    request: Request,
    device: str,
    *,
    codec: Field = "",
    blocks: Field = "",
    max_tokens: Field = "",
    frame_samples: Field = "",
    linger_seconds: Field = "",
    csrf: Field = "",
) -> Response:
    """Give a device a tap plan of its own with some values changed."""
    require_operator(request, csrf)
    changes: dict[str, Any] = {}
    if codec:
        if codec not in get_args(CodecName):
            raise HTTPException(400, f"codec {codec!r} is not one of {', '.join(get_args(CodecName))}")
        changes["codec"] = codec
    try:
        for name, text in (("blocks", blocks), ("max_tokens", max_tokens), ("frame_samples", frame_samples)):
            if text.strip():
                changes[name] = int(text)
        if linger_seconds.strip():
            changes["linger_seconds"] = float(linger_seconds)
    except ValueError as error:
        raise HTTPException(400, f"a value of the tap plan is no number: {error}") from error
    with _actions(request).store() as store:
        with store.read() as session:
            _known(session, device)
            _refuse_unusable(session, device, changes)
        try:
            made = change_plan(_actions(request).settings, store, device, changes)
        except (ConfigError, FrameError) as error:
            raise HTTPException(400, str(error)) from error
        with store.write() as session:
            at = request.app.state.now()
            audit(session, at=at, actor=ACTOR, action="tap plan changed", device=device, detail=f"version {made.version}: {describe(made)}")
    return _back(request, _device_path(device), f"tap plan {made.version} goes out to the device")


def _refuse_unusable(session: StoreSession, device: str, changes: dict[str, Any]) -> None:
    """A plan that the device's own backbone cannot follow is refused here, not by the device later."""
    current = newest_plan(session, device)
    if not changes or (current is not None and replace(current, **changes) == current):
        raise HTTPException(400, "nothing changes: give at least one value that differs from the device's plan")
    fingerprint = session.scalar(select(Device.backbone).where(Device.name == device))
    row = backbones(session).get(fingerprint or "")
    if current is not None and row is not None and (reason := row.manifest.refusal(replace(current, **changes))) is not None:
        raise HTTPException(400, f"the device's backbone cannot follow this plan: {reason}")


@router.post("/devices/{device}/access")
def access(
    request: Request,
    device: str,
    do: Field,
    reason: Field = "",
    csrf: Field = "",
) -> Response:
    """Approve a device's certificate request, shut the device out, or let it have claims again."""
    require_operator(request, csrf)
    at = request.app.state.now()
    try:
        with _actions(request).write() as session:
            _known(session, device)
            if do == "approve":
                approve_device(session, device, at=at, actor=ACTOR)
                done = "approved; it gets its certificate when it asks next"
            elif do == "revoke":
                changed = revoke_device(session, device, at=at, actor=ACTOR, reason=reason.strip())
                done = "revoked; it is cut off within seconds" if changed else "it was revoked already"
            elif do == "readmit":
                changed = readmit_device(session, device, at=at, actor=ACTOR)
                done = "it may have a new claim: coordinator enrol" if changed else "it was not revoked"
            else:
                raise HTTPException(400, f"{do!r} is not one of approve, revoke, readmit")
    except IdentityError as error:
        raise HTTPException(409, str(error)) from error
    return _back(request, _device_path(device), done)


@router.post("/checkpoints/{generation}/republish")
def republish(request: Request, generation: int, csrf: Field = "") -> Response:
    """Offer an earlier checkpoint to the fleet again, as a new generation."""
    require_operator(request, csrf)
    at = request.app.state.now()
    with _actions(request).write() as session:
        known = {one.generation: one for one in checkpoints(session)}
        if generation not in known:
            raise HTTPException(404, f"checkpoint {generation} is not among the newest {len(known)}")
        if folder_is_gone(_actions(request).settings, known[generation].folder):
            raise HTTPException(409, f"checkpoint {generation} is not on disk any more (training.keep_checkpoints)")
        try:
            made = republish_checkpoint(session, generation, at)
        except StoreUnavailable:
            raise
        except StoreError as error:
            raise HTTPException(409, str(error)) from error
        audit(session, at=at, actor=ACTOR, action="checkpoint republished", device=None, detail=f"{generation} goes out again as {made}")
    return _back(request, "/training", f"checkpoint {generation} goes out again as {made}")


def folder_is_gone(settings: CoordinatorSettings, folder: str) -> bool:
    """Whether a checkpoint's folder is missing here although this machine keeps the checkpoints."""
    return settings.checkpoints_directory.is_dir() and not Path(folder).is_dir()
