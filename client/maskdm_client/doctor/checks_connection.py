"""What `maskdm-client doctor` looks at on the way to the coordinator. It asks whether the server is well, no more."""

import socket
import ssl
import time
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import httpx

from maskdm.errors import plain

from .checks import Check, left

SECONDS = 10.0  # for each step of a connection
# How far this machine's clock may lie ahead of and behind the server's for Flower to take a signature, in seconds.
AHEAD, BEHIND = 5.0, 305.0
# OpenSSL's numbers of what is wrong with a certificate.
NOT_YET, EXPIRED, OTHER_NAMES = 9, 10, (62, 64)


@dataclass(frozen=True)
class Answer:
    """What a server that is well says."""

    status: int
    date: datetime | None  # of the server's clock, whole seconds
    asked: float  # by this machine's clock, seconds since 1970
    expires: datetime | None = None  # of its certificate


def proxy_for(host: str) -> SplitResult | None:
    """The institution's proxy on the way to a host, from the environment, as Flower's own client takes it."""
    found = urllib.request.getproxies()
    address = found.get("https") or found.get("all")
    if not address or urllib.request.proxy_bypass(host):
        return None
    return urlsplit(address if "//" in address else f"http://{address}")


def name_resolution(host: str) -> Check:
    """Whether the server's name leads to an address; with a proxy, the proxy's name."""
    proxy = proxy_for(host)
    name = (proxy.hostname or host) if proxy else host
    through = " (the proxy in the environment)" if proxy else ""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        remedy = "look at the name, at this machine's DNS, and whether it needs a VPN"
        return Check("name resolution", False, f"{name}{through} has no address ({error})", remedy)
    return Check("name resolution", True, f"{name}{through} is {', '.join(sorted(found))}")


def connection(host: str, port: int, authority: Path | None) -> tuple[Check, Answer | None]:
    """Whether the server answers, and as whom.

    Args:
        authority: certificate that the server's must be signed by; None asks in the clear.
    """
    name, where = "connection", f"{host}:{port}"
    try:
        answer = _ask(host, port, authority)
    except (OSError, httpx.HTTPError, httpx.InvalidURL, ImportError) as error:  # the last of a proxy that speaks SOCKS
        return Check(name, False, *_problem(error, host, port, authority)), None
    if answer.status != 200:
        remedy = "see whether the address is the coordinator's, and whether something in between answers"
        return Check(name, False, f"{where} answers {answer.status} to /health", remedy), None
    if answer.expires is None:
        return Check(name, True, f"{where} answers in the clear: nobody knows who it is"), answer
    certificate = left(answer.expires, datetime.now(UTC))
    return Check(name, True, f"{where} answers under the kit's authority, its certificate is {certificate}"), answer


def clock(answer: Answer) -> Check:
    """Whether this machine's clock is near enough to the server's for signatures to be taken."""
    if answer.date is None:
        return Check("clock", None, "the server does not say what time it is")
    ahead = answer.asked - (answer.date.timestamp() + 0.5)
    # A server states whole seconds, of up to a second ago.
    found = f"about {abs(ahead):,.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's"
    if -BEHIND < ahead < AHEAD:
        return Check("clock", True, found)
    allowed = f"; at most {AHEAD:.0f} s ahead and {BEHIND:.0f} s behind are accepted"
    return Check("clock", False, found + allowed, "set this machine's clock, e.g. by NTP")


def _ask(host: str, port: int, authority: Path | None) -> Answer:
    """Through the institution's proxy where it has one, as Flower's own client, which is the same, goes."""
    where = f"{'https' if authority else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
    trusted = ssl.create_default_context(cafile=str(authority) if authority else None)
    with (
        httpx.Client(verify=trusted, timeout=SECONDS) as client,
        client.stream("GET", f"{where}/health") as response,
    ):
        arrived = time.time()
        line = response.extensions["network_stream"].get_extra_info("ssl_object")
        ends = line and datetime.fromtimestamp(ssl.cert_time_to_seconds(line.getpeercert()["notAfter"]), UTC)
        return Answer(response.status_code, _date(response.headers.get("date")), arrived, ends)


def _date(said: str | None) -> datetime | None:
    try:
        found = parsedate_to_datetime(said or "")
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _problem(error: Exception, host: str, port: int, authority: Path | None) -> tuple[str, str]:
    """What was found and what to do, for a connection that failed."""
    cause: BaseException = error
    while cause.__context__:  # what httpx has made of it says less
        cause = cause.__context__
    where = f"{host}:{port}"
    if isinstance(cause, ssl.SSLCertVerificationError):
        return _problem_of_certificate(cause, host)
    if isinstance(cause, TimeoutError):
        remedy = "a firewall may be in between; ask whether the coordinator serves, and under which address"
        return f"{where} did not answer within {SECONDS:.0f} s", remedy
    if isinstance(cause, ConnectionRefusedError):
        return f"nobody listens at {where}", "ask whether the coordinator serves, and under which address"
    if authority and isinstance(cause, ssl.SSLError | ConnectionError) and _speaks_plain(host, port):
        remedy = "ask the coordinator to start it with --tls; do not join it in the clear instead"
        return f"{where} serves in the clear, without TLS", remedy
    if authority is None and isinstance(error, httpx.RemoteProtocolError | httpx.ReadError):
        return f"{where} does not answer in the clear ({plain(str(cause))})", "it may speak TLS: ask for a --kit"
    remedy = "look at this machine's network, at firewalls and at the proxy in the environment (HTTPS_PROXY, NO_PROXY)"
    return f"no connection to {where} ({plain(str(cause))})", remedy


def _problem_of_certificate(error: ssl.SSLCertVerificationError, host: str) -> tuple[str, str]:
    if error.verify_code in OTHER_NAMES:
        remedy = (
            f"use the address in the kit, or ask the coordinator for a certificate with it (provision --san {host})"
        )
        return f"the server's certificate is not for {host}", remedy
    if error.verify_code == EXPIRED:
        remedy = "ask the coordinator to renew it (provision renew); see that this machine's date is right"
        return "the server's certificate has expired", remedy
    if error.verify_code == NOT_YET:
        return "the server's certificate is not valid yet", "set this machine's clock, e.g. by NTP"
    remedy = (
        "compare the fingerprint with the coordinator and ask for this server's kit; a proxy that opens TLS looks the "
        "same"
    )
    return f"the server is not of the kit's authority ({error.verify_message})", remedy


def _speaks_plain(host: str, port: int) -> bool:
    """Whether what refused TLS answers without it."""
    try:
        with socket.create_connection((host, port), timeout=SECONDS) as line:
            line.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            return line.recv(16).startswith(b"HTTP/")
    except OSError:
        return False
