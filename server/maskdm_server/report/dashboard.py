"""`serve --dashboard PORT`: the federation's report, live, for a browser on this machine.

Whoever reads it costs nothing: pages are made at most every few seconds, and take a small share of one core however
many look. It listens on loopback only, and only under the names of loopback, so that no page of the internet can read
it through the browser (DNS rebinding). Other users of this machine can connect, too: its address holds a random token,
as those of notebooks do. It answers GET and HEAD of `/TOKEN/` and `/TOKEN/?still`, which does not load itself again.
"""

import secrets
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from maskdm.errors import UsageError
from maskdm.run.reporting import say

from .federation_page import federation_page
from .gather import FederationFolder
from .page.blocks import colophon, page
from .page.markup import SECURITY_POLICY, tag, together

LOOPBACK = "127.0.0.1"
NAMES = ("127.0.0.1", "localhost")
REFRESH_SECONDS = 5
STILL = "?still"  # for who reads it slowly, or has it read aloud
TOKEN_BYTES = 24
SHARE = 20  # making a page takes one part in so many of the time, at most
IDLE_SECONDS = 10.0  # for a request to come
POLL_SECONDS = 0.1  # how soon the end is noticed

PLAIN = {"Content-Type": "text/plain; charset=utf-8"}
HEADERS = {
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
        live, secret = LivePage(_maker(folder)), secrets.token_urlsafe(TOKEN_BYTES)

        class Bound(Handler):
            source, token = live, secret

        try:
            self._server = _Server((LOOPBACK, port), Bound)
        except OSError as error:
            raise UsageError(f"--dashboard {port} on {LOOPBACK} is in use or not ours: choose another port") from error
        self.port = int(self._server.server_address[1])
        self.address = f"http://{LOOPBACK}:{self.port}/{secret}/"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(POLL_SECONDS,), name="dashboard")

    def __enter__(self) -> Self:
        self._thread.start()
        say(f"dashboard: {self.address} (on this machine only; whoever has this address can read it)")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no event."""


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    source: LivePage
    token: str
    timeout = IDLE_SECONDS
    server_version, sys_version = "MaskDM", ""

    def do_GET(self) -> None:
        """The page."""
        self._answer()

    def do_HEAD(self) -> None:
        """Its headers."""
        self._answer()

    def _answer(self) -> None:
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or (hosts[0].rpartition(":")[0].lower() not in NAMES and hosts[0].lower() not in NAMES):
            self._say(HTTPStatus.FORBIDDEN, b"This page is for browsers on this machine, under the name localhost.\n")
        elif (view := self._view()) is None:
            self._say(HTTPStatus.NOT_FOUND, b"There is nothing here; the terminal says where the page is.\n")
        elif content := self.source.content():
            again = {} if view == STILL else {"Refresh": str(REFRESH_SECONDS)}
            self._say(HTTPStatus.OK, content, {"Content-Type": "text/html; charset=utf-8"} | again)
        else:
            self._say(HTTPStatus.SERVICE_UNAVAILABLE, b"The page could not be made; the terminal says why.\n")

    def _view(self) -> str | None:
        """What of the page is asked for: nothing, or STILL; None without the token, or where there is no such thing."""
        known, found = f"/{self.token}/", self.path[: len(self.token) + 2]
        view = self.path[len(known) :]
        is_known = secrets.compare_digest(known.encode(), found.encode(errors="replace"))
        return view if is_known and view in ("", STILL) else None

    def _say(self, status: HTTPStatus, content: bytes, about: Mapping[str, str] = PLAIN) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Length": str(len(content)), **about}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with suppress(ConnectionError, TimeoutError):
                self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """For what the base class refuses: other methods, and what is no HTTP."""
        status = HTTPStatus.METHOD_NOT_ALLOWED if code == HTTPStatus.NOT_IMPLEMENTED else HTTPStatus(code)
        self.close_connection = True
        self._say(status, b"Only GET and HEAD are answered.\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Reloads are no event."""


def _maker(folder: Path) -> Callable[[], str]:
    federation = FederationFolder(folder)
    note = together(
        f"It loads itself again every {REFRESH_SECONDS} seconds: ",
        tag("a", "keep it still", href=STILL),
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
