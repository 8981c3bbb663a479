"""A site without processes of its own, for simulations: the same work, called as a function."""

from pathlib import Path

from maskdm.federated.auditlog import AUDIT
from maskdm.federated.parcel import Parcel
from maskdm.federated.policy import SitePolicy
from ..gate.gate import release
from ..gate.record_incoming import record_plan
from .local_data import SLICE, choose_slice
from ..folder.settings import load_settings
from .answer import answer as answer_plan


def join(folder: Path) -> None:
    """Choose the slice of the site of a folder, whose settings are there, unless that is done."""
    if not (folder / SLICE).exists():
        choose_slice(load_settings(folder), folder)


def answer(document: str, weights: bytes, folder: Path) -> Parcel:
    """Do what a plan asks at the site of a folder; its slice is chosen at the first time."""
    join(folder)
    audit = folder / AUDIT
    record_plan(audit, 0, document, weights)
    parcel = answer_plan(document, weights, folder)
    failed = bool(parcel.scalars["outcome"])  # a code leaves whatever the policy says, and where it cannot be read
    return release(
        parcel, int(parcel.scalars["round"]), SitePolicy() if failed else load_settings(folder).policy, audit
    )
