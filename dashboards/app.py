"""MAIN FLOW 4: the dashboards' web application: store -> shared snapshot -> pages and live updates.

Every page is rendered here and complete without JavaScript; the one script keeps its fragments up to date from the
page's stream. Looking needs no login; whatever changes something does (dashboards/login.py, dashboards/actions.py).
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.exceptions import HTTPException

from coordinator.settings import CoordinatorSettings
from coordinator.store.errors import StoreError
from dashboards import fleet_page
from dashboards.live import Live, StoreAccess, utc_now
from dashboards.metrics import FleetCollector, metrics_router
from dashboards.shown import FILTERS
from dashboards.view import View, view_of

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})

SECURITY_HEADERS = {
    # No script and no style but our own files: what a device says of itself can never run.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


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
    app.state.view = View(make_templates(), live, settings, now)
    app.mount("/static", StaticFiles(directory=FOLDER / "static"), name="static")
    app.include_router(fleet_page.router)
    app.include_router(metrics_router(FleetCollector(live.snapshot, access.reader, settings)))
    app.add_api_route("/healthz", healthz, methods=["GET"], include_in_schema=False)
    app.add_exception_handler(StoreError, _store_away)
    app.add_exception_handler(HTTPException, _refused)
    app.middleware("http")(_guard(settings))
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
    return templates


def healthz(request: Request) -> JSONResponse:
    """200 while the store can be read, else 503 with the reason."""
    try:
        with request.app.state.access.reader().read() as session:
            session.connection().exec_driver_sql("SELECT 1")
    except StoreError as error:
        return JSONResponse({"status": "waiting", "reason": str(error)}, status_code=503)
    return JSONResponse({"status": "ok"})


def _guard(settings: CoordinatorSettings) -> Callable[[Request, Callable[[Request], Awaitable[Response]]], Awaitable[Response]]:
    """Answers only to its own names, and sends the security headers with every answer."""
    names = frozenset(name.lower() for name in settings.dashboard.allowed_hosts)
    if names or is_loopback(settings.dashboard.host):
        names |= LOOPBACK_NAMES

    async def guard(request: Request, proceed: Callable[[Request], Awaitable[Response]]) -> Response:
        host = request.headers.get("host", "").lower()
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if names and name not in names:
            # Another site's name that points here (DNS rebinding) would let that site read the fleet.
            response: Response = Response(
                "this dashboard does not answer to that name; add it to dashboard.allowed_hosts", status_code=421, media_type="text/plain"
            )
        else:
            response = await proceed(request)
        for header, value in SECURITY_HEADERS.items():
            response.headers.setdefault(header, value)
        if request.url.path.startswith("/static/"):
            response.headers["Cache-Control"] = "public, max-age=31536000, immutable"
        else:
            response.headers.setdefault("Cache-Control", "no-store")
        return response

    return guard


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens at `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def _store_away(request: Request, error: Exception) -> Response:
    view = view_of(request)
    if not _wants_page(request):
        return JSONResponse({"detail": str(error)}, status_code=503, headers={"Retry-After": "5"})
    body = view.page(request, "waiting.html", title="Waiting for the store", reason=str(error))
    return HTMLResponse(body, status_code=503, headers={"Retry-After": "5", "Refresh": "5"})


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if not _wants_page(request):
        return JSONResponse({"detail": error.detail}, status_code=error.status_code, headers=error.headers)
    body = view_of(request).page(request, "refused.html", title="Not done" if request.method == "POST" else "Not found", reason=error.detail)
    return HTMLResponse(body, status_code=error.status_code, headers=error.headers)


def _wants_page(request: Request) -> bool:
    return "text/html" in request.headers.get("accept", "")
