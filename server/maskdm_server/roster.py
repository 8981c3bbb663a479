"""Keeps the nodes that a SuperLink lets in the same as the list of sites, while it runs, and knows them by name."""

import json
import math
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives import serialization

from maskdm.errors import FederationError, UsageError
from maskdm.runfolder import write_json
from maskdm.seeding import derive_seed
from maskdm_server.control import Control
from maskdm_server.sites import SITES, Site, read_sites

NODES = "nodes.json"
LOOK_SECONDS = 2.0


class Roster:
    """Registered keys and the nodes that stand for them; `nodes.json` tells the rounds the names."""

    def __init__(self, folder: Path, home: Path, say: Callable[[str], None]) -> None:
        """Read the list once.

        Args:
            folder: what `provision` made for the server.
            home: where to write which node is which site.

        Raises:
            UsageError: the list cannot be read.
        """
        self._list, self._path, self._say = folder / SITES, home / NODES, say
        self._sites = read_sites(self._list)
        self._nodes: dict[str, tuple[int, Site]] = {}  # by public key
        self._written: dict[str, str] = {}
        self._looked, self._problem = -math.inf, ""

    def follow(self, control: Control) -> None:
        """Register who is new, remove who was revoked or has expired; looks every few seconds at most."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked, now = time.monotonic(), datetime.now(UTC)
        try:
            self._sites, self._problem = read_sites(self._list), ""
        except UsageError as error:  # somebody is editing it; whoever was in stays in
            self._tell(str(error))
        valid = {site.public_key: site for site in self._sites if site.is_valid(now)}
        try:
            for key in self._nodes.keys() - valid.keys():
                control.unregister(self._nodes[key][0])
                self._say(f"{self._nodes.pop(key)[1].name} is let in no more: its kit was revoked or has expired")
            for key in [key for key in valid if key not in self._nodes]:
                self._nodes[key] = control.register(valid[key].name, _pem(key)), valid[key]
        except FederationError as error:  # a SuperLink that is being started again; it keeps who was registered
            self._tell(str(error))
        names = {str(node): site.name for node, site in self._nodes.values()}
        if names != self._written:
            write_json(self._path, names)
            self._written = names

    def _tell(self, problem: str) -> None:
        if problem != self._problem:
            self._say(f"WARNING: {problem}")
        self._problem = problem


class Named:
    """Nodes by the names of their sites, for the rounds. A site that comes back with another key is the same site."""

    def __init__(self, federation: Path) -> None:
        self._path = federation / ".flwr" / NODES
        self._sites: dict[int, int] = {}
        self._names: dict[int, str] = {}

    def site(self, node: int) -> int:
        """The number by which a federation knows a node, through restarts; without kits that of the node."""
        if node not in self._sites:
            self._read()
        return self._sites.get(node, node)

    def name(self, site: int) -> str:
        """The name in a site's kit, or its number."""
        return self._names.get(site, str(site))

    def _read(self) -> None:
        with suppress(OSError, ValueError):
            for node, name in json.loads(self._path.read_text()).items():
                self._sites[int(node)] = derive_seed("site", name)
                self._names[derive_seed("site", name)] = name


def _pem(public_key: str) -> bytes:
    key = serialization.load_ssh_public_key(public_key.encode())
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
