"""The live page over a real connection: who may read it, what it says, and that reloads cost nothing."""

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from urllib.parse import urljoin, urlsplit, urlunsplit

import pytest

from maskdm.commands import command_line as cli
from maskdm.errors import UsageError
from maskdm.run.processes import free_port
from maskdm.run.runfolder import owned
from maskdm_server.commands.app import app
from maskdm_server.door import connections
from maskdm_server.report.dashboard import REFRESH_SECONDS, SHARE, Dashboard, LivePage

from ..conftest import InProcess, federate, learner
from .test_gather import configured


@pytest.fixture
def dashboard(folder: Path) -> Iterator[Dashboard]:
    with Dashboard(folder, free_port()) as found:
        yield found


def ask(
    dashboard: Dashboard, method: str = "GET", path: str | None = None, **headers: str
) -> tuple[HTTPResponse, bytes]:
    """The page, or what is relative to it."""
    target = urlsplit(urljoin(dashboard.address, path or ""))
    connection = HTTPConnection("127.0.0.1", dashboard.port, timeout=60)
    try:
        connection.putrequest(method, urlunsplit(("", "", *target[2:])), skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


def test_a_browser_on_this_machine_sees_the_federation_and_comes_back(dashboard: Dashboard, folder: Path) -> None:
    configured(folder)
    federate(InProcess({1: learner(0.1), 2: learner(0.1)}), folder)
    with owned(folder):
        response, content = ask(dashboard)
    page = content.decode()
    assert response.status == 200
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "3 of 3 rounds are done" in page
    assert response.headers["Refresh"] == str(REFRESH_SECONDS)
    assert "is not verified on the live page" in page


def test_whoever_reads_slowly_finds_a_page_that_stays_as_it_is(dashboard: Dashboard) -> None:
    _, content = ask(dashboard)
    (still,) = re.findall(r'href="([^"]*)">keep it still<', content.decode())
    response, same = ask(dashboard, path=still)
    assert (response.status, response.headers["Refresh"], same) == (200, None, content)
    (live,) = re.findall(r'href="([^"]*)">live<', content.decode())
    assert ask(dashboard, path=live)[0].headers["Refresh"] == str(REFRESH_SECONDS)


def test_before_the_folder_is_made_ready_the_page_says_so(dashboard: Dashboard) -> None:
    response, content = ask(dashboard)
    assert response.status == 200
    assert b"It is being prepared." in content


def test_the_headers_let_the_page_load_and_run_nothing_and_be_kept_nowhere(dashboard: Dashboard) -> None:
    for method in ("GET", "HEAD"):
        response, _ = ask(dashboard, method)
        policy = response.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline';")
        assert "frame-ancestors 'none'" in policy
        assert response.headers["Cache-Control"] == "no-store"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert "Python" not in response.headers["Server"]


def test_head_has_the_length_of_the_page_and_nothing_else(dashboard: Dashboard) -> None:
    response, content = ask(dashboard, "HEAD")
    assert (response.status, content) == (200, b"")
    assert int(response.headers["Content-Length"]) > 1000


@pytest.mark.parametrize("host", ["127.0.0.1:8500", "localhost:9000", "localhost", "LOCALHOST:1"])
def test_a_tunnel_with_another_port_is_still_this_machine(dashboard: Dashboard, host: str) -> None:
    assert ask(dashboard, Host=host)[0].status == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil:1", ""])
def test_under_a_foreign_name_nothing_is_told(dashboard: Dashboard, host: str) -> None:
    response, content = ask(dashboard, Host=host)
    assert response.status == 403
    assert b"<html" not in content


@pytest.mark.parametrize("path", ["audit.jsonl", "../config.json", "?x", "?still&x", "index.html", "./?stil"])
def test_there_is_nothing_but_the_page(dashboard: Dashboard, path: str) -> None:
    assert ask(dashboard, path=path)[0].status == 404


def raw(dashboard: Dashboard, target: bytes) -> bytes:
    """The answer to a request for a target as it is."""
    with socket.create_connection(("127.0.0.1", dashboard.port), timeout=60) as browser:
        browser.sendall(b"GET " + target + b" HTTP/1.0\r\nHost: localhost\r\n\r\n")
        return b"".join(iter(lambda: browser.recv(4096), b""))


def token_of(dashboard: Dashboard) -> str:
    return urlsplit(dashboard.address).path.strip("/")


@pytest.mark.parametrize(
    "change", ["none", "still", "short", "long", "other", "case", "no slash", "query", "not ASCII", "*"]
)
def test_who_has_not_the_token_learns_nothing(dashboard: Dashboard, change: str) -> None:
    """Another user of this machine, say: each answer is that to any other path."""
    token = token_of(dashboard)
    other = token[:-1] + ("A" if token[-1] != "A" else "B")
    target = {
        **{"none": "/", "still": "/?still", "short": f"/{token[:-1]}/", "long": f"/{token}x/", "other": f"/{other}/"},
        **{"case": f"/{token.swapcase()}/", "no slash": f"/{token}", "query": f"/?token={token}", "*": "*"},
        **{"not ASCII": f"/{token[:-1]}%FF/"},
    }[change]
    answer = raw(dashboard, target.encode("latin-1"))
    assert answer.split(b"\r\n")[0].endswith(b"404 Not Found")
    assert b"<html" not in answer
    body = answer.partition(b"\r\n\r\n")[2]
    assert body == raw(dashboard, b"/elsewhere").partition(b"\r\n\r\n")[2]
    assert b"200 OK" in raw(dashboard, f"/{token}/".encode())


def test_the_token_is_long_new_each_time_and_said_once_and_nowhere_else(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configured(folder)
    with Dashboard(folder, free_port()) as dashboard:
        response, content = ask(dashboard)
        token = token_of(dashboard)
    assert response.headers["Referrer-Policy"] == "no-referrer"
    assert len(token) >= 32
    said = capsys.readouterr()
    assert (said.err.count(token), said.out) == (1, "")
    assert token not in content.decode()
    assert token not in str(response.headers)
    assert not [path for path in folder.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
    with Dashboard(folder, free_port()) as again:
        assert token_of(again) != token


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT"])
def test_nothing_can_be_done_to_it(dashboard: Dashboard, method: str) -> None:
    response, content = ask(dashboard, method)
    assert response.status == 405
    assert b"<html" not in content


def test_what_is_no_http_is_refused_and_the_next_one_is_served(dashboard: Dashboard) -> None:
    with socket.create_connection(("127.0.0.1", dashboard.port), timeout=60) as stranger:
        stranger.sendall(b"\x16\x03\x01\x02\x00\x01\r\n\r\n")
        while stranger.recv(4096):
            pass
    assert ask(dashboard)[0].status == 200


def test_nobody_reaches_it_from_another_address(dashboard: Dashboard) -> None:
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", dashboard.port), timeout=60)


def test_after_the_federation_nobody_listens(folder: Path) -> None:
    with Dashboard(folder, free_port()) as dashboard:
        assert ask(dashboard)[0].status == 200
    with pytest.raises(OSError, match="refused"):
        ask(dashboard)


def test_it_ends_at_once_whoever_is_still_connected_and_leaves_no_thread(folder: Path) -> None:
    before = set(threading.enumerate())
    with Dashboard(folder, free_port()) as dashboard, ExitStack() as browsers:
        assert ask(dashboard)[0].status == 200
        for begun in (
            b"",
            b"GET /",
            b"GET / HTTP/1.1\r\nHost: localhost\r\n",
            b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        ):
            browser = browsers.enter_context(socket.create_connection(("127.0.0.1", dashboard.port), timeout=60))
            browser.sendall(begun)
        assert browser.recv(9) == b"HTTP/1.1 "
        kept = browsers.pop_all()
    with kept:
        assert set(threading.enumerate()) == before


def test_a_port_in_use_is_one_line_and_nothing_was_begun(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UsageError, match=f"--dashboard {port}"):
            Dashboard(folder, port)
        command = ["serve", "--prior", str(folder / "prior.safetensors"), "--out", str(tmp_path / "out"), "--insecure"]
        assert cli.run(app, "maskdm-server", [*command, "--dashboard", str(port)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--dashboard {port} on 127.0.0.1 is in use or not ours: choose another port" in line
    assert not (tmp_path / "out" / "config.json").exists()


class Maker:
    """Makes pages on a clock of its own, each of which takes a while."""

    def __init__(self, seconds: float) -> None:
        self.now, self.made, self.seconds, self.broken = 0.0, 0, seconds, False

    def clock(self) -> float:
        return self.now

    def make(self) -> str:
        self.now += self.seconds
        self.made += 1
        if self.broken:
            raise OSError("the disk is gone")
        return f"page {self.made}"


def test_however_often_it_is_reloaded_making_it_takes_a_small_share_of_the_time() -> None:
    maker = Maker(seconds=2.0)
    page = LivePage(maker.make, maker.clock)
    while maker.now < 1000:
        assert page.content() == f"page {maker.made}".encode()
        maker.now += 0.1
    assert 0.9 * 1000 / SHARE <= maker.made * maker.seconds <= 1.1 * 1000 / SHARE


def test_what_goes_wrong_is_said_once_and_the_page_before_stays(capsys: pytest.CaptureFixture[str]) -> None:
    maker = Maker(seconds=0.0)
    page = LivePage(maker.make, maker.clock)
    maker.broken = True
    assert page.content() == b""
    maker.broken, maker.now = False, 100.0
    assert page.content() == b"page 2"
    maker.broken = True
    for second in (200.0, 300.0):
        maker.now = second
        assert page.content() == b"page 2"
    assert capsys.readouterr().err.splitlines() == 2 * ["WARNING: --dashboard: OSError: the disk is gone"]


def test_a_config_that_is_not_whole_is_no_error(dashboard: Dashboard, folder: Path) -> None:
    (folder / "config.json").write_text('{"kind": "federation"')
    assert ask(dashboard)[0].status == 200


def test_a_connection_that_says_nothing_ends(dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else any user of this machine could hold as many as this process may have files."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.1)
    with socket.create_connection(("127.0.0.1", dashboard.port), timeout=60) as stranger:
        assert stranger.recv(100) == b""
