"""How many updates, or numbers of evaluations, left a site in the last 24 hours: a file that is written before each.

Whatever fails after that, it counts as left.
"""

import json
import math
import time
from pathlib import Path
from typing import NamedTuple

from maskdm.errors import MaskDMError
from maskdm.policy import DAY, SitePolicy
from maskdm.runfolder import write_json


class Kind(NamedTuple):
    """Something of which only so much may leave."""

    file: str
    key: str  # of the policy
    noun: str


UPDATES = Kind("releases.json", "max-rounds-per-day", "updates")
EVALUATIONS = Kind("evaluations.json", "max-evaluations-per-day", "evaluations")


class PolicyRefused(MaskDMError):
    """The site's policy does not allow it to take part."""


def check_allowance(folder: Path, work: str, policy: SitePolicy, kind: Kind = UPDATES) -> None:
    """See that one more may leave today.

    Args:
        work: key of plan and weights, the same where the same work is asked for again.

    Raises:
        PolicyRefused: it may not.
    """
    allowed = _allowed(policy, kind)
    if allowed is not None and len(_before(work, _of_today(folder, kind))) >= allowed:
        raise PolicyRefused(
            f"the site's policy allows {allowed} {kind.noun} in 24 hours, and so many left ({kind.key})"
        )


def use_allowance(folder: Path, work: str, policy: SitePolicy, kind: Kind = UPDATES) -> None:
    """Count what is about to leave; what is made again after a crash counts once.

    Raises:
        PolicyRefused: as `check_allowance`.
        OSError: it cannot be written down, so it must not leave.
    """
    if _allowed(policy, kind) is None:
        return
    check_allowance(folder, work, policy, kind)
    write_json(folder / kind.file, [*_before(work, _of_today(folder, kind)), (time.time(), work)])


def _allowed(policy: SitePolicy, kind: Kind) -> int | None:
    found: int | None = getattr(policy, kind.key.replace("-", "_"))
    return found


def _before(work: str, releases: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Without the last one where it is of this very work. Its number would not do: the coordinator chooses that."""
    return releases[:-1] if work and releases and releases[-1][1] == work else releases


def _of_today(folder: Path, kind: Kind) -> list[tuple[float, str]]:
    """When they left, and of which work; those of a clock that went ahead count too."""
    try:
        read = json.loads((folder / kind.file).read_text())
        found = [(float(when), of) for when, of in read]
        if not isinstance(read, list) or not all(math.isfinite(when) and isinstance(of, str) for when, of in found):
            raise ValueError("no list of times")
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, OverflowError) as error:
        raise PolicyRefused(f"{kind.file} is damaged, so nobody knows how many {kind.noun} left: delete it") from error
    return [(when, of) for when, of in found if when > time.time() - DAY]
