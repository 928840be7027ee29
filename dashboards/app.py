"""MAIN FLOW 4: the dashboards' web application: store -> shared snapshot -> pages and live updates.

Every page is rendered here and complete without JavaScript; the one script keeps its fragments up to date from the
page's stream. Looking needs no login; whatever changes something does (dashboards/login.py, dashboards/actions.py).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.exceptions import HTTPException

from coordinator.settings import CoordinatorSettings
from coordinator.store.errors import StoreError
from coordinator.store.timestamps import utc_now
from dashboards import actions, device_page, fleet_page, lists_page, login, training_page
from dashboards.doorkeeper import Doorkeeper
from dashboards.guard import guard_for
from dashboards.live import Live, StoreAccess
from dashboards.metrics import FleetCollector, metrics_router
from dashboards.shown import FILTERS
from dashboards.view import View, view_of

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent


def make_app(settings: CoordinatorSettings, *, now: Callable[[], datetime] = utc_now) -> FastAPI:
    """The application; the store need not be there yet."""
    access = StoreAccess(settings.database_url)
    dashboard = settings.dashboard
    live = Live(access, every_seconds=dashboard.every_seconds, heartbeat_seconds=dashboard.heartbeat_seconds, now=now)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        live.start()
        yield
        live.close()
        access.close()

    app = FastAPI(title="mobillm-fleet", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.settings, app.state.live, app.state.access, app.state.now = settings, live, access, now
    app.state.view = View(make_templates(), access, live, settings, now)
    app.mount("/static", StaticFiles(directory=FOLDER / "static"), name="static")
    app.state.doorkeeper = Doorkeeper(dashboard.password_file, dashboard.session_hours)
    app.state.actions = actions.Actions(settings)
    for part in (fleet_page, device_page, training_page, lists_page, login, actions):
        app.include_router(part.router)
    app.include_router(metrics_router(FleetCollector(live.snapshot, access.reader, settings)))
    # The pages name their icon; of an address that is no page (a download, /metrics) browsers ask for this one.
    app.add_api_route("/favicon.ico", lambda: FileResponse(FOLDER / "static" / "icon.svg"), methods=["GET", "HEAD"], include_in_schema=False)
    app.add_api_route("/healthz", healthz, methods=["GET", "HEAD"], include_in_schema=False)
    app.add_exception_handler(StoreError, _store_away)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _senseless)
    app.middleware("http")(guard_for(settings))
    return app


def make_templates() -> Environment:
    """Escapes everything; an unknown name is an error, not an empty place."""
    templates = Environment(
        loader=FileSystemLoader(FOLDER / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters |= FILTERS
    templates.filters["path"] = lambda text: quote(str(text), safe="")
    # Names of static files carry their content's hash, so that browsers may keep them and never show an old one.
    templates.globals["static"] = {
        path.name: f"/static/{path.name}?v={hashlib.sha256(path.read_bytes()).hexdigest()[:12]}" for path in (FOLDER / "static").iterdir()
    }
    for name in templates.list_templates():
        templates.get_template(name)  # compiled now, not while somebody waits
    return templates


def healthz(request: Request) -> JSONResponse:
    """200 while the store can be read, else 503 with the reason."""
    try:
        with request.app.state.access.reader().read() as session:
            session.connection().exec_driver_sql("SELECT 1")
    except StoreError as error:
        return JSONResponse({"status": "waiting", "reason": str(error)}, status_code=503)
    return JSONResponse({"status": "ok"})


async def _store_away(request: Request, error: Exception) -> Response:
    view = view_of(request)
    if not _wants_page(request):
        return JSONResponse({"detail": str(error)}, status_code=503, headers={"Retry-After": "5"})
    if request.method == "POST":  # nothing to look at again: the address is a form's
        body = view.page(request, "refused.html", title="Not done", reason=f"nothing was done: {error}")
        return HTMLResponse(body, status_code=503, headers={"Retry-After": "5"})
    body = view.page(request, "waiting.html", title="Waiting for the store", reason=str(error))
    return HTMLResponse(body, status_code=503, headers={"Retry-After": "5", "Refresh": "5"})


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if not _wants_page(request):
        return JSONResponse({"detail": error.detail}, status_code=error.status_code, headers=error.headers)
    body = view_of(request).page(request, "refused.html", title="Not found" if error.status_code == 404 else "Not done", reason=error.detail)
    return HTMLResponse(body, status_code=error.status_code, headers=error.headers)


async def _senseless(request: Request, error: Exception) -> Response:
    """Values that no page of ours asks for: which ones is said, what they were is not sent back."""
    assert isinstance(error, RequestValidationError)
    wrong = "; ".join(f"{'.'.join(str(part) for part in one['loc'][1:])}: {one['msg']}" for one in error.errors())
    return await _refused(request, HTTPException(422, wrong))


def _wants_page(request: Request) -> bool:
    return "text/html" in request.headers.get("accept", "")
