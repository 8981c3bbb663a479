"""`serve --dashboard PORT`: the federation's report, live, for a browser on this machine.

Whoever reads it costs nothing: pages are made at most every few seconds, and take a small share of one core however
many look. It listens on loopback only, and only under the names of loopback, so that no page of the internet can read
it through the browser (DNS rebinding). Other users of this machine can connect, too: its address holds a random token,
as those of notebooks do. It answers GET and HEAD of `/TOKEN/` and `/TOKEN/?still`, which does not load itself again.
"""

import asyncio
import secrets
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import uvicorn
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from maskdm.errors import UsageError
from maskdm.run.reporting import say

from ..door.connections import Protocol
from .federation_page import federation_page
from .gather import FederationFolder
from .page.blocks import colophon, page
from .page.markup import SECURITY_POLICY, tag, together

LOOPBACK = "127.0.0.1"
NAMES = ("127.0.0.1", "localhost")
REFRESH_SECONDS = 5
STILL = "still"  # for who reads it slowly, or has it read aloud
TOKEN_BYTES = 24
SHARE = 20  # making a page takes one part in so many of the time, at most
MOST_CONNECTIONS = 32
LEAVE_SECONDS = 5  # for answers that are under way at the end

HEADERS = {
    "Server": "MaskDM",
    "Content-Security-Policy": f"{SECURITY_POLICY}; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class LivePage:
    """The page as it is now, made anew when it is asked for and old enough."""

    def __init__(self, make: Callable[[], str], clock: Callable[[], float] = time.monotonic) -> None:
        self._make, self._clock = make, clock
        self._lock = threading.Lock()
        self._content, self._due, self._problem = b"", -float("inf"), ""

    def content(self) -> bytes:
        """UTF-8; empty where no page could be made yet. Whoever comes while one is made gets the one before."""
        if self._lock.acquire(blocking=not self._content):
            try:
                began = self._clock()
                if began >= self._due:
                    self._renew()
                    ended = self._clock()
                    self._due = ended + max(REFRESH_SECONDS / 2, (SHARE - 1) * (ended - began))
            finally:
                self._lock.release()
        return self._content

    def _renew(self) -> None:
        try:
            self._content, self._problem = self._make().encode(), ""
        except Exception as error:  # whatever it is, it is no reason to disturb a federation
            problem = f"WARNING: --dashboard: {type(error).__name__}: {error}"
            if problem != self._problem:
                say(problem)
            self._problem = problem


class Dashboard:
    """Serves the live page of a federation's folder from threads of its own while the `with` lasts."""

    def __init__(self, folder: Path, port: int) -> None:
        """Listen; nothing is answered yet.

        Raises:
            UsageError: the port is in use.
        """
        try:
            self._socket = socket.create_server((LOOPBACK, port))
        except OSError as error:
            raise UsageError(f"--dashboard {port} on {LOOPBACK} is in use or not ours: choose another port") from error
        token = secrets.token_urlsafe(TOKEN_BYTES)
        config = uvicorn.Config(
            answering(LivePage(_maker(folder)), token),
            http=Protocol,  # which ends connections that say nothing
            limit_concurrency=MOST_CONNECTIONS,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=LEAVE_SECONDS,
        )
        self._server = uvicorn.Server(config)
        self.port = int(self._socket.getsockname()[1])
        self.address = f"http://{LOOPBACK}:{self.port}/{token}/"
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="dashboard")

    def __enter__(self) -> Self:
        self._thread.start()
        say(f"dashboard: {self.address} (on this machine only; whoever has this address can read it)")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join()


def answering(live: LivePage, token: str) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """An ASGI application that shows a page to who knows its token."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await (await answer(Request(scope)))(scope, receive, send)

    async def answer(request: Request) -> Response:
        hosts = [host.lower() for host in request.headers.getlist("host")]
        path, query, known = request.scope["raw_path"], request.scope["query_string"], f"/{token}/".encode()
        if request.method not in ("GET", "HEAD"):
            return said(405, "Only GET and HEAD are answered.")
        if len(hosts) != 1 or not {hosts[0], hosts[0].rpartition(":")[0]} & {*NAMES}:
            return said(403, "This page is for browsers on this machine, under the name localhost.")
        if not secrets.compare_digest(path, known) or query not in (b"", STILL.encode()):
            return said(404, "There is nothing here; the terminal says where the page is.")
        content = await asyncio.to_thread(live.content)
        if not content:
            return said(503, "The page could not be made; the terminal says why.")
        again = {} if query else {"Refresh": str(REFRESH_SECONDS)}
        return Response(content, 200, {**HEADERS, **again}, "text/html")

    def said(status: int, line: str) -> Response:
        return PlainTextResponse(f"{line}\n", status, HEADERS)

    return app


def _maker(folder: Path) -> Callable[[], str]:
    federation = FederationFolder(folder)
    note = together(
        f"It loads itself again every {REFRESH_SECONDS} seconds: ",
        tag("a", "keep it still", href=f"?{STILL}"),
        ", or ",
        tag("a", "live", href="."),
        ".",
    )

    def make() -> str:
        now = time.time()
        found = federation.look(thorough=False)
        if found is None:
            lines = ["It is being prepared."]
            return page("MaskDM federation", folder.resolve().name, [], lines, colophon(now, note))
        return federation_page(found, written=now, note=note)

    return make
