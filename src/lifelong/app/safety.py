"""The gate: whoever has the token, from this machine, from this page.

A page in another tab must not read what a model remembers, nor make it forget. So each request is
checked, before anything else sees it: the Host (a name that another site points at this machine is
refused), the token (in a cookie, set by the address that the terminal prints; browsers send it to
other ports of this machine too, so only a server here could read it), and for whatever could change
something, the Origin. Answers forbid scripts, frames and whatever else does not come from here.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qsl, urlencode

from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

COOKIE = "lifelong-token"
MOST_BYTES = 64 * 2**20  # of a request
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; img-src 'self' data:; style-src 'self'; "
        "style-src-attr 'unsafe-inline'; script-src 'self'; connect-src 'self'; "
        "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",  # what is forgotten must not lie in a browser
}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Gate:
    """An ASGI application in front of another one. close: lets go of what that one holds; its
    lifespan does so too, where a server has begun it."""

    def __init__(
        self, app: Any, *, token: str, hosts: frozenset[str], close: Callable[[], None]
    ) -> None:
        self.app, self.token, self.hosts, self.close = app, token, hosts, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                names = {name.lower() for name, _ in message["headers"]}
                message["headers"] += [
                    (name.lower().encode(), value.encode())
                    for name, value in HEADERS.items()
                    if name.lower().encode() not in names
                ]
            await send(message)

        refused = self._refusal(Request(scope))
        if refused is not None:
            await refused(scope, receive, guarded)
            return
        await self.app(scope, _limited(receive), guarded)

    def _refusal(self, request: Request) -> Response | None:
        host = request.headers.get("host", "")
        if host not in self.hosts:
            return PlainTextResponse(
                f"This page answers to {' and '.join(sorted(self.hosts))}, not to that name.\n", 421
            )
        given = request.query_params.get("token")
        if given is not None and request.method == "GET":
            if not hmac.compare_digest(given.encode(), self.token.encode()):
                return _unknown()
            rest = [(k, v) for k, v in parse_qsl(request.url.query) if k != "token"]
            where = request.url.path + (f"?{urlencode(rest)}" if rest else "")
            answer = RedirectResponse("/" + where.lstrip("/\\"), 303)
            answer.set_cookie(
                f"{COOKIE}-{host.rpartition(':')[2]}", self.token, httponly=True, samesite="strict"
            )
            return answer
        cookie = request.cookies.get(f"{COOKIE}-{host.rpartition(':')[2]}", "")
        if not hmac.compare_digest(cookie.encode(), self.token.encode()):
            return _unknown()
        if request.method not in _SAFE and request.headers.get("origin") != f"http://{host}":
            return PlainTextResponse("This request does not come from this page.\n", 403)
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            return PlainTextResponse(f"At most {MOST_BYTES >> 20} MB can be sent at once.\n", 413)
        return None


def _unknown() -> Response:
    return PlainTextResponse(
        "Open the address that `lifelong ui` has printed: it has the token of this session.\n", 403
    )


def _limited(receive: Receive) -> Receive:
    """Also of a body that does not tell its length."""
    seen = 0

    async def limited() -> MutableMapping[str, Any]:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > MOST_BYTES:
            return {"type": "http.disconnect"}
        return message

    return limited
