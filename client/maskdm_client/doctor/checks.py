"""What `maskdm-client doctor` finds: one line each. Here those of the kit, the policy and the code that may run."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from rich.console import Console
from rich.text import Text

from maskdm.errors import UsageError
from maskdm.federated.bundle import bundle_sha256
from maskdm.federated.kit import POLICY, Kit, OpenedKit, open_kit
from maskdm.federated.parcel import REPORT_NAMES
from maskdm.federated.policy import SitePolicy, load_policy
from maskdm.run.reporting import say

# A kit or a certificate that ends sooner is worth a word.
SOON = timedelta(days=14)


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report."""

    check: str
    ok: bool | None  # None: it does not apply here
    found: str
    remedy: str = ""  # where it is not ok


def skipped(name: str, reason: str) -> Check:
    """A check that does not apply."""
    return Check(name, None, reason)


def mistake(name: str, error: Exception) -> Check:
    """A failure whose text says what to do after its last colon, as ours do."""
    found, _, remedy = " ".join(str(error).split()).rpartition(": ")
    return Check(name, False, found or remedy, remedy if found else "")


def show(check: Check) -> None:
    """Say it, in colour on a terminal."""
    mark, colour = {True: ("✓", "green"), False: ("✗", "red"), None: ("-", "bright_black")}[check.ok]
    line = f"{mark} {check.check:<15} {check.found}" + (f": {check.remedy}" if check.remedy else "")
    console = Console(stderr=True)
    if console.is_terminal:
        console.print(Text(line, style=colour), soft_wrap=True)
    else:
        say(line)


def left(until: datetime, now: datetime) -> str:
    """How long something is valid, with a word of warning near its end."""
    days = (until - now) // timedelta(days=1)
    soon = "" if until - now > SOON else ", WARNING: ends soon, ask the coordinator for a renewal"
    return f"valid until {until:%Y-%m-%d}, {days} days left{soon}"


def kit(path: Path, folder: Path, now: datetime) -> tuple[OpenedKit | None, Check]:
    """Whether a kit is whole, signed and in time; what is in it, where it is whole."""
    try:
        opened = open_kit(path, folder)
    except UsageError as error:
        return None, mistake("kit", error)
    about = opened.kit
    if problem := about.problem(now):
        return opened, mistake("kit", UsageError(f"{about.name}'s kit cannot be used, {problem}"))
    changed = "as the coordinator proposed it" if opened.policy_is_as_made else "changed by this site"
    return opened, Check(
        "kit",
        True,
        f"{about.name} at {about.server}, signature holds, {left(about.expires, now)}; {POLICY} is {changed}; "
        f"compare the authority's fingerprint with the coordinator: {opened.fingerprint()}",
    )


def policy(path: Path | None, opened: OpenedKit | None) -> tuple[SitePolicy | None, Check]:
    """Whether the policy can be read, and lets the site take part at all."""
    try:
        terms = load_policy(path or (opened.folder / POLICY if opened else None))
    except UsageError as error:
        return None, mistake("policy", error)
    origin = str(path) if path else "the kit's" if opened else "the default"
    if terms.require_dp:
        found = f"{origin}: only training with differential privacy, which this version has not: no plan is accepted"
        return terms, Check("policy", False, found, "set require-dp = false, or do not join")
    if missing := [name for name in REPORT_NAMES if name not in terms.metrics]:
        found = f"{origin}: {', '.join(missing)} may not leave, so no update may"
        return terms, Check("policy", False, found, "list them under metrics, or do not join")
    return terms, Check("policy", True, f"{origin}: {allows(terms)}")


def allows(terms: SitePolicy) -> str:
    """A policy in one line."""
    norm = f" and {terms.max_norm:g}" if terms.max_norm else ""
    size = f"{terms.max_bytes_per_round:,} bytes" if terms.max_bytes_per_round else "any size"
    rounds = f"{terms.max_rounds_per_day:,} a day"
    quality = terms.quality_names()
    return (
        f"updates of {size}, {rounds}, no longer than {terms.max_relative_norm:g} of the model's norm{norm}, with all "
        f"{len(REPORT_NAMES)} numbers, from {terms.min_images:,} images on"
        + (f", and of {terms.max_evaluations_per_day} evaluations a day {', '.join(quality)}" if quality else "")
        + (", the first after somebody here approves it" if terms.approve_first_round else "")
    )


def bundle(about: Kit, terms: SitePolicy) -> Check:
    """Whether the code that the kit pins is what this version would run."""
    installed = bundle_sha256()
    if about.bundle == installed:
        return Check("bundle", True, f"sha256 {installed} is pinned by the kit and installed here")
    if installed in terms.bundles:
        return Check("bundle", True, f"sha256 {installed} is installed here and listed by the policy")
    return Check(
        "bundle",
        False,
        f"the kit pins the Flower app {about.bundle}, and the installed version has {installed}",
        "install the coordinator's version of MaskDM, or ask for a kit of this version",
    )
