"""What stands before every page: the names that the server answers to, and the headers of every answer."""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable

from fastapi import Request, Response

from coordinator.settings import CoordinatorSettings

# Forms are a few short fields; whatever is longer is read by nobody.
MOST_FORM_BYTES = 65_536
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


def guard_for(settings: CoordinatorSettings) -> Callable[[Request, Callable[[Request], Awaitable[Response]]], Awaitable[Response]]:
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
        elif request.method not in ("GET", "HEAD") and not _is_short(request.headers.get("content-length")):
            response = Response(f"a form has at most {MOST_FORM_BYTES} bytes and says how many", status_code=413, media_type="text/plain")
        else:
            response = await proceed(request)
        for header, value in SECURITY_HEADERS.items():
            response.headers.setdefault(header, value)
        if request.url.path.startswith("/static/") and response.status_code in (200, 304):
            response.headers["Cache-Control"] = "public, max-age=31536000, immutable"
        else:
            response.headers.setdefault("Cache-Control", "no-store")
        return response

    return guard


def _is_short(length: str | None) -> bool:
    """Whether a body's announced length is one that is worth reading. The server lets no body be longer than it says."""
    return length is not None and length.isascii() and length.isdigit() and len(length) <= 6 and int(length) <= MOST_FORM_BYTES


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens at `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
