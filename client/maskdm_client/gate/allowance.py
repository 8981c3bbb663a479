"""How often a site was asked for something: a file that is written before the work begins.

However the work ends, it counts: a code that says how it ended tells something too.
"""

import json
import math
import time
from pathlib import Path
from typing import NamedTuple

from maskdm.federated.policy import DAY, SitePolicy
from maskdm.run.runfolder import write_json

from ..folder.job import Job
from ..refusals import PolicyRefused

REMEMBERED = 365 * DAY  # no federation lasts longer


class Allowance(NamedTuple):
    """Something that may be asked only so often."""

    file: str
    noun: str
    per_day: str | None  # keys of the policy
    per_federation: str | None


UPDATES = Allowance("updates.json", "updates", "max_rounds_per_day", "max_rounds")
MEASUREMENTS = Allowance("measurements.json", "measurements", "max_measurements_per_day", "max_measurements")
FAILURES = Allowance("failures.json", "failures of work on the images", None, "max_failures")
EVALUATIONS = Allowance("evaluations.json", "evaluations", "max_evaluations_per_day", None)


class Used(NamedTuple):
    """When, for which work, of which federation."""

    when: float
    work: str
    federation: str


def check_allowance(job: Job, kind: Allowance) -> None:
    """See that this work may be done too.

    Raises:
        PolicyRefused: so much was asked for already.
    """
    _before(job, kind)


def use_allowance(job: Job, kind: Allowance) -> None:
    """Count this work; what is asked for again, or begun again after a crash, counts once.

    Raises:
        PolicyRefused: as `check_allowance`.
        OSError: it cannot be written down, so it must not begin.
    """
    before = _before(job, kind)
    write_json(job.folder / kind.file, [*before, Used(time.time(), job.key, job.plan.federation)])


def _before(job: Job, kind: Allowance) -> list[Used]:
    """What is to be remembered, without the last one where it is of this very work."""
    policy, federation = job.settings.policy, job.plan.federation
    used = [one for one in _read(job.folder, kind) if one.when > time.time() - REMEMBERED]
    if job.key and used and used[-1].work == job.key:
        del used[-1]
    if kind.per_federation is not None:
        _check(policy, kind, kind.per_federation, "a federation", sum(one.federation == federation for one in used))
    if kind.per_day is not None:
        _check(policy, kind, kind.per_day, "24 hours", sum(_is_of_today(one) for one in used))
    return used


def _check(policy: SitePolicy, kind: Allowance, name: str, span: str, count: int) -> None:
    allowed = getattr(policy, name)
    if count >= allowed:
        raise PolicyRefused(
            f"the site's policy allows {allowed:,} {kind.noun} in {span}, and there were so many "
            f"({name.replace('_', '-')})"
        )


def _is_of_today(used: Used) -> bool:
    """Those of a clock that went ahead count too."""
    return used.when > time.time() - DAY


def _read(folder: Path, kind: Allowance) -> list[Used]:
    try:
        read = json.loads((folder / kind.file).read_text())
        found = [Used(float(when), work, federation) for when, work, federation in read]
        if not isinstance(read, list) or not all(
            math.isfinite(one.when) and isinstance(one.work, str) for one in found
        ):
            raise ValueError("no list of times")
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, OverflowError) as error:
        raise PolicyRefused(
            f"{kind.file} is damaged, so nobody knows how many {kind.noun} there were: delete it"
        ) from error
    return found
