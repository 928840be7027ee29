"""Signing in and out, and the check before every action: a session, a token from our own form, no foreign site."""

from __future__ import annotations

import hmac
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import RedirectResponse
from starlette.exceptions import HTTPException

from dashboards.doorkeeper import COOKIE, Doorkeeper, PasswordError, Session, digest
from dashboards.view import view_of

router = APIRouter()

Field = Annotated[str, Form(max_length=1000)]

HOW_TO = "Actions are off: write a password into a file that only this program can read, and name it as dashboard.password_file."


def doorkeeper_of(request: Request) -> Doorkeeper:
    doorkeeper: Doorkeeper = request.app.state.doorkeeper
    return doorkeeper


def session_of(request: Request) -> Session | None:
    """The operator's session, if this request comes with one."""
    return doorkeeper_of(request).find(request.cookies.get(COOKIE))


def refuse_foreign(request: Request) -> None:
    """Refuse a form that another site sent (the browser says so itself)."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    foreign_site = site is not None and site not in ("same-origin", "none")
    foreign_origin = origin is not None and urlsplit(origin).netloc.lower() != request.headers.get("host", "").lower()
    if foreign_site or foreign_origin:
        raise HTTPException(403, "this form came from another site; nothing was done")


def require_operator(request: Request, csrf: str) -> Session:
    """The session behind an action.

    Raises:
        HTTPException: actions are off, nobody is signed in, or the form is not one of ours; nothing must be done.

    """
    refuse_foreign(request)
    if not doorkeeper_of(request).open:
        raise HTTPException(403, HOW_TO)
    session = session_of(request)
    if session is None:
        raise HTTPException(401, "sign in first; nothing was done")
    if not hmac.compare_digest(digest(csrf), digest(session.csrf)):
        raise HTTPException(403, "this form is too old or came from another site: reload the page and try again; nothing was done")
    return session


def own_path(text: str) -> str:
    """`text` if it is a path on this server, else the fleet's page: a login must not lead elsewhere."""
    good = text.startswith("/") and not text.startswith(("//", "/\\")) and text.isprintable() and "\\" not in text
    return text if good else "/"


@router.get("/login")
def login_form(request: Request, back: str = "/") -> Response:
    doorkeeper = doorkeeper_of(request)
    values: dict[str, Any] = {"back": own_path(back), "open": doorkeeper.open, "how_to": HOW_TO, "trouble": ""}
    return view_of(request).respond(request, "login.html", title="Sign in", **values)


@router.post("/login")
def login(request: Request, password: Field = "", back: Field = "/") -> Response:
    refuse_foreign(request)
    doorkeeper = doorkeeper_of(request)
    if not doorkeeper.open:
        raise HTTPException(403, HOW_TO)
    address = request.client.host if request.client else ""
    if (wait := doorkeeper.guesses.take(address)) > 0:
        raise HTTPException(429, f"too many wrong passwords; try again in {wait:.0f} s", headers={"Retry-After": f"{wait:.0f}"})
    try:
        right = doorkeeper.check(password)
    except PasswordError as error:
        raise HTTPException(503, str(error)) from error
    if not right:
        request.app.state.actions.note(request, "sign-in", outcome="denied", detail=f"wrong password from {address}")
        values: dict[str, Any] = {"back": own_path(back), "open": True, "how_to": HOW_TO, "trouble": "That is not the password."}
        return view_of(request).respond(request, "login.html", title="Sign in", status_code=401, **values)
    doorkeeper.guesses.forget(address)
    request.app.state.actions.note(request, "sign-in", detail=f"from {address}")
    answer = RedirectResponse(own_path(back), status_code=303)
    answer.set_cookie(
        COOKIE,
        doorkeeper.begin(password),
        max_age=doorkeeper.session_seconds,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return answer


@router.post("/logout")
def logout(request: Request, csrf: Field = "") -> Response:
    require_operator(request, csrf)
    doorkeeper_of(request).end(request.cookies.get(COOKIE))
    answer = RedirectResponse("/", status_code=303)
    answer.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return answer
