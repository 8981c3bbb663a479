"""HOST:PORT as people write it in options and kits."""

import re
from ipaddress import IPv6Address

from ..errors import UsageError

NAME = re.compile(r"\w([\w.-]{0,251}[\w.])?")  # or an IPv4 address
PORT = re.compile("[0-9]{1,5}")


def host_and_port(option: str, text: str) -> tuple[str, int]:
    """'example.org:8000' → ('example.org', 8000); '[::1]:8000' → ('::1', 8000).

    Raises:
        UsageError: anything else; an IPv6 address without brackets is told how it is written.
    """
    host, _, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    bracketed = host == f"[{bare}]"
    if _is_ipv6(text) or (_is_ipv6(host) and not bracketed):
        raise UsageError(f"{option} {text}: an IPv6 address goes in brackets, e.g. [::1]:8000")
    named = _is_ipv6(bare) if bracketed else NAME.fullmatch(host)
    if not named or not PORT.fullmatch(port) or not 0 < int(port) < 65536:
        raise UsageError(f"{option} {text}: give HOST:PORT, e.g. maskdm.example.org:8000")
    return bare, int(port)


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except ValueError:
        return False
    return True
