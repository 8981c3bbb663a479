"""Where the coordinator is, and whether this site may speak to it in the clear."""

from ipaddress import ip_address

from maskdm.errors import UsageError
from maskdm.federated.kit import OpenedKit
from maskdm.run.address import host_and_port

USUAL = "127.0.0.1:8000"
BANNER = """\
*******************************************************************************************
* INSECURE: no --kit, so nothing is encrypted, and nobody knows who the coordinator is.   *
* Use it on one machine or a closed network only; your coordinator can give you a kit.    *
*******************************************************************************************"""


def address_of(server: str | None, kit: OpenedKit | None, insecure: bool) -> tuple[str, int]:
    """Host and port of the coordinator.

    Raises:
        UsageError: not HOST:PORT; or another machine without a kit, which must be asked for.
    """
    given = server or (kit.kit.server if kit else USUAL)
    host, port = host_and_port("--server", given)
    if not kit and not insecure and not _is_loopback(host):
        raise UsageError(
            f"--server {given} is another machine: give the --kit that its coordinator made for you, or --insecure to "
            f"connect in the clear"
        )
    return host, port


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
