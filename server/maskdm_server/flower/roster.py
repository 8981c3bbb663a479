"""Keeps the nodes that a SuperLink lets in the same as the list of sites, while it runs, and knows them by name."""

import json
import math
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from maskdm.errors import FederationError, UsageError
from maskdm.run.runfolder import write_json
from maskdm.seeding import derive_seed

from ..door.keys import KEYS
from ..kits.sites import SITES, Site, read_sites
from .control import Control

NODES = "nodes.json"
LOOK_SECONDS = 2.0


class Roster:
    """Registered keys and the nodes that stand for them; files tell the rounds their names, and the door their keys."""

    def __init__(self, folder: Path, home: Path, say: Callable[[str], None]) -> None:
        """Read the list once.

        Args:
            folder: what `provision` made for the server.
            home: where to write which node is which site, and whose key is whose.

        Raises:
            UsageError: the list cannot be read.
        """
        self._list, self._path, self._keys, self._say = folder / SITES, home / NODES, home / KEYS, say
        self._sites = read_sites(self._list)
        self._let_in: list[Site] | None = None
        self._looked, self._problem = -math.inf, ""

    def follow(self, control: Control) -> None:
        """Register who is new, remove who was revoked or has expired; looks every few seconds at most."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked, now = time.monotonic(), datetime.now(UTC)
        try:
            self._sites = read_sites(self._list)
        except UsageError as error:  # somebody is editing it; whoever was in stays in
            self._tell(str(error))
            return
        valid = [site for site in self._sites if site.is_valid(now)]
        if valid == self._let_in:
            return
        try:
            self._make_so(control, valid)
        except (FederationError, OSError) as error:  # a SuperLink that is being started again, a full disk: next time
            self._tell(str(error))
        else:
            self._let_in, self._problem = valid, ""

    def _make_so(self, control: Control, valid: list[Site]) -> None:
        """Whatever was done before, and whether its answer came or not: what the SuperLink has is looked at first."""
        there, wanted = control.nodes(), {site.pem(): site for site in valid}
        known = {site.pem(): site.name for site in self._sites}
        for key in there.keys() - wanted.keys():
            control.unregister(there[key])
            self._say(f"{known.get(key, 'a site')} is let in no more: its kit was revoked or has expired")
        names, keys = {}, {}
        for key, site in wanted.items():
            node = there.get(key) or control.register(site.name, key)
            names[str(node)], keys[key.decode()] = site.name, node
        write_json(self._path, names)
        write_json(self._keys, keys)

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

    def nodes(self, there: Iterable[int]) -> dict[int, int]:
        """Of each site the node that is there; of a site with two keys the one that was let in later."""
        left = set(there)
        if not left <= self._sites.keys():
            self._read()
        named = [node for node in self._sites if node in left]
        return {self._sites.get(node, node): node for node in (*(left - set(named)), *named)}

    def name(self, site: int) -> str:
        """The name in a site's kit, or its number."""
        return self._names.get(site, str(site))

    def _read(self) -> None:
        with suppress(OSError, ValueError):
            for node, name in json.loads(self._path.read_text()).items():
                self._sites[int(node)] = derive_seed("site", name)
                self._names[derive_seed("site", name)] = name
