"""A site without processes of its own, for simulations: the same work, called as a function.

The entry point `maskdm.site`, see `maskdm.federated.virtual.VirtualSite`.
"""

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from maskdm.data.sources.source import open_source
from maskdm.federated.auditlog import AUDIT
from maskdm.federated.parcel import Parcel
from maskdm.federated.policy import SitePolicy
from maskdm.run.runfolder import write_json

from ..folder.settings import SiteSettings, load_settings
from ..gate.gate import release
from ..gate.record_incoming import record_plan
from .answer import answer as answer_plan
from .local_data import SLICE, choose_slice, read_slice
from .weights import PlanWithWeights


def prepare(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a site, as `maskdm-client` does."""
    found = SiteSettings.model_validate(settings)
    write_json(folder / "config.json", {"kind": "client", "site": found.model_dump(mode="json")})


def join(folder: Path) -> Set[str]:
    """Choose the slice of the site of a folder, unless that is done; sha256 of what is trained on."""
    _choose_slice(folder)
    return read_slice(folder).train.keys()


def _choose_slice(folder: Path) -> None:
    if not (folder / SLICE).exists():
        settings = load_settings(folder)
        choose_slice(open_source(settings.data), settings, folder)


def answer(document: str, weights: bytes, folder: Path) -> Parcel:
    """Do what a plan asks at the site of a folder; its slice is chosen at the first time."""
    _choose_slice(folder)
    audit = folder / AUDIT
    record_plan(audit, 0, document, weights)
    parcel = answer_plan(PlanWithWeights(document, weights), folder)
    failed = bool(parcel.scalars["outcome"])  # a code leaves whatever the policy says, and where it cannot be read
    return release(
        parcel, int(parcel.scalars["round"]), SitePolicy() if failed else load_settings(folder).policy, audit
    )
