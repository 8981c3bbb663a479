"""A site without processes of its own, as simulations use it: the one door between the two sides on one machine.

The client declares it as an entry point, so that neither side imports the other, or knows the other's files.
"""

from collections.abc import Mapping, Set
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from ..errors import UsageError
from .parcel import Parcel

GROUP = "maskdm.site"
SITES = "sites"  # of a federation's folder


class VirtualSite(Protocol):
    """What the client does for a simulation; all of a site is in its folder."""

    def prepare(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Make the folder, with options of `maskdm-client` by name."""

    def join(self, folder: Path) -> Set[str]:
        """Choose the slice, unless that is done; returns the sha256 of the images' bytes that are trained on."""

    def answer(self, document: str, weights: bytes, folder: Path) -> Parcel:
        """Do what a plan asks; joins at the first time."""


def virtual_site() -> VirtualSite:
    """That of the installed client.

    Raises:
        UsageError: none is installed, or several are.
    """
    found = entry_points(group=GROUP)
    if len(found) != 1:
        raise UsageError(f"{len(found)} packages offer a virtual site ({GROUP}), not one: pip install maskdm anew")
    site: VirtualSite = found[min(found.names)].load()
    return site


def folder_of(sites: Path, number: int) -> Path:
    """Of the site of a number, from 1 on, below the folder of all that are simulated."""
    return sites / f"site-{number}" / "client"
