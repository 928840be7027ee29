"""Renders pages and their live fragments: templates, the shared snapshot, and who is signed in."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from datetime import datetime
from typing import Any

from fastapi import Request, Response
from fastapi.responses import HTMLResponse, StreamingResponse
from jinja2 import Environment
from starlette.exceptions import HTTPException

from coordinator.settings import CoordinatorSettings
from dashboards.doorkeeper import COOKIE, Doorkeeper
from dashboards.live import Fragments, Live, Render, StoreAccess, TooManyViewersError


class View:
    """Everything that a page needs to be rendered."""

    def __init__(
        self, templates: Environment, access: StoreAccess, live: Live, settings: CoordinatorSettings, now: Callable[[], datetime]
    ) -> None:
        self.templates = templates
        self.access = access
        self.live = live
        self.settings = settings
        self.now = now

    def page(self, request: Request, template: str, *, title: str, **values: Any) -> str:
        """A whole page. `now` makes times relative for people without JavaScript."""
        doorkeeper: Doorkeeper = request.app.state.doorkeeper
        return self.templates.get_template(template).render(
            {
                "title": title,
                "path": request.url.path,
                "now": self.now(),
                "live": "",
                "message": "",
                "operator": doorkeeper.find(request.cookies.get(COOKIE)),
                "may_sign_in": doorkeeper.open,
                **values,
            }
        )

    def respond(self, request: Request, template: str, *, title: str, status_code: int = 200, **values: Any) -> HTMLResponse:
        return HTMLResponse(self.page(request, template, title=title, **values), status_code=status_code)

    def fragments(self, template: str, values: dict[str, Any]) -> Fragments:
        """Every fragment of a page: a fragment is a macro of `template` whose name begins with `live_`."""
        module = self.templates.get_template(template).make_module({"now": None, **values})
        names = [name for name in dir(module) if name.startswith("live_")]
        return {name.removeprefix("live_").replace("_", "-"): str(getattr(module, name)()) for name in names}

    async def stream(self, key: str, render: Render) -> Response:
        """The page's live updates."""
        updates = self.live.updates(key, render)
        try:
            first = await anext(updates)
        except TooManyViewersError as error:
            raise HTTPException(503, str(error), headers={"Retry-After": "60"}) from error

        async def body() -> AsyncIterator[bytes]:
            try:
                yield first
                async for event in updates:
                    yield event
            finally:
                await updates.aclose()  # type: ignore[attr-defined]

        # Proxies must pass each event on at once.
        return StreamingResponse(body(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


def view_of(request: Request) -> View:
    view: View = request.app.state.view
    return view
